"""Pictures in a .npz of ADM's layout: `arr_0` uint8 (N, H, W, C), labels (N,) in `labels` or `arr_1` and texts (N, W)
in `prompts` if there are any. Exactly as they are: no crop, and nothing is ever unpickled."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .captions import ARGUMENT, Captions
from .data import Collection, Frame

SUFFIX = ".npz"
IN_MEMORY = 4 * 2**30
"""What a compressed array may unpack to; others stay on disk."""
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Member:
    """An array of an archive. crc: of its bytes; start: where its numbers lie in the file, None if compressed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: np.dtype
    crc: int
    start: int | None

    def read(self) -> np.ndarray:
        """The whole array, mapped where it lies on disk as it is."""
        if self.start is not None:
            return np.memmap(self.path, self.kind, "r", self.start, self.shape)
        with np.load(self.path, allow_pickle=False) as file:
            return file[self.name]


class Pictures(Collection):
    """Of an archive; each process maps the file for itself."""

    def __init__(self, path: Path, frame: Frame, field: str):
        self.path, self.frame = path, frame
        found = members(path, field)
        if "arr_0" not in found:
            raise ValueError(f"{field}: {path} holds {', '.join(found) or 'nothing'}; save pictures under arr_0")
        self.member = _pictures(found["arr_0"], field)
        count, *size = self.member.shape
        if tuple(size) != (want := (frame.height, frame.width, frame.channels)):
            raise ValueError(
                f"{field}: {path} holds pictures of {_written(size)}, not {_written(want)} (height x width x "
                "channels); a .npz is never resized: make one of that size, or give the original files"
            )
        self.names = [f"{i:06d}" for i in range(count)]
        self.labels = _labels(found.get("labels") or found.get("arr_1"), count, field)
        self.class_names = tuple(str(i) for i in range(max(self.labels) + 1)) if self.labels else ()
        self.captions = _captions(found.get(ARGUMENT), count, field)
        self._mapped: np.ndarray | None = None

    def picture(self, index: int) -> Tensor:
        if self._mapped is None:
            self._mapped = self.member.read()
        pixels = np.array(self._mapped[index])  # (H, W, C), a copy
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255

    def stamp(self, index: int) -> str:
        return f"{self.member.crc:08x}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


def members(path: Path, field: str) -> dict[str, Member]:
    """Every array's header; ValueError on anything but plain numbers."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as plain:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, fortran, kind = read[version](file)
                    header = file.tell()
                if kind.hasobject:
                    raise ValueError(f"{name} holds Python objects, which would have to be unpickled")
                size = math.prod(shape) * kind.itemsize
                if fortran or info.file_size != header + size:
                    raise ValueError(f"{name} is not a whole array in C order")
                start = None
                if info.compress_type == zipfile.ZIP_STORED:
                    plain.seek(info.header_offset + 26)  # lengths of a local header's name and extra field
                    lengths = np.frombuffer(plain.read(4), "<u2")
                    start = info.header_offset + 30 + int(lengths.sum()) + header
                elif size > IN_MEMORY:
                    raise ValueError(f"{name} unpacks to {size / 2**30:.0f} GiB; save it without compression")
                found[name] = Member(path, name, shape, kind, info.CRC, start)
    except OSError as error:
        raise ValueError(f"{field}: {path}: {error.strerror or error}; give a readable .npz") from None
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{field}: {path}: is no .npz of plain arrays ({reason}); save it with numpy.savez") from None
    return found


def resolution_of(path: Path, field: str) -> tuple[int, int, int] | None:
    """(height, width, channels) of the pictures; None without any."""
    found = members(path, field).get("arr_0")
    if found is None:
        return None
    _, height, width, channels = _pictures(found, field).shape
    return height, width, channels


def _pictures(member: Member, field: str) -> Member:
    if len(member.shape) != 4 or member.kind != np.uint8 or not member.shape[0]:
        raise ValueError(
            f"{field}: {member.path}: {member.name} is {member.kind} {member.shape}, not uint8 (N, H, W, C) with N >= 1"
        )
    return member


def _labels(member: Member | None, count: int, field: str) -> list[int] | None:
    if member is None:
        return None
    labels = member.read() if member.shape == (count,) and member.kind.kind in "iu" else None
    if labels is None or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise ValueError(
            f"{field}: {member.path}: {member.name} is {member.kind} {member.shape}, not one class number from 0 up "
            f"for each of the {count} pictures"
        )
    return labels.tolist()


class _Bytes(Captions):
    """UTF-8 with zeros behind, (N, W) uint8, as `unilatent sample` writes what it was asked for."""

    def __init__(self, rows: np.ndarray):
        self.texts = [row.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for row in rows]

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return (self.texts[index],)

    def stamp(self, index: int) -> str:
        return self.texts[index]


def _captions(member: Member | None, count: int, field: str) -> Captions | None:
    if member is None:
        return None
    if len(member.shape) != 2 or member.shape[0] != count or member.kind != np.uint8:
        raise ValueError(
            f"{field}: {member.path}: {member.name} is {member.kind} {member.shape}, not texts as bytes: uint8 "
            f"({count}, W) with zeros behind"
        )
    return _Bytes(member.read())


def _written(size: Any) -> str:
    return " x ".join(map(str, size))
