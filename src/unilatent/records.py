"""Rows of named tensors, one row a sample: what evaluation keeps of a set, in memory, on disk, or only its moments.

On disk:
    header.json                         what made the rows, and how many there will be
    rows_00000000_00000512.safetensors  rows [0, 512) of every tensor, and so on

A piece appears whole or not at all, and which rows it holds depends on neither batch size nor number of processes: an
interrupted set is completed, piece by piece, by whoever comes next. Reading holds one piece at a time.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .faults import reach
from .files import read_json, write_json
from .maths.frechet import Moments, RunningMoments
from .types import join_values

HEADER = "header.json"
SMALLEST, LARGEST = 64, 512
"""Rows of a piece: a 16th of the set between these two, so that several processes find work in a small set."""
WAY_OUT = "delete the folder, the same command makes it again"


class Rows(ABC):
    """A set of samples, of each of which some tensors are known."""

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
    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's rows in order, some at a time."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def known_moments(self) -> list[str]:
        """Tensors of which moments are known already."""
        return sorted(self._moments)

    def __getitem__(self, name: str) -> Tensor:
        """All rows of a tensor, in memory."""
        return self.first(name, self.size)

    def first(self, name: str, count: int) -> Tensor:
        """At most the first `count` rows of a tensor."""
        parts, held = [], 0
        for piece in self.pieces(name):
            parts.append(piece)
            held += len(piece)
            if held >= count:
                break
        return join_values(parts)[:count]

    def moments(self, name: str) -> Moments:
        """Mean (D,) and covariance (D, D) of a tensor's rows in float64, read in pieces."""
        if name not in self._moments:
            running = RunningMoments()
            for piece in self.pieces(name):
                running.add(piece)
            self._moments[name] = running.moments()
        return self._moments[name]


class Held(Rows):
    """Rows in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(len(next(iter(tensors.values()))) if tensors else 0)
        self.tensors = dict(tensors)

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def pieces(self, name: str) -> Iterator[Tensor]:
        yield self.tensors[name]


class Statistics(Rows):
    """A set of which only moments are known; `size` is 0 where its number of samples is not."""

    def __init__(self, moments: dict[str, Moments], size: int = 0):
        super().__init__(size)
        self._moments = moments

    @property
    def names(self) -> list[str]:
        return []

    def pieces(self, name: str) -> Iterator[Tensor]:
        raise ValueError(f"{name}: only its mean and covariance are known of this reference, not its samples")


class Joined(Rows):
    """Several sets of tensors about the same samples; a name comes from the first that has it.

    moments: of tensors whose mean and covariance are known better than from these samples.
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

    def pieces(self, name: str) -> Iterator[Tensor]:
        return self._of(name).pieces(name)

    def moments(self, name: str) -> Moments:
        return self._moments[name] if name in self._moments else self._of(name).moments(name)

    def _of(self, name: str) -> Rows:
        return next(part for part in self.parts if name in part)


class Records(Rows):
    """Rows on disk, in a folder made by `open_records`; it need not be complete yet."""

    def __init__(self, folder: Path):
        header = read_json(folder / HEADER, WAY_OUT)
        if not all(type(header.get(key)) is int for key in ("rows", "piece")):
            raise ValueError(f"{folder / HEADER}: does not say how many rows there are; {WAY_OUT}")
        super().__init__(header["rows"])
        self.folder, self.piece = folder, header["piece"]

    @property
    def names(self) -> list[str]:
        if not self.size:
            return []
        return sorted(self._read(self.ranges[0], lambda file: file.keys()))

    def pieces(self, name: str) -> Iterator[Tensor]:
        for rows in self.ranges:
            yield self._read(rows, lambda file: file.get_tensor(name))

    @property
    def ranges(self) -> list[range]:
        """Rows of every piece."""
        return [range(first, min(first + self.piece, self.size)) for first in range(0, self.size, self.piece)]

    def missing(self, rank: int = 0, world: int = 1) -> list[range]:
        """Rows of the pieces that fall to a process and that nobody has made yet."""
        return [rows for rows in self.ranges[rank::world] if not self._path(rows).is_file()]

    def add(self, rows: range, tensors: dict[str, Tensor]) -> None:
        """A whole piece; every tensor has len(rows) rows."""
        assert rows in self.ranges and all(len(tensor) == len(rows) for tensor in tensors.values())
        reach("evaluate.piece", rows.start)
        path = self._path(rows)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)

    def _read(self, rows: range, what: Callable[[Any], Any]) -> Any:
        path = self._path(rows)
        try:
            with safe_open(path, framework="pt") as file:
                return what(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged ({' '.join(str(error).split())}); {WAY_OUT}") from None

    def _path(self, rows: range) -> Path:
        return self.folder / f"rows_{rows.start:08d}_{rows.stop:08d}.safetensors"


def open_records(folder: Path, rows: int, made_by: dict[str, object]) -> Records:
    """The records of a folder, to be completed; ValueError if something else made those that lie there.

    made_by: everything that decides the rows, as plain data. Several processes may call this at once.
    """
    piece = min(max(rows // 16, SMALLEST), LARGEST)
    header = json.loads(json.dumps({"rows": rows, "piece": piece, **made_by}))
    path = folder / HEADER
    if path.is_file():
        found = read_json(path, WAY_OUT)
        differing = next((key for key in header.keys() | found.keys() if header.get(key) != found.get(key)), None)
        if differing:
            raise ValueError(f"{folder}: holds records with another {differing}; choose another folder or delete it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, header)
    return Records(folder)
