"""Images in a .npz of ADM's layout: `arr_0` uint8 (N, H, W, C), labels (N,) in `labels` or `arr_1`, texts (N, W) in
`prompts`. Images are used as stored, without cropping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._media.arrays import StoredArray, stored_arrays, stored_captions, stored_labels
from .._media.captions import ARGUMENT
from .._media.collection import Collection
from .._media.pixels import Frame


class ImageArrays(Collection):
    """The images of an archive; each process maps the file itself."""

    def __init__(self, path: Path, frame: Frame, field: str):
        self.path, self.frame = path, frame
        arrays = stored_arrays(path, field)
        if "arr_0" not in arrays:
            raise ValueError(f"{field}: {path} holds {', '.join(arrays) or 'nothing'}; save images under arr_0")
        self.array = _checked(arrays["arr_0"], field)
        count, *size = self.array.shape
        if tuple(size) != (want := (frame.height, frame.width, frame.channels)):
            raise ValueError(
                f"{field}: {path} holds images of {_written(size)}, not {_written(want)} (height x width x "
                "channels); images of a .npz are never resized: write one of that size, or give the original files"
            )
        self.names = [f"{i:06d}" for i in range(count)]
        self.labels = stored_labels(arrays.get("labels") or arrays.get("arr_1"), count, field)
        self.class_names = tuple(str(i) for i in range(max(self.labels) + 1)) if self.labels else ()
        self.captions = stored_captions(arrays.get(ARGUMENT), count, field)
        self._mapped: np.ndarray | None = None

    def load(self, index: int) -> Tensor:
        if self._mapped is None:
            self._mapped = self.array.read()
        pixels = np.array(self._mapped[index])  # (H, W, C), a copy
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255

    def stamp(self, index: int) -> str:
        return f"{self.array.crc:08x}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


def resolution_of(path: Path, field: str) -> tuple[int, int, int] | None:
    """Return (height, width, channels) of the images of an archive; None if it has no `arr_0`, or one with the five
    axes of videos."""
    array = stored_arrays(path, field).get("arr_0")
    if array is None or len(array.shape) == 5:
        return None
    _, height, width, channels = _checked(array, field).shape
    return height, width, channels


def _checked(array: StoredArray, field: str) -> StoredArray:
    if len(array.shape) != 4 or array.dtype != np.uint8 or not array.shape[0]:
        raise ValueError(
            f"{field}: {array.path}: {array.name} is {array.dtype} {array.shape}, not uint8 (N, H, W, C) with N >= 1"
        )
    return array


def _written(size: Any) -> str:
    return " x ".join(map(str, size))
