"""What a run knows of its model: how it was trained, on what, its evaluations and its newest images."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import ConfigError, read_yaml
from ..files import read_json
from ..model_card import ModelRecord, read_record
from ..registry import available, find
from .listing import FINETUNED, describe

PRIVATE = ("latents", "evaluate_reference", "wandb_project", "wandb_name", "device")
"""Settings of training that name places and accounts."""
VERSIONS = ("unilatent", "torch", "python")
FOLDERS = {"samples.png": "samples", "reconstructions.png": "recon"}
"""Image of a model folder -> folder of a run with images of that kind."""


def record_of(run: Path, fingerprint: str) -> ModelRecord:
    """Return the record of a run's model. It has no path but the name of the data.

    fingerprint: of the model; evaluations of other weights are left out. What is missing or damaged is left out too.
    """
    config: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    with suppress(ConfigError):
        config = read_yaml(run / "config.yaml")
    with suppress(ValueError):
        environment = read_json(run / "env.json", "")
    settings = config["training"] if isinstance(config.get("training"), dict) else {}
    training: dict[str, Any] = {
        "preset": config.get("preset"), "seed": config.get("seed"),
        "steps": describe(run).step or None,
        "batch_size": settings.get("batch_size"),
        **{key: environment[key] for key in ("precision", "device", "gpu", "processes") if key in environment},
        "versions": {name: environment[name] for name in VERSIONS if name in environment},
        "settings": {key: value for key, value in settings.items() if key not in PRIVATE},
    }  # fmt: skip
    evaluations = _evaluations(run, fingerprint)
    pictures = {name: newest for name, folder in FOLDERS.items() if (newest := _newest(run / folder)) is not None}
    stored = read_record(run / "model") if (run / FINETUNED).is_file() else None
    if stored is not None:  # the run has the steps and the machine of the sharpening
        return replace(stored, fingerprint=fingerprint, evaluations=evaluations, pictures=pictures)
    return ModelRecord(fingerprint, training, _data(run, config), evaluations, pictures)


def _data(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The name, the origin and the size of the training data."""
    settings, modality = config.get("data"), config.get("modality")
    if not isinstance(settings, dict):
        return {}
    path, name = settings.get("path"), modality.get("name") if isinstance(modality, dict) else None
    origin = ""
    if name in available("modalities"):
        kind = find("modalities", name)
        with suppress(ConfigError):
            origin = kind.origin_of(kind.DataConfig.parse(settings))
    metrics = describe(run).metrics
    samples = None
    with suppress(KeyError, TypeError, ZeroDivisionError):
        samples = round(metrics["samples"] / metrics["epoch"])
    return {
        "path": path if origin or path is None else name_of(str(path)),
        "origin": origin,
        "training_samples": samples,
    }


def name_of(path: str) -> str:
    """Return what a card says of a place of data: owner/name on the hub, else the last part of the path alone.

    A record is published, so it has neither folders of this machine nor what an address carries after its path.
    """
    place = path.removeprefix("hf:")
    if place != path and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        return path
    return Path(urlsplit(place).path if "://" in place else place).name


def _evaluations(run: Path, fingerprint: str) -> list[dict[str, Any]]:
    """The evaluations of exactly these weights, in the order in which they were made."""
    found = []
    for path in sorted((run / "eval").glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name)):
        with suppress(ValueError):
            content = read_json(path, "")
            if content.get("fingerprint") == fingerprint and isinstance(content.get("numbers"), list):
                found.append({key: value for key, value in content.items() if key != "model"})
    return found


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("step_*.png"), default=None)
