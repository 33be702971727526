"""Systems of atoms as a data set: padded samples, and class labels out of a column."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modalities.base import BadSample, Dataset
from .systems import Systems


@dataclass(frozen=True)
class Classes:
    """Values of a column, each of them a class, and the classes' names."""

    column: str
    values: tuple[float, ...]
    names: tuple[str, ...]


def classes_of(column: str, *parts: Systems) -> Classes:
    """Every value that a column has, in order; ValueError if no system has that column, one does not know it, or it is
    no whole number there."""
    known = [part.columns[column] for part in parts if len(part) and column in part.columns]
    if len(known) < sum(len(part) > 0 for part in parts):
        columns = sorted({name for part in parts for name in part.columns})
        raise ValueError(
            f"data.label_column: {column!r} is not among the data's columns: {', '.join(columns) or 'none'}"
        )
    values = np.unique(np.concatenate(known)) if known else np.zeros(0)
    if np.isnan(values).any():
        raise ValueError(f"data.label_column: {column!r} is unknown of some systems; leave those out of the data")
    for part in parts:
        own = part.columns[column] if len(part) else np.zeros(0)
        if len(bad := np.flatnonzero((own < 0) | (own % 1 != 0))):
            name, value = part.names[bad[0]], own[bad[0]]
            raise ValueError(
                f"data.label_column: {column!r} of {name} is {value:g}, not a whole number; choose a column of classes"
            )
    return Classes(column, tuple(values.tolist()), tuple(f"{value:g}" for value in values))


class SystemsDataset(Dataset):
    """Samples are dicts without a batch axis, padded to `max_atoms`: `types` (N,) and of a molecule `positions` (N, 3),
    centred, of a crystal `fractional` (N, 3) and `lattice` (6,)."""

    def __init__(
        self, systems: Systems, max_atoms: int, elements: Sequence[int] | None = None, classes: Classes | None = None
    ):
        self.systems, self.max_atoms, self.classes = systems, max_atoms, classes
        self.elements = None if elements is None else frozenset(elements)
        self.starts = systems.starts
        self.facts = {} if classes is None else {"labels": {"class_names": classes.names}}

    def __len__(self) -> int:
        return len(self.systems)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        systems, atoms = self.systems, slice(self.starts[index], self.starts[index + 1])
        types, coordinates = systems.types[atoms], systems.coordinates[atoms]
        self._refuse(types, systems.names[index])
        sample = {"types": torch.from_numpy(np.pad(types.astype(np.int64), (0, self.max_atoms - len(types))))}
        periodic = systems.lattice is not None
        if not periodic:
            coordinates = coordinates - coordinates.astype(np.float64).mean(0).astype(np.float32)
        padded = np.pad(coordinates, ((0, self.max_atoms - len(types)), (0, 0)))
        sample["fractional" if periodic else "positions"] = torch.from_numpy(padded)
        if systems.lattice is not None:
            sample["lattice"] = torch.from_numpy(systems.lattice[index].copy())
        if self.classes is None:
            return sample, {}
        label = self.classes.values.index(float(systems.columns[self.classes.column][index]))
        return sample, {"labels": label}

    def _refuse(self, types: np.ndarray, name: str) -> None:
        if len(types) > self.max_atoms:
            raise BadSample(f"system {name}: {len(types)} atoms, but modality.max_atoms is {self.max_atoms}; raise it")
        if self.elements is not None and (unknown := set(types.tolist()) - self.elements):
            raise BadSample(f"system {name}: atomic number {min(unknown)} is not in modality.elements; add it")

    @property
    def fingerprint(self) -> str:
        """Of all that is read; names of systems are not."""
        s = self.systems
        digest = hashlib.sha256(repr((self.max_atoms, self.classes)).encode())
        columns = [] if self.classes is None else [s.columns[self.classes.column]]
        for array in [s.sizes, s.types, s.coordinates, *([] if s.lattice is None else [s.lattice]), *columns]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
