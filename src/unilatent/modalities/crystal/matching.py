"""Equality of crystals by pymatgen's structure matcher, with the tolerances of the literature."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .lattices import cell_matrix, elongated
from .validity import composition

SITES, ANGLES, LENGTHS = 0.5, 10.0, 0.3
"""Tolerances: site distances relative to the cube root of the volume per atom, angles in degrees, relative lengths."""
MOST_CANDIDATES = 300
"""Most crystals of equal composition and size with which one is compared: those with the most similar cells."""


def structure(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """Return a pymatgen Structure of arrays (N,), (N, 3), (6,); types of 0 are padding."""
    from pymatgen.core import Lattice, Structure

    atoms = types > 0
    return Structure(
        Lattice(cell_matrix(np.asarray(lattice, np.float64))), types[atoms].tolist(),
        np.asarray(fractional, np.float64)[atoms],
    )  # fmt: skip


def matcher() -> Any:
    """Return a pymatgen StructureMatcher with the tolerances above."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(stol=SITES, angle_tol=ANGLES, ltol=LENGTHS)


def distance(made: Any, truth: Any) -> float:
    """Return the root mean square displacement between two structures; NaN if they do not match.

    Its unit is the cube root of the volume per atom.
    """
    if elongated(made.lattice.matrix):
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = matcher().get_rms_dist(made, truth)
        except Exception:  # cells that pymatgen cannot reduce: no match, as in the literature
            return float("nan")
    return float("nan") if result is None else float(result[0])


class KnownCrystals:
    """Crystals indexed by composition, to look others up; each is reduced at most once."""

    def __init__(self, types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray):
        """types (S, N), fractional (S, N, 3), lattice (S, 6)."""
        self.arrays = types, fractional, lattice
        self.rows: dict[object, list[int]] = defaultdict(list)
        for row, row_types in enumerate(types):
            self.rows[composition(row_types)].append(row)
        self.reduced: dict[int, Any] = {}
        self.matcher = matcher()

    def has(self, one: Any, its_composition: object) -> bool:
        """Return whether a reduced structure equals one of these crystals."""
        candidates = (self._reduced(row) for row in self.rows.get(its_composition, ()))
        return matches_any(self.matcher, one, [candidate for candidate in candidates if candidate is not None])

    def _reduced(self, row: int) -> Any:
        if row not in self.reduced:
            self.reduced[row] = reduced(*(array[row] for array in self.arrays))
        return self.reduced[row]


def reduced(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """Return the primitive, Niggli reduced structure; None if pymatgen fails, or the cell is too long for it."""
    if elongated(cell_matrix(np.asarray(lattice, np.float64))):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return structure(types, fractional, lattice).get_reduced_structure("niggli").get_primitive_structure()
        except Exception:  # the cell is no lattice
            return None


def matches_any(structure_matcher: Any, one: Any, candidates: Sequence[Any]) -> bool:
    """Return whether a reduced structure equals one of the candidates; only MOST_CANDIDATES of them are compared."""
    candidates = [candidate for candidate in candidates if len(candidate) == len(one)]
    if len(candidates) > MOST_CANDIDATES:
        candidates.sort(key=lambda candidate: _cell_difference(candidate, one))
    return any(fits(structure_matcher, one, candidate) for candidate in candidates[:MOST_CANDIDATES])


def fits(structure_matcher: Any, one: Any, other: Any) -> bool:
    """Return whether two reduced structures are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(structure_matcher.fit(one, other, skip_structure_reduction=True))
        except Exception:
            return False


def distinct(structures: Sequence[Any], compositions: Sequence[object]) -> list[int]:
    """Return the indices of the distinct ones among reduced structures: the first of each group of equal ones."""
    structure_matcher, firsts = matcher(), []
    firsts_of: dict[object, list[int]] = defaultdict(list)
    for row, (one, its_composition) in enumerate(zip(structures, compositions, strict=True)):
        if not matches_any(structure_matcher, one, [structures[first] for first in firsts_of[its_composition]]):
            firsts_of[its_composition].append(row)
            firsts.append(row)
    return firsts


def _cell_difference(one: Any, other: Any) -> float:
    """Return how much the shapes of two cells differ, regardless of their volumes."""
    shapes = [np.array([*np.log(np.array(s.lattice.abc) / s.volume ** (1 / 3)), *np.radians(s.lattice.angles)])
              for s in (one, other)]  # fmt: skip
    return float(np.abs(shapes[0] - shapes[1]).sum())
