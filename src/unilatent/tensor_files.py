"""Safetensors files read one tensor, or a slice of one, at a time, with plain reads and no mapped memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types by their names in a header."""
HEADER_SIZE = 8
"""Bytes of the header's length, with which a file begins."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its type, its shape, and where its values start, in bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a safetensors file, by name. Processes that share the file can share this record of its header."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header. SafetensorError or ValueError if it is damaged, or of a type that is not known here."""
        with safe_open(path, "pt"):  # checks that the header fits the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(HEADER_SIZE), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        if unknown := {entry["dtype"] for entry in header.values()} - DTYPES.keys():
            raise ValueError(f"numbers of the type {min(unknown)}")
        return cls(
            path,
            {
                name: StoredTensor(
                    DTYPES[entry["dtype"]], torch.Size(entry["shape"]), HEADER_SIZE + size + entry["data_offsets"][0]
                )
                for name, entry in header.items()
            },
        )

    def read(self, file: BinaryIO, name: str, offset: Sequence[int] = (), shape: Sequence[int] | None = None) -> Tensor:
        """Read a tensor from the opened file, or the part of this shape that begins at an offset in each dimension.

        Only the rows (the first dimension) of the part are read. OSError if the file ends too early.
        """
        stored = self.tensors[name]
        if shape is None:
            return _read(file, stored.start, stored.dtype, stored.shape)
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=stored.dtype)
        row = stored.shape[1:]
        first = stored.start + offset[0] * math.prod(row) * stored.dtype.itemsize
        part = _read(file, first, stored.dtype, (shape[0], *row))
        for dimension in range(1, len(shape)):
            part = part.narrow(dimension, offset[dimension], shape[dimension])
        return part


def _read(file: BinaryIO, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    file.seek(start)
    while done < len(view):  # one call reads at most 2 GiB
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"ends {len(view) - done:,} bytes too early")
        done += count
    return raw.view(dtype).view(tuple(shape))
