"""Load the model of a run, a model folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .files import expanded
from .methods.base import LatentModel
from .model_folder import (
    CONFIG,
    EMA,
    WEIGHTS,
    download,
    parse_dtype,
    placement,
    read_model,
    refuse_file,
    refuse_missing,
)
from .runs.checkpoint import newest, verify


def load(
    source: str | Path, *, device: str | torch.device | None = None, revision: str | None = None,
    dtype: str | torch.dtype | None = None, torch_dtype: str | torch.dtype | None = None,
    device_map: str | torch.device | dict[str, Any] | None = None,
) -> LatentModel:  # fmt: skip
    """Load a run folder, a model folder or a hub id ("owner/name") with EMA weights, in evaluation mode.

    An unfinished run gives its newest valid checkpoint. device: None takes a GPU if there is one. revision: of a hub
    model. dtype: of the weights, by default float32; the model computes in it, and results are float32 all the same.
    torch_dtype, device_map: other libraries' names for dtype and device.
    ValueError names what is missing or damaged.
    """
    device, chosen = placement(device, device_map), parse_dtype(dtype, torch_dtype)
    path = expanded(source)
    if path.is_dir():
        return read_model(_model_folder(path), LatentModel, device, chosen)
    refuse_file(path)
    refuse_missing(source)
    return read_model(download(str(source), revision=revision), LatentModel, device, chosen)


def _model_folder(path: Path) -> Path:
    """Return the folder with the weights of a run or checkpoint, which is verified; `path` if it is a model folder."""
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        if (path / EMA).is_file():
            verify(path)
        return path
    if (path / "model").is_dir():
        return path / "model"
    if (path / "checkpoints").is_dir():
        checkpoint, _ = newest(path / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{path}: the run has no checkpoint yet; continue its training with --resume auto")
        return checkpoint
    raise ValueError(f"{path}: neither a run nor a model folder (no {CONFIG}, model/ or checkpoints/ in it)")
