"""Systems of atoms as a data set: padded samples, with a class label and a scalar property taken from columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import BadSample, Dataset
from .systems import Systems


@dataclass(frozen=True)
class Classes:
    """The values of a column that serve as classes, and the names of these classes.

    The repr is part of `SystemsDataset.fingerprint`: do not rename the class or its fields.
    """

    column: str
    values: tuple[float, ...]
    names: tuple[str, ...]


def classes_of(column: str, *parts: Systems) -> Classes:
    """Return every value of a column in ascending order, over all parts.

    ValueError if a part lacks the column, a value is unknown (NaN), or a value is not a whole number >= 0.
    """
    known = [part.columns[column] for part in parts if len(part) and column in part.columns]
    if len(known) < sum(len(part) > 0 for part in parts):
        columns = sorted({name for part in parts for name in part.columns})
        raise ValueError(
            f"data.label_column: {column!r} is not among the data's columns: {', '.join(columns) or 'none'}"
        )
    values = np.unique(np.concatenate(known)) if known else np.zeros(0)
    if np.isnan(values).any():
        raise ValueError(f"data.label_column: {column!r} is unknown for some systems; leave those out of the data")
    for part in parts:
        labels = part.columns[column] if len(part) else np.zeros(0)
        if len(bad := np.flatnonzero((labels < 0) | (labels % 1 != 0))):
            name, value = part.names[bad[0]], labels[bad[0]]
            raise ValueError(
                f"data.label_column: {column!r} of {name} is {value:g}, not a whole number; choose a column of classes"
            )
    return Classes(column, tuple(values.tolist()), tuple(f"{value:g}" for value in values))


QUANTILES = 21
"""Number of quantiles of a property stored with a model: one every 5 % of the training systems."""


@dataclass(frozen=True)
class Property:
    """A column of numbers that samples can be conditioned on, with its statistics over the training systems.

    The repr is part of `SystemsDataset.fingerprint`: do not rename the class or its fields.
    """

    column: str
    mean: float
    std: float
    quantiles: tuple[float, ...]

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)


def property_of(column: str, train: Systems) -> Property:
    """Return a column as a property; ValueError if the column does not exist or has no known number."""
    if column not in train.columns:
        known = ", ".join(sorted(train.columns)) or "none"
        raise ValueError(f"data.property_column: {column!r} is not among the data's columns: {known}")
    return property_from(column, train.columns[column])


def property_from(column: str, values: np.ndarray) -> Property:
    """Return the property with these values, NaN where unknown; ValueError if none is known."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not len(known):
        raise ValueError(f"data.property_column: {column!r} is unknown for every training system; choose another")
    quantiles = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return Property(column, float(known.mean()), float(known.std()), tuple(quantiles.tolist()))


class SystemsDataset(Dataset):
    """Systems as samples: dicts without a batch axis, padded to N = `max_atoms`.

    Every sample has `types` (N,) int64. A free system also has `positions` (N, 3) about their mean; a periodic one has
    `fractional` (N, 3) and `lattice` (6,). A system that is too large or has an element outside `elements` raises
    BadSample when it is read.
    """

    def __init__(
        self, systems: Systems, max_atoms: int, elements: Sequence[int] | None = None, classes: Classes | None = None,
        scalar: Property | None = None,
    ):  # fmt: skip
        """classes: gives each sample a value `labels`. scalar: gives it a value `properties`, NaN where unknown."""
        self.systems, self.max_atoms, self.classes, self.scalar = systems, max_atoms, classes, scalar
        self.elements = None if elements is None else frozenset(elements)
        self.starts = systems.starts
        self.columns = tuple(systems.columns)
        self.facts = {} if classes is None else {"labels": {"class_names": classes.names}}
        if scalar is not None:
            self.facts["properties"] = scalar.facts

    def __len__(self) -> int:
        return len(self.systems)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        systems, atoms = self.systems, slice(self.starts[index], self.starts[index + 1])
        types, coordinates = systems.types[atoms], systems.coordinates[atoms]
        self._check_types(types, systems.names[index])
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
        if self.scalar is not None:
            number = float(systems.columns[self.scalar.column][index])
            values["properties"] = number if np.isfinite(number) else float("nan")
        return sample, values

    def numbers_of(self, index: int) -> dict[str, float]:
        return {name: float(values[index]) for name, values in self.systems.columns.items()}

    def _check_types(self, types: np.ndarray, name: str) -> None:
        if len(types) > self.max_atoms:
            raise BadSample(
                f"system {name}: {len(types)} atoms, but modality.max_atoms is {self.max_atoms}; leave it out, or "
                f"train with modality.max_atoms={len(types)}"
            )
        if self.elements is not None and (unknown := set(types.tolist()) - self.elements):
            raise BadSample(
                f"system {name}: atomic number {min(unknown)} is not in modality.elements; leave it out, or add the "
                "element and train again"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is read. Names of systems are not."""
        s = self.systems
        digest = hashlib.sha256(repr((self.max_atoms, self.classes)).encode())
        columns = [] if self.classes is None else [s.columns[self.classes.column]]
        if self.scalar is not None:
            digest.update(repr(self.scalar).encode())
            columns.append(s.columns[self.scalar.column])
        for array in [s.sizes, s.types, s.coordinates, *([] if s.lattice is None else [s.lattice]), *columns]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
