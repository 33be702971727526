"""Load the model of a run, a model folder or a hub id."""

from __future__ import annotations

from pathlib import Path

import torch

from .devices import pick_device
from .methods.base import LatentModel
from .model_folder import CONFIG, WEIGHTS, assemble, download, read_config, read_model, read_weights
from .runs.checkpoint import newest, verify


def load(source: str | Path, *, device: str | torch.device | None = None, revision: str | None = None) -> LatentModel:
    """Load a run folder, a model folder or a hub id ("owner/name") with EMA weights, in evaluation mode.

    An unfinished run gives its newest valid checkpoint. device: None takes a GPU if there is one. revision: of a hub
    model. ValueError names what is missing or damaged.
    """
    device = pick_device(None if device is None else str(device))
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, device)
    if path.exists():
        raise ValueError(
            f"{source}: is a file, and files are never unpickled; give a run or a model folder, or convert a .pt file "
            "of the UNITE authors with `unilatent convert`"
        )
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such folder; give a run, a model folder or a hub id like owner/name")
    return read_model(download(str(source), revision=revision), LatentModel, device)


def _load_folder(path: Path, device: torch.device) -> LatentModel:
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        if (path / "ema.safetensors").is_file():
            verify(path)
            return _load_checkpoint(path, device)
        return read_model(path, LatentModel, device)
    if (path / "model").is_dir():
        return read_model(path / "model", LatentModel, device)
    if (path / "checkpoints").is_dir():
        checkpoint, _ = newest(path / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{path}: the run has no checkpoint yet; continue its training with --resume auto")
        return _load_checkpoint(checkpoint, device)
    raise ValueError(f"{path}: neither a run nor a model folder (no {CONFIG}, model/ or checkpoints/ in it)")


def _load_checkpoint(path: Path, device: torch.device) -> LatentModel:
    """Load a verified training checkpoint with its EMA weights."""
    weights = read_weights(path / WEIGHTS, device) | read_weights(path / "ema.safetensors", device)
    return assemble(read_config(path), LatentModel, weights, path, device)
