"""Reads weights that others published as a pickle of NumPy arrays, without being able to run anything.

The reader knows three names, and stands in for each with its own code; every other name is refused before it is
imported. So neither NumPy's own unpickling nor any import is reached from a file.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

FLOATS = {"f2": np.float16, "f4": np.float32, "f8": np.float64}
"""The only types of elements, in the byte order of all machines that torch runs on."""


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a bare pickle of protocol 2 or later does (torch's files are archives)."""
    with path.open("rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= pickle.HIGHEST_PROTOCOL


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of nested dictionaries in a pickle as tensors; keys are joined by "/".

    ValueError if the file holds anything but dictionaries with text keys, and arrays of floating-point numbers.
    """
    try:
        with path.open("rb") as file:
            tree = _Reader(file).load()
        return dict(_flat(tree, ""))
    except Exception as error:  # a crafted file can cause any error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable pickle of arrays ({reason})") from None


class _Type:
    """Stands for a numpy.dtype: its code, and the byte order that its state names."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype[Any]:
        if self.code not in FLOATS or self.order not in ("<", "="):
            raise ValueError(f"elements of type {self.order}{self.code} are not read")
        return np.dtype(FLOATS[self.code])


class _Array:
    """Stands for a numpy.ndarray: the state that `_reconstruct` is completed with becomes a tensor."""

    tensor: Tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Type) or not isinstance(content, bytes):
            raise ValueError("an array of Python objects")
        values = np.frombuffer(content, dtype=dtype.numpy).reshape(shape, order="F" if fortran else "C")
        self.tensor = torch.from_numpy(np.array(values, order="C"))


def _empty_array(*_: object) -> _Array:
    """Stands for numpy's `_reconstruct`, which makes an array without content."""
    return _Array()


class _Reader(pickle.Unpickler):
    """An unpickler whose only calls are to the three stand-ins."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise ValueError(f"it names {module}.{name}, which is not loaded")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to other files")


def _flat(tree: Any, prefix: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, _Array):
        return [(prefix, tree.tensor)]
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{prefix or 'it'} holds a {type(tree).__name__}, not arrays by name")
    return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}/{key}" if prefix else key)]
