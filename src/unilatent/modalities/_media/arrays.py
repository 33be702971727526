"""Arrays of a .npz file, checked before they are read and never unpickled; labels and captions from such arrays."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..base import BadSample
from .captions import Captions

SUFFIX = ".npz"
IN_MEMORY = 4 * 2**30
"""Largest unpacked size of a compressed array in bytes; uncompressed ones are memory-mapped."""
MAX_CLASSES = 100_000
"""Labels must be below this number."""


@dataclass(frozen=True)
class StoredArray:
    """An array of an archive. crc: CRC-32 of its bytes; start: offset of its values in the file, None if compressed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int
    start: int | None

    def read(self) -> np.ndarray:
        """Return the array, memory-mapped if it is uncompressed."""
        if self.start is not None:
            return np.memmap(self.path, self.dtype, "r", self.start, self.shape)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[self.name]
        except Exception as error:  # zlib.error, BadZipFile, OSError, ...
            raise BadSample(f"{self.path}: {self.name} cannot be unpacked ({_reason(error)}); copy it again") from error


def is_npz(path: str | Path) -> bool:
    """Whether a path names a .npz file."""
    return Path(path).suffix.lower() == SUFFIX


def stored_arrays(path: Path, field: str) -> dict[str, StoredArray]:
    """Read the headers of all arrays in an archive: name -> array. ValueError names `field` unless all are numeric."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            arrays = [_stored_array(path, archive, raw, member) for member in archive.infolist()]
    except OSError as error:
        raise ValueError(f"{field}: {path}: {error.strerror or error}; give a readable .npz") from None
    except Exception as error:  # ValueError, BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ...
        raise ValueError(
            f"{field}: {path}: not a .npz of numeric arrays ({_reason(error)}); save it with numpy.savez"
        ) from None
    return {array.name: array for array in arrays}


def stored_array(path: Path, field: str) -> StoredArray:
    """Read the header of a .npy; ValueError names `field` unless it is a complete numeric array in C order.

    Its `crc` is that of the header and of the file's size and time of change: the values are not read.
    """
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
            stat = path.stat()
    except OSError as error:
        raise ValueError(f"{field}: {path}: {error.strerror or error}; give a readable .npy") from None
    except Exception as error:  # ValueError, KeyError, EOFError, struct.error, ...
        raise ValueError(
            f"{field}: {path}: not a .npy of a numeric array ({_reason(error)}); save it with numpy.save"
        ) from None
    if dtype.hasobject or fortran or stat.st_size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{field}: {path}: not a complete numeric array in C order; save it with numpy.save, or copy it again"
        )
    crc = zlib.crc32(repr((shape, str(dtype), stat.st_size, stat.st_mtime_ns)).encode())
    return StoredArray(path, path.stem, shape, dtype, crc, start)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array; ValueError or KeyError if there is none."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](file)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _stored_array(path: Path, archive: zipfile.ZipFile, raw: BinaryIO, member: zipfile.ZipInfo) -> StoredArray:
    """Read the header of one array. raw: the archive's own bytes."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        shape, fortran, dtype = _header(file)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} contains Python objects, which would have to be unpickled")
    size = math.prod(shape) * dtype.itemsize
    if fortran or member.file_size != header + size:
        raise ValueError(f"{name} is not a complete array in C order")
    start = None
    if member.compress_type == zipfile.ZIP_STORED:
        raw.seek(member.header_offset + 26)  # lengths of the name and the extra field in the local header
        lengths = np.frombuffer(raw.read(4), "<u2")
        start = member.header_offset + 30 + int(lengths.sum()) + header
    elif size > IN_MEMORY:
        raise ValueError(f"{name} unpacks to {size / 2**30:.0f} GiB; save it without compression")
    return StoredArray(path, name, shape, dtype, member.CRC, start)


def stored_labels(array: StoredArray | None, count: int, field: str) -> list[int] | None:
    """Return the `count` labels in an array, None without an array; ValueError if it has other content."""
    if array is None:
        return None
    labels = array.read() if array.shape == (count,) and array.dtype.kind in "iu" else None
    if labels is None or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise ValueError(
            f"{field}: {array.path}: {array.name} is {array.dtype} {array.shape}, not one class number from 0 up "
            f"for each of the {count} samples"
        )
    return labels.tolist()


class StoredCaptions(Captions):
    """Captions from UTF-8 bytes padded with zeros, (N, W) uint8, as `unilatent sample` writes its prompts."""

    def __init__(self, rows: np.ndarray):
        self.texts = [row.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for row in rows]

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return (self.texts[index],)

    def stamp(self, index: int) -> str:
        return self.texts[index]


def stored_captions(array: StoredArray | None, count: int, field: str) -> Captions | None:
    """Return the `count` texts in an array, None without an array; ValueError if it has other content."""
    if array is None:
        return None
    if len(array.shape) != 2 or array.shape[0] != count or array.dtype != np.uint8:
        raise ValueError(
            f"{field}: {array.path}: {array.name} is {array.dtype} {array.shape}, not texts as bytes: uint8 "
            f"({count}, W), padded with zeros"
        )
    return StoredCaptions(array.read())
