"""What numbers are held against: the run's own data, other real samples, or published statistics."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..config import read_yaml
from ..methods.base import LatentModel
from ..modalities.base import Modality, Splits
from ..records import Statistics
from ..registry import find
from .evaluate import Reference

MOMENTS = (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
"""Tensor of the Inception space, and the names of its moments in ADM's .npz files."""


def splits_of(model: LatentModel, run: Path | None, data_path: str | None) -> Splits | None:
    """The data a run was trained on, as its config.yaml says, or at another path; None for a model without any."""
    modality = model.modality
    settings = find("modalities", model.config.modality.name).DataConfig
    if run is not None:
        content = read_yaml(run / "config.yaml")["data"]
    elif data_path is not None:
        content = {}
    else:
        return None
    if data_path is not None:
        content = {**content, "path": data_path}
    return modality.splits(settings.parse(content))


def find_reference(modality: Modality, source: str) -> Reference:
    """Real samples in a folder or archive, or a .npz of ADM's layout; ValueError names the path and what is wrong."""
    path = Path(source).expanduser()
    if path.suffix != ".npz":
        settings = find("modalities", modality.config.name).DataConfig
        dataset = modality.splits(settings.parse({"path": str(path), "held_out": 0})).train
        return Reference(path.name, dataset.fingerprint, dataset=dataset)
    digest = _hash(path)
    arrays = _arrays(path)
    if "mu" in arrays and "sigma" in arrays:
        return Reference(path.name, digest, statistics=_statistics(arrays, path))
    raise ValueError(f"--reference {path}: has {', '.join(arrays)}; give mu and sigma, or a folder of samples")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--reference {path}: cannot be read as plain arrays ({reason}); make it anew") from None


def _statistics(arrays: dict[str, np.ndarray], path: Path) -> Statistics:
    moments = {}
    for tensor, mean, covariance in MOMENTS:
        if mean not in arrays or covariance not in arrays:
            continue
        mu, sigma = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mean, covariance))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError(
                f"--reference {path}: {mean} {tuple(mu.shape)} and {covariance} {tuple(sigma.shape)} are not a finite "
                "mean (D,) and covariance (D, D)"
            )
        moments[tensor] = (mu, sigma)
    return Statistics(moments)


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"--reference {path}: {error.strerror}; give a folder, zip or .npz") from None
