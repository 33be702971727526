"""Named tensors with one row per sample: the data that evaluation stores of a set, in memory, on disk, or as moments.

On disk:
    header.json                         the settings that determine the rows, and their number
    rows_00000000_00000512.safetensors  rows [0, 512) of every tensor, and so on

Each chunk is written atomically, and its rows depend on neither batch size nor number of processes: an interrupted set
can be completed chunk by chunk, by any number of processes. Reading loads one chunk at a time.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .faults import reach
from .files import read_json, readable, room, write_json
from .maths.frechet import Moments, RunningMoments
from .types import join_values

HEADER = "header.json"
OWN_FILE = re.compile(r"header\.json(\.tmp-\d+)?|\.?rows_\d+_\d+\.safetensors(\.\d+\.tmp)?")
SMALLEST, LARGEST = 64, 512
"""Rows per chunk: a 16th of the set, clamped to this range; less where processes would get unequal shares of it."""
WAY_OUT = "delete the folder and write it again"


class Rows(ABC):
    """A set of samples with named tensors, one row per sample."""

    def __init__(self, size: int):
        self.size = size
        self._moments: dict[str, Moments] = {}

    def __len__(self) -> int:
        return self.size

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the tensors."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's rows in order, in chunks."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def known_moments(self) -> list[str]:
        """Names of the tensors whose moments are already computed."""
        return sorted(self._moments)

    def __getitem__(self, name: str) -> Tensor:
        """Return all rows of a tensor, in memory."""
        return self.first(name, self.size)

    def first(self, name: str, count: int) -> Tensor:
        """Return at most the first `count` rows of a tensor."""
        chunks, size = [], 0
        for chunk in self.chunks(name):
            chunks.append(chunk)
            size += len(chunk)
            if size >= count:
                break
        return join_values(chunks)[:count]

    def moments(self, name: str) -> Moments:
        """Return mean (D,) and covariance (D, D) of a tensor's rows in float64, read in chunks."""
        if name not in self._moments:
            running = RunningMoments()
            for block in _in_blocks(self.chunks(name)):
                running.add(block)
            self._moments[name] = running.moments()
        return self._moments[name]


def _in_blocks(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the rows of chunks in blocks of LARGEST, so that sums over them do not depend on the size of chunks."""
    kept: Tensor | None = None
    for chunk in chunks:
        kept = chunk if kept is None else join_values([kept, chunk])
        while len(kept) >= LARGEST:
            yield kept[:LARGEST]
            kept = kept[LARGEST:]
    if kept is not None and len(kept):
        yield kept


class MemoryRows(Rows):
    """Rows in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(len(next(iter(tensors.values()))) if tensors else 0)
        self.tensors = dict(tensors)

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def chunks(self, name: str) -> Iterator[Tensor]:
        yield self.tensors[name]


class Statistics(Rows):
    """A set of which only moments are known; `size` is 0 if its number of samples is unknown."""

    def __init__(self, moments: dict[str, Moments], size: int = 0):
        super().__init__(size)
        self._moments = moments

    @property
    def names(self) -> list[str]:
        return []

    def chunks(self, name: str) -> Iterator[Tensor]:
        raise ValueError(f"{name}: this reference has only its mean and covariance, not its samples")


class Joined(Rows):
    """Several `Rows` of the same samples, combined; a tensor is read from the first that has its name.

    moments: replaces the moments of these tensors, for example by those of a larger set.
    """

    def __init__(
        self, parts: Sequence[Rows], size: int, moments: Mapping[str, Moments] | None = None
    ):  # fmt: skip
        super().__init__(size)
        assert all(len(part) == size for part in parts)
        self.parts = list(parts)
        self._moments = dict(moments or {})

    @property
    def names(self) -> list[str]:
        return sorted({name for part in self.parts for name in part.names})

    def chunks(self, name: str) -> Iterator[Tensor]:
        return self._of(name).chunks(name)

    def moments(self, name: str) -> Moments:
        return self._moments[name] if name in self._moments else self._of(name).moments(name)

    def _of(self, name: str) -> Rows:
        return next(part for part in self.parts if name in part)


class Records(Rows):
    """Rows on disk, in a folder created by `open_records`, which may be incomplete."""

    def __init__(self, folder: Path, rows: int, chunk_size: int):
        super().__init__(rows)
        self.folder, self.chunk_size = folder, chunk_size

    @property
    def names(self) -> list[str]:
        if not self.size:
            return []
        return sorted(self._read(self.ranges[0], lambda file: file.keys()))

    def chunks(self, name: str) -> Iterator[Tensor]:
        for rows in self.ranges:
            yield self._read(rows, lambda file: file.get_tensor(name))

    @property
    def ranges(self) -> list[range]:
        """Rows of every chunk."""
        starts = range(0, self.size, self.chunk_size)
        return [range(start, min(start + self.chunk_size, self.size)) for start in starts]

    def tensors(self, rows: range) -> dict[str, Tensor]:
        """Return all tensors of a chunk, mapped to memory: a row is read from the disk when it is used."""
        return self._read(rows, lambda file: {name: file.get_tensor(name) for name in sorted(file.keys())})

    def missing(self, rank: int = 0, world: int = 1) -> list[range]:
        """Return the rows of a process's chunks that are not written yet."""
        written = {entry.name for entry in os.scandir(self.folder)}  # read once: asking for each costs a request each
        return [rows for rows in self.ranges[rank::world] if self._path(rows).name not in written]

    def add(self, rows: range, tensors: dict[str, Tensor]) -> None:
        """Write a complete chunk; every tensor has len(rows) rows."""
        assert rows in self.ranges and all(len(tensor) == len(rows) for tensor in tensors.values())
        reach("evaluate.piece", rows.start)
        path = self._path(rows)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        rows_of = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with room(self.folder, sum(tensor.nbytes for tensor in rows_of.values())):
            try:
                save_file(rows_of, temporary)
                readable(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _read(self, rows: range, read: Callable[[Any], Any]) -> Any:
        path = self._path(rows)
        try:
            with safe_open(path, framework="pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged ({' '.join(str(error).split())}); {WAY_OUT}") from None

    def _path(self, rows: range) -> Path:
        return self.folder / f"rows_{rows.start:08d}_{rows.stop:08d}.safetensors"


def remove_records(folder: Path) -> None:
    """Remove the files of records, and their folder unless something else is in it."""
    if not (folder / HEADER).is_file():
        return
    with suppress(OSError):
        for path in folder.iterdir():
            if OWN_FILE.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def open_records(
    folder: Path, rows: int, made_by: dict[str, object], world: int = 1, chunk_size: int | None = None
) -> Records:
    """Open or create the records of a folder; ValueError if it contains records with other settings.

    made_by: all settings that determine the rows, as plain data. world: processes that share the work; new records
    have as many chunks for each. chunk_size: rows per chunk of new records; None: chosen. Several processes may call
    this at the same time.
    """
    chunk_size = chunk_size or _chunk_size(rows, world)
    header = json.loads(json.dumps({"rows": rows, "piece": chunk_size, **made_by}))
    path = folder / HEADER
    if path.is_file():
        stored = _read_header(path)
        header["piece"] = stored["piece"]
        differing = next((key for key in header.keys() | stored.keys() if header.get(key) != stored.get(key)), None)
        if differing:
            raise ValueError(f"{folder}: contains records with another {differing}; choose another folder or delete it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, header)
    return Records(folder, rows, header["piece"])


def read_records(folder: Path) -> Records:
    """Return the records of a folder that exists; ValueError if its header is damaged."""
    header = _read_header(folder / HEADER)
    return Records(folder, header["rows"], header["piece"])


def _read_header(path: Path) -> dict[str, Any]:
    header = read_json(path, WAY_OUT)
    if not all(type(header.get(key)) is int and header[key] >= least for key, least in (("rows", 0), ("piece", 1))):
        raise ValueError(f"{path}: no valid number of rows; {WAY_OUT}")
    return header


def _chunk_size(rows: int, world: int) -> int:
    """Rows per chunk of new records: at most a 16th of them, and equally many chunks for each process."""
    most = min(max(rows // 16, SMALLEST), LARGEST)
    share = -(-rows // world)
    return most if world == 1 else max(1, -(-share // -(-share // most))) if share else most
