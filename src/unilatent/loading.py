"""Load the model of a run, a model folder or a hub id."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from .files import expanded
from .methods.base import LatentModel
from .model_card import ModelRecord, read_record
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
from .packaged import packaged
from .runs.checkpoint import newest, verify
from .runs.listing import FINETUNED
from .runs.record import record_of


def load(
    source: str | Path, *, device: str | torch.device | None = None, revision: str | None = None,
    dtype: str | torch.dtype | None = None, torch_dtype: str | torch.dtype | None = None,
    device_map: str | torch.device | dict[str, Any] | None = None,
) -> LatentModel:  # fmt: skip
    """Load a run folder, a model folder, a model of the package ("digits") or a hub id ("owner/name").

    With EMA weights, in evaluation mode. A folder comes before a model of the package of the same name. An unfinished
    run gives its newest valid checkpoint. device: None takes a GPU if there is one. revision: of a hub model. dtype: of
    the weights, by default float32; the model computes in it, and results are float32 all the same.
    torch_dtype, device_map: other libraries' names for dtype and device.
    ValueError names what is missing or damaged.
    """
    device, chosen = placement(device, device_map), parse_dtype(dtype, torch_dtype)
    path = expanded(source)
    run = None
    if path.is_dir():
        folder, run = _model_folder(path), _run_folder(path)
    elif own := packaged(str(source)):
        folder = own
    else:
        refuse_file(path)
        refuse_missing(source)
        folder = download(str(source), revision=revision)
    model = read_model(folder, LatentModel, device, chosen)
    model.known = partial(_stored_record, folder) if run is None else partial(record_of, run)
    return model


def _run_folder(path: Path) -> Path | None:
    """Return the run that a source is, or whose finished model it is."""
    run = path.absolute().parent if path.name == "model" else path
    return run if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir() else None


def _stored_record(folder: Path, fingerprint: str) -> ModelRecord | None:
    """Return the record of a model folder, whatever model it is of."""
    return read_record(folder)


def _model_folder(path: Path) -> Path:
    """Return the folder with the weights of a run or checkpoint, which is verified; `path` if it is a model folder."""
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        if (path / EMA).is_file():
            verify(path)
        return path
    if (path / "model").is_dir():
        return path / "model"
    if (path / "checkpoints").is_dir():
        if (path / FINETUNED).is_file():
            raise ValueError(
                f"{path}: a decoder that is not sharpened to its end; the same `unilatent finetune-decoder` goes on"
            )
        checkpoint, _ = newest(path / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{path}: the run has no checkpoint yet; continue its training with --resume auto")
        return checkpoint
    raise ValueError(f"{path}: neither a run nor a model folder (no {CONFIG}, model/ or checkpoints/ in it)")
