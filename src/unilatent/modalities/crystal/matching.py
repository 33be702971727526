"""Equality of crystals by pymatgen's structure matcher, with the tolerances of the literature, in limited time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._atoms.bounded import ask
from . import pairs
from .lattices import cell_matrix, elongated
from .validity import composition

MOST_CANDIDATES = 300
"""Most crystals of equal composition and size with which one is compared: those with the most similar cells."""
FEW_ATOMS = 20
"""Structures of at most so many atoms are compared in this process, which takes at most seconds."""
SECONDS = 60.0
"""Time limit of an operation on larger ones, in a process of its own."""


class GaveUpError(Exception):
    """An operation that took longer than SECONDS."""


def structure(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """Return a pymatgen Structure of arrays (N,), (N, 3), (6,); types of 0 are padding."""
    atoms = types > 0
    matrix = cell_matrix(np.asarray(lattice, np.float64))
    return pairs.structure(types[atoms].tolist(), np.asarray(fractional, np.float64)[atoms], matrix)


def _bounded(operation: str, *structures: Any) -> Any:
    """Do an operation of `pairs`; GaveUpError if it takes too long."""
    if max(map(len, structures)) <= FEW_ATOMS:
        return pairs.OPERATIONS[operation](*structures)
    request = {"operation": operation, "structures": list(map(pairs.plain, structures))}
    found = ask(pairs.__file__, request, SECONDS)
    if found is None:
        raise GaveUpError
    result = found["result"]
    return pairs.structure(**result) if isinstance(result, dict) else result


def distance(made: Any, truth: Any) -> float:
    """Return the root mean square displacement between two structures; NaN if they do not match.

    Its unit is the cube root of the volume per atom. GaveUpError if it takes too long.
    """
    if elongated(made.lattice.matrix):
        return float("nan")
    found = _bounded("distance", made, truth)
    return float("nan") if found is None else found


GAVE_UP = "gave up"
"""In place of a structure whose reduction took too long."""


class KnownCrystals:
    """Crystals indexed by composition, to look others up; each is reduced at most once."""

    def __init__(self, types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray):
        """types (S, N), fractional (S, N, 3), lattice (S, 6)."""
        self.arrays = types, fractional, lattice
        self.rows: dict[object, list[int]] = defaultdict(list)
        for row, row_types in enumerate(types):
            self.rows[composition(row_types)].append(row)
        self.reduced: dict[int, Any] = {}

    def has(self, one: Any, its_composition: object) -> bool:
        """Return whether a reduced structure equals one of these crystals; GaveUpError if that takes too long."""
        candidates = [self._reduced(row) for row in self.rows.get(its_composition, ())]
        if matches_any(one, [candidate for candidate in candidates if not isinstance(candidate, str | None)]):
            return True
        if any(isinstance(candidate, str) for candidate in candidates):
            raise GaveUpError
        return False

    def _reduced(self, row: int) -> Any:
        """The reduced structure of a crystal, None if there is none, or GAVE_UP."""
        if row not in self.reduced:
            try:
                self.reduced[row] = reduced(*(array[row] for array in self.arrays))
            except GaveUpError:
                self.reduced[row] = GAVE_UP
        return self.reduced[row]


def reduced(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """Return the primitive, Niggli reduced structure; None if pymatgen fails, or the cell is too long for it.

    GaveUpError if it takes too long.
    """
    if elongated(cell_matrix(np.asarray(lattice, np.float64))):
        return None
    return _bounded("reduced", structure(types, fractional, lattice))


def matches_any(one: Any, candidates: Sequence[Any]) -> bool:
    """Return whether a reduced structure equals one of the candidates; only MOST_CANDIDATES of them are compared.

    GaveUpError if none is found and a comparison took too long.
    """
    candidates = [candidate for candidate in candidates if len(candidate) == len(one)]
    if len(candidates) > MOST_CANDIDATES:
        candidates.sort(key=lambda candidate: _cell_difference(candidate, one))
    given_up = False
    for candidate in candidates[:MOST_CANDIDATES]:
        try:
            if _bounded("fits", one, candidate):
                return True
        except GaveUpError:
            given_up = True
    if given_up:
        raise GaveUpError
    return False


def distinct(structures: Sequence[Any], compositions: Sequence[object]) -> tuple[list[int], list[int]]:
    """Return the indices of the distinct ones among reduced structures, and of those that were given up.

    Distinct is the first of each group of equal ones. One that was given up is in no group.
    """
    firsts: list[int] = []
    given_up: list[int] = []
    firsts_of: dict[object, list[int]] = defaultdict(list)
    for row, (one, its_composition) in enumerate(zip(structures, compositions, strict=True)):
        try:
            if not matches_any(one, [structures[first] for first in firsts_of[its_composition]]):
                firsts_of[its_composition].append(row)
                firsts.append(row)
        except GaveUpError:
            given_up.append(row)
    return firsts, given_up


def _cell_difference(one: Any, other: Any) -> float:
    """Return how much the shapes of two cells differ, regardless of their volumes."""
    shapes = [np.array([*np.log(np.array(s.lattice.abc) / s.volume ** (1 / 3)), *np.radians(s.lattice.angles)])
              for s in (one, other)]  # fmt: skip
    return float(np.abs(shapes[0] - shapes[1]).sum())
