"""Are two crystals the same: pymatgen's structure matcher, at the tolerances of the literature."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .lattices import cell_matrix
from .validity import composition

SITES, ANGLES, LENGTHS = 0.5, 10.0, 0.3
"""Tolerances: of sites in units of the cube root of an atom's volume, of angles in degrees, of lengths as a share."""
MOST_RIVALS = 300
"""Known crystals of the same composition and size that one is held against: those whose cells are most like its own."""


def structure(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """A pymatgen Structure of arrays (N,), (N, 3), (6,), where types of 0 are no atoms."""
    from pymatgen.core import Lattice, Structure

    atoms = types > 0
    return Structure(
        Lattice(cell_matrix(np.asarray(lattice, np.float64))), types[atoms].tolist(),
        np.asarray(fractional, np.float64)[atoms],
    )  # fmt: skip


def matcher() -> Any:
    """A pymatgen StructureMatcher."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(stol=SITES, angle_tol=ANGLES, ltol=LENGTHS)


def distance(made: Any, truth: Any) -> float:
    """Root mean square displacement in units of the cube root of an atom's volume; NaN where they do not match."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = matcher().get_rms_dist(made, truth)
        except Exception:  # of cells beyond what it can reduce: no match, as in the literature
            return float("nan")
    return float("nan") if found is None else float(found[0])


class Known:
    """Crystals by composition, each reduced once: what others are held against."""

    def __init__(self, types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray):
        """(S, N), (S, N, 3), (S, 6)."""
        self.arrays = types, fractional, lattice
        self.rows: dict[object, list[int]] = defaultdict(list)
        for row, kinds in enumerate(types):
            self.rows[composition(kinds)].append(row)
        self.reduced: dict[int, Any] = {}
        self.matcher = matcher()

    def has(self, one: Any, of: object) -> bool:
        """Whether a reduced structure of a composition fits one of them."""
        rivals = [self._reduced(row) for row in self.rows.get(of, ())]
        rivals = [rival for rival in rivals if rival is not None and len(rival) == len(one)]
        if len(rivals) > MOST_RIVALS:
            rivals.sort(key=lambda rival: _unlike(rival, one))
        return any(fits(self.matcher, one, rival) for rival in rivals[:MOST_RIVALS])

    def _reduced(self, row: int) -> Any:
        if row not in self.reduced:
            self.reduced[row] = reduced(*(array[row] for array in self.arrays))
        return self.reduced[row]


def reduced(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Any:
    """A primitive, Niggli reduced structure; None where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return structure(types, fractional, lattice).get_reduced_structure("niggli").get_primitive_structure()
        except Exception:  # of cells that are no lattice
            return None


def fits(judge: Any, one: Any, other: Any) -> bool:
    """Whether two reduced structures are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(judge.fit(one, other, skip_structure_reduction=True))
        except Exception:
            return False


def groups(structures: Sequence[Any], compositions: Sequence[object]) -> list[int]:
    """Of reduced structures, the first of every group that is the same: the distinct ones, in order."""
    judge, firsts = matcher(), []
    kinds: dict[object, list[int]] = defaultdict(list)
    for row, (one, of) in enumerate(zip(structures, compositions, strict=True)):
        rivals = [other for other in kinds[of] if len(structures[other]) == len(one)]
        if len(rivals) > MOST_RIVALS:
            rivals.sort(key=lambda other: _unlike(structures[other], one))
        if not any(fits(judge, one, structures[other]) for other in rivals[:MOST_RIVALS]):
            kinds[of].append(row)
            firsts.append(row)
    return firsts


def _unlike(one: Any, other: Any) -> float:
    """Of the shapes of two cells, whatever their volumes."""
    shapes = [np.array([*np.log(np.array(s.lattice.abc) / s.volume ** (1 / 3)), *np.radians(s.lattice.angles)])
              for s in (one, other)]  # fmt: skip
    return float(np.abs(shapes[0] - shapes[1]).sum())
