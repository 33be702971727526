"""Systems of atoms as a data set: padded samples, and out of columns class labels and a number to ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


QUANTILES = 21
"""Of a property, kept with a model: every twentieth of the training systems."""


@dataclass(frozen=True)
class Property:
    """A column whose numbers samples can be asked for, and those of the training systems."""

    column: str
    mean: float
    std: float
    quantiles: tuple[float, ...]

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)


def property_of(column: str, train: Systems) -> Property:
    """ValueError if systems have no such column, or none of them has a number there."""
    if column not in train.columns:
        known = ", ".join(sorted(train.columns)) or "none"
        raise ValueError(f"data.property_column: {column!r} is not among the data's columns: {known}")
    return property_from(column, train.columns[column])


def property_from(column: str, values: np.ndarray) -> Property:
    """Of these numbers, NaN where there is none; ValueError if there is not one."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not len(known):
        raise ValueError(f"data.property_column: {column!r} is unknown of every training system; choose another")
    quantiles = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return Property(column, float(known.mean()), float(known.std()), tuple(quantiles.tolist()))


class SystemsDataset(Dataset):
    """Samples are dicts without a batch axis, padded to `max_atoms`: `types` (N,) and of a molecule `positions` (N, 3),
    centred, of a crystal `fractional` (N, 3) and `lattice` (6,)."""

    def __init__(
        self, systems: Systems, max_atoms: int, elements: Sequence[int] | None = None, classes: Classes | None = None,
        asked: Property | None = None,
    ):  # fmt: skip
        """asked: the number that samples can be asked for."""
        self.systems, self.max_atoms, self.classes, self.asked = systems, max_atoms, classes, asked
        self.elements = None if elements is None else frozenset(elements)
        self.starts = systems.starts
        self.columns = tuple(systems.columns)
        self.facts = {} if classes is None else {"labels": {"class_names": classes.names}}
        if asked is not None:
            self.facts["properties"] = asked.facts

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
        values: dict[str, Any] = {}
        if self.classes is not None:
            values["labels"] = self.classes.values.index(float(systems.columns[self.classes.column][index]))
        if self.asked is not None:
            number = float(systems.columns[self.asked.column][index])
            values["properties"] = number if np.isfinite(number) else float("nan")
        return sample, values

    def numbers_of(self, index: int) -> dict[str, float]:
        return {name: float(values[index]) for name, values in self.systems.columns.items()}

    def _refuse(self, types: np.ndarray, name: str) -> None:
        if len(types) > self.max_atoms:
            raise BadSample(
                f"system {name}: {len(types)} atoms, but modality.max_atoms is {self.max_atoms}; leave it out, or "
                f"train with modality.max_atoms={len(types)}"
            )
        if self.elements is not None and (unknown := set(types.tolist()) - self.elements):
            raise BadSample(
                f"system {name}: atomic number {min(unknown)} is not in modality.elements; leave it out, or train with "
                "it there"
            )

    @property
    def fingerprint(self) -> str:
        """Of all that is read; names of systems are not."""
        s = self.systems
        digest = hashlib.sha256(repr((self.max_atoms, self.classes)).encode())
        columns = [] if self.classes is None else [s.columns[self.classes.column]]
        if self.asked is not None:
            digest.update(repr(self.asked).encode())
            columns.append(s.columns[self.asked.column])
        for array in [s.sizes, s.types, s.coordinates, *([] if s.lattice is None else [s.lattice]), *columns]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
