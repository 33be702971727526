"""Metrics that tell new crystals from random ones: known structure types, distances to neighbours, energy and forces.

Validity hardly does: most random coordinates pass it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...progress import Progress, no_progress
from .._atoms.bounded import ask_all
from .._atoms.files import CORES
from .._atoms.metrics import wasserstein
from ..base import Evidence, Metric, Row, Space
from . import potential, structure_types, validity
from .baselines import (
    RANDOM_COORDINATES,
    RANDOM_ELEMENTS,
    REAL,
    Arrays,
    arrays_in,
    has,
    random_coordinates,
    random_elements,
)
from .lattices import cell_matrix

EVALUATION_EXTRA = "pip install 'unilatent[atoms-eval]'"
TYPED = 1000
"""Most training crystals whose structure types are known, and most samples that are compared with them."""
TYPED_CONTROLS = 100
"""Most crystals in a baseline of structure types."""
CONTROLS = 2000
"""Most crystals in a baseline of distances."""
FEW, MORE = 2, 3
"""Cells of at most so many atoms are often of a known type whatever their coordinates are; those of more hardly."""
JUDGED = 500
"""Samples whose energy is computed, the first ones."""
JUDGED_CONTROLS = 100
"""Most crystals in a baseline of energies."""
SECONDS = 60.0
"""Time limit of the energy of one crystal."""
LEAST_VOLUME = 2.0
"""Cubic Angstrom per atom below which no energy is computed. Dense solids have 5; a cell of a tenth has so many
neighbours that a potential takes gigabytes."""
HEAVIEST = 94
"""The last element that CHGNet knows."""


def spoiled(real: Arrays) -> dict[str, Arrays]:
    """Return the baselines by name: real crystals, and these with random coordinates and with random elements."""
    types, fractional, lattice = real
    return {
        REAL: real, RANDOM_COORDINATES: (types, random_coordinates(fractional), lattice),
        RANDOM_ELEMENTS: (random_elements(types), fractional, lattice),
    }  # fmt: skip


def spread(crystals: Arrays, count: int) -> Arrays:
    """Return at most `count` crystals, spread evenly over all."""
    rows = np.arange(min(count, len(crystals[0]))) * len(crystals[0]) // max(min(count, len(crystals[0])), 1)
    types, fractional, lattice = (array[rows] for array in crystals)
    return types, fractional, lattice


# ---- structure types -------------------------------------------------------------------------------------------------


class KnownTypeShare(Metric):
    """Share of new crystals whose structure type some training crystal has, whatever their elements are."""

    space = "structures"
    gives = ("known_type", "known_type_of_more")
    most_samples = TYPED

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if samples is None or train is None or not has(samples) or not has(train):
            return []
        made, compared = arrays_in(samples, TYPED), spread(arrays_in(train), TYPED)
        sets = {"": made}
        if held_out is not None and has(held_out):
            sets |= spoiled(arrays_in(held_out, TYPED_CONTROLS))
        formulas = {structure_types.formula_of(types) for crystals in sets.values() for types in crystals[0]}
        wanted = np.array([structure_types.formula_of(types) in formulas for types in compared[0]])
        total = int(wanted.sum()) + sum(len(crystals[0]) for crystals in sets.values())
        done: Callable[[int], object] = lambda more: evidence.progress("structure types", more, total)  # noqa: E731
        known = structure_types.KnownTypes(tuple(array[wanted] for array in compared), done)
        found = {name: known.among(crystals, done) for name, crystals in sets.items()}
        of = evidence.describe_train("crystals")
        if len(compared[0]) < (evidence.train_total or len(train)):
            of = f"{len(compared[0]):,} training crystals"
        remarks = [
            (known.undecided, "training", "unknown"), (int(np.isnan(found[""]).sum()), "new", "of no known type"),
        ]  # fmt: skip
        slow = "".join(
            f"; {count:,} {which} ones took longer than {structure_types.SECONDS:g} s, counted as {verdict}"
            for count, which, verdict in remarks if count
        )  # fmt: skip
        larger = {name: (crystals[0] > 0).sum(1) > FEW for name, crystals in sets.items()}
        rows = []
        for key, title in (("known_type", ""), ("known_type_of_more", f", in cells of {MORE} atoms or more")):
            chosen = {name: values[larger[name]] if title else values for name, values in found.items()}
            shares = {name: 100 * float((one == 1).mean()) for name, one in chosen.items() if len(one)}
            if "" in shares:
                name = f"of a structure type of {of}{title}{slow}"
                rows.append(Row(key, name, shares.pop(""), "%", "higher", shares, headline=False))
        # Small cells are often of a known type wherever their atoms are: larger ones tell more, if there are any.
        return [*rows[:-1], replace(rows[-1], headline=True)] if rows else []


# ---- distances -------------------------------------------------------------------------------------------------------


class Neighbours(Metric):
    """Wasserstein distances of the distances from atoms to their nearest neighbours, to training crystals: in Angstrom,
    and as a share of the sum of the two elements' atomic radii."""

    space = "structures"
    gives = ("neighbours_w1", "contacts_w1")

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if samples is None or train is None or not has(samples) or not has(train):
            return []
        real = nearest(arrays_in(train))
        made = arrays_in(samples)
        built, total = int(validity.structure_checks(*made)[0].sum()), len(made[0])
        of = "" if built == total else f" (of the {built:,} cells of {total:,} that can be built)"
        sets = {"": made}
        if held_out is not None and has(held_out):
            sets |= spoiled(arrays_in(held_out, CONTROLS))
        found = {name: nearest(crystals) for name, crystals in sets.items()}
        titles = ("distance to the nearest neighbour", "the same, as a share of the sum of two atomic radii")
        rows = []
        for place, (key, title, unit) in enumerate(zip(self.gives, titles, ("A", ""), strict=True)):
            values = {name: wasserstein(both[place], real[place]) for name, both in found.items()}
            name = f"{title}, W1 to training{of}"
            rows.append(Row(key, name, values.pop(""), unit, "lower", values, headline=not place))
        return rows


def nearest(crystals: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of all atoms to their nearest neighbours in Angstrom, and these by the sum of both atomic
    radii where these are known; cells that cannot be built are left out."""
    built = validity.structure_checks(*crystals)[0]
    types, fractional, lattice = (array[built] for array in crystals)
    apart, which = validity.neighbours(types > 0, fractional, cell_matrix(lattice))
    atoms = types > 0
    radii = _radii()[types.astype(np.int64)]
    sums = radii + np.take_along_axis(radii, which.clip(min=0), 1)
    shares = apart[atoms] / sums[atoms]
    return apart[atoms], shares[np.isfinite(shares)]


@cache
def _radii() -> np.ndarray:
    """(100,) atomic radii in Angstrom (Slater 1964); NaN where unknown, as of noble gases."""
    from pymatgen.core import Element

    radii = [Element.from_Z(z).atomic_radius for z in range(1, 100)]
    return np.array([np.nan, *(np.nan if radius is None else float(radius) for radius in radii)])


# ---- energy ----------------------------------------------------------------------------------------------------------


class Potential(Space):
    """Stores nothing: the energy is computed of the crystals, which are stored anyway. Only on request."""

    name = "chgnet"
    needs = ("structures",)
    on_request = True
    details: Mapping[str, str] = MappingProxyType({"potential": f"chgnet-{potential.WEIGHTS}"})

    def prepare(self, device: torch.device) -> None:
        require_chgnet()

    def __call__(self, data: Any) -> dict[str, Tensor]:
        return {}


def require_chgnet() -> None:
    """ValueError names the extra to install, if CHGNet is missing."""
    from importlib.util import find_spec

    if find_spec("chgnet") is None:
        raise ValueError(f"energies and forces need the package chgnet: {EVALUATION_EXTRA}")


class PotentialEnergy(Metric):
    """Medians over new crystals of the energy and of the forces by CHGNet, unrelaxed.

    Medians, since the energy of an impossible crystal has no bound; those that are not computed count as infinite.
    """

    space = "chgnet"
    gives = ("chgnet_force", "chgnet_energy")
    most_samples = JUDGED

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, held_out = evidence.samples, evidence.held_out
        if samples is None or not has(samples):
            return []
        sets = {"": arrays_in(samples, JUDGED)}
        if held_out is not None and has(held_out):
            sets |= spoiled(arrays_in(held_out, JUDGED_CONTROLS))
        total = sum(len(crystals[0]) for crystals in sets.values())

        def tell(what: str, more: int, _: int) -> None:
            evidence.progress(what, more, total)

        found = {name: energies(crystals, tell) for name, crystals in sets.items()}
        lost = int(np.isinf(found[""]).any(1).sum())
        remark = f"; {lost:,} of {len(found['']):,} have none, counted as infinite" if lost else ""
        by = f"(CHGNet {potential.WEIGHTS}, not relaxed)"
        titles = (
            (1, f"median force on an atom {by}{remark}", "eV/A"),
            (0, f"median energy per atom, less that of the elements {by}{remark}", "eV"),
        )
        rows = []
        for key, (place, title, unit) in zip(self.gives, titles, strict=True):
            medians = {name: float(np.median(values[:, place])) for name, values in found.items()}
            rows.append(Row(key, title, medians.pop(""), unit, "lower", medians))
        return rows


def energies(crystals: Arrays, progress: Progress = no_progress) -> np.ndarray:
    """Return (S, 2): energy per atom in eV less that of the elements, and root mean square force in eV per Angstrom.

    Infinite for crystals that are not valid structures, are too dense, have elements that CHGNet does not know, or take
    longer than SECONDS.
    """
    types, fractional, lattice = crystals
    built, closest, _ = validity.structure_checks(*crystals)
    matrices = cell_matrix(np.where(built[:, None], lattice, [1, 1, 1, 90, 90, 90]))
    volumes = abs(np.linalg.det(matrices)) / (types > 0).sum(1).clip(min=1)
    possible = built & (closest >= validity.CLOSEST) & (volumes >= LEAST_VOLUME) & (types.max(1) <= HEAVIEST)
    rows = np.flatnonzero(possible)
    told = partial(progress, "energies by CHGNet")
    told(len(types) - len(rows), len(types))
    requests = [
        {
            "types": types[row][types[row] > 0].tolist(), "matrix": matrices[row].tolist(),
            "fractional": np.asarray(fractional[row], np.float64)[types[row] > 0].tolist(),
        }
        for row in rows
    ]  # fmt: skip
    answers = ask_all(potential.__file__, requests, SECONDS, CORES, lambda more: told(more, len(types)))
    found = np.full((len(types), 2), np.inf)
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, list):
            found[row] = answer
    return np.where(np.isfinite(found), found, np.inf)
