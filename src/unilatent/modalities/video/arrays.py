"""Videos in a .npz or .npy: uint8 arrays whose order of axes is named, never resized.

A .npz has `arr_0` (or one array of any name), labels (N,) in `labels` or `arr_1`, texts (N, W) in `prompts`. A .npy is
the array alone, such as Moving MNIST's `mnist_test_seq.npy` of axes "tbhw".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .._media.arrays import StoredArray, is_npz, stored_array, stored_arrays, stored_captions, stored_labels
from .._media.captions import ARGUMENT
from .._media.collection import EncodedCollection
from .reading import ArrayVideo, decode
from .windows import ClipFrame

AXES = "bthwc"
"""The order of axes of `unilatent sample`'s arrays: video, time, row, column, channel."""
SUFFIXES = (".npz", ".npy")


def is_array(path: str | Path) -> bool:
    """Whether a path names a .npz or .npy."""
    return Path(path).suffix.lower() in SUFFIXES


class VideoArrays(EncodedCollection):
    """The videos of an array; each process maps the file itself.

    axes: a permutation of "bthwc", without c for grey videos. ValueError names `field` if the array has other axes or
    another type, or if its frames do not have the frame's size. length: frames of each video.
    """

    def __init__(self, path: Path, frame: ClipFrame, field: str, axes: str = AXES):
        self.path, self.field, self.decoder = path, field, decode
        arrays = stored_arrays(path, field) if is_npz(path) else {"arr_0": stored_array(path, field)}
        videos = {name: array for name, array in arrays.items() if len(array.shape) == len(axes)}
        name = "arr_0" if "arr_0" in arrays or len(videos) != 1 else next(iter(videos))
        if name not in arrays:
            raise ValueError(f"{field}: {path} holds {', '.join(arrays) or 'nothing'}; save videos under arr_0")
        self.array, self.axes = arrays[name], axes
        shape = _sizes(self.array, axes, field)
        super().__init__(shape["b"], frame, cache=False)
        found = (shape["h"], shape["w"], shape.get("c", 1))
        if found != (want := (frame.height, frame.width, frame.channels)):
            raise ValueError(
                f"{field}: {path} holds videos of {_written(found)}, not {_written(want)} (height x width x channels); "
                "arrays are never resized: set modality.size and modality.channels, or give the original files"
            )
        count, self.length = shape["b"], shape["t"]
        self.names = [f"{i:06d}" for i in range(count)]
        self.labels = stored_labels(arrays.get("labels") or arrays.get("arr_1"), count, field)
        self.class_names = tuple(str(i) for i in range(max(self.labels) + 1)) if self.labels else ()
        self.captions = stored_captions(arrays.get(ARGUMENT), count, field)
        self._mapped: np.ndarray | None = None

    def content(self, index: int) -> ArrayVideo:
        if self._mapped is None:
            mapped = self.array.read()
            mapped = mapped if "c" in self.axes else mapped[..., None]
            axes = self.axes if "c" in self.axes else f"{self.axes}c"
            self._mapped = mapped.transpose([axes.index(axis) for axis in AXES])  # (B, T, H, W, C), still mapped
        return ArrayVideo(self._mapped[index], self.where(index))

    def where(self, index: int) -> str:
        return f"{self.names[index]} in {self.path}"

    def stamp(self, index: int) -> str:
        return f"{self.array.crc:08x} {self.array.shape} {self.axes}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


def sizes(path: Path, field: str, axes: str = AXES) -> dict[str, int] | None:
    """Return the size of each axis (b, t, h, w, c) of the videos of a file; None if a .npz has no array of so many
    axes. ValueError if its array is no such."""
    if not is_npz(path):
        return _sizes(stored_array(path, field), axes, field)
    found = [array for array in stored_arrays(path, field).values() if len(array.shape) == len(axes)]
    return _sizes(found[0], axes, field) if len(found) == 1 else None


def check_axes(axes: str) -> str:
    """Return an order of axes; ValueError if it is none."""
    if sorted(axes) not in (sorted(AXES), sorted("bthw")):
        raise ValueError(
            f"axes: {axes!r} is no order of axes; write one letter for each: b video, t time, h row, w column, and c "
            'channel unless videos are grey, as in "bthwc", or "tbhw" for Moving MNIST'
        )
    return axes


def _sizes(array: StoredArray, axes: str, field: str) -> dict[str, int]:
    if len(array.shape) != len(axes) or array.dtype != np.uint8 or not min(array.shape, default=0):
        raise ValueError(
            f"{field}: {array.path}: {array.name} is {array.dtype} {array.shape}, not uint8 of the axes {axes!r}; name "
            "the order of its axes with data.axes, such as tbhw for Moving MNIST"
        )
    return {"c": 1, **dict(zip(axes, array.shape, strict=True))}


def _written(size: Any) -> str:
    return " x ".join(map(str, size))
