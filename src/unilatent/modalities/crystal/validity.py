"""Is it a crystal: cells that can be built, atoms that keep their distance, charges that can balance.

The rules of CDVAE (Xie et al., 2022), as FlowMM and ADiT apply them, for many crystals at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...atoms.elements import SYMBOLS
from .lattices import EXTRA, STEPS, cell_matrix

ANGLES = (50.0, 130.0)
"""Degrees, between which all angles of a cell lie."""
SMALLEST = 0.1
"""Cubic Angstrom of a cell."""
CLOSEST = 0.5
"""Angstrom between two atoms."""
OXIDATION_STATES = "smact14"
"""SMACT's set of oxidation states that reproduces the decisions of its version 2.6, the literature's; the default of
version 4 does not."""
MOST_COMBINATIONS = 10**7
"""Of oxidation states, beyond which a composition counts as invalid, as in ADiT."""
PAIRS = 20_000
"""That are looked at together."""

Composition = tuple[tuple[int, int], ...]
"""(atomic number, count) by atomic number, divided by the greatest common divisor of the counts."""


@dataclass(frozen=True)
class Verdict:
    """Of S crystals, each (S,). constructed: the cell can be built. structure: and its atoms keep apart.
    composition: charges can balance, or all are metals. nearest, own: Angstrom from an atom to the nearest other one
    (infinite of one atom), and to its own image."""

    constructed: np.ndarray
    structure: np.ndarray
    composition: np.ndarray
    nearest: np.ndarray
    own: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        return self.structure & self.composition


def judge(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> Verdict:
    """Of types (S, N), 0 where there is no atom, coordinates (S, N, 3) and lattices (S, 6)."""
    constructed, nearest, own = shapes(types, fractional, lattice)
    balanced = np.array([charges_balance(composition(row)) for row in types], bool).reshape(len(types))
    return Verdict(constructed, constructed & (nearest >= CLOSEST), constructed & balanced, nearest, own)


def shapes(
    types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Whether each cell can be built, and two distances in it; see Verdict."""
    lattice = np.asarray(lattice, np.float64).reshape(-1, 6)
    lengths, angles = lattice[:, :3], lattice[:, 3:]
    fine = (angles > ANGLES[0]) & (angles < ANGLES[1]) & (lengths > 0)
    built = fine.all(1) & (types > 0).any(1) & np.isfinite(fractional).all((1, 2))
    safe = np.where(built[:, None], lattice, [1, 1, 1, 90, 90, 90])
    matrix = cell_matrix(safe)
    built &= abs(np.linalg.det(matrix)) >= SMALLEST
    matrix[~built] = np.eye(3)
    nearest, own = distances(types > 0, np.where(built[:, None, None], fractional, 0), matrix)
    return built, np.where(built, nearest, 0), np.where(built, own, 0)


def distances(atoms: np.ndarray, fractional: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least distance between two atoms of each crystal (S,), infinite of one atom, and from an atom to its own image.

    atoms: (S, N) bool. Over all images, as pymatgen's distance matrix: cells are reduced first, so that 27 suffice.
    """
    reduced = shortest(matrix)
    cartesian = np.asarray(fractional, np.float64) @ matrix
    places = cartesian @ np.linalg.inv(reduced)
    images = STEPS @ reduced  # (S, 27, 3)
    squares = np.square(images).sum(-1)  # (S, 27)
    own = np.sqrt(np.delete(squares, 13, axis=1).min(1))
    nearest = np.full(len(matrix), np.inf)
    both = np.triu(np.ones((atoms.shape[1], atoms.shape[1]), bool), 1) & atoms[:, :, None] & atoms[:, None, :]
    systems, first, second = np.nonzero(both)
    for start in range(0, len(systems), PAIRS):
        which = systems[start : start + PAIRS]
        apart = places[which, first[start : start + PAIRS]] - places[which, second[start : start + PAIRS]]
        vectors = np.einsum("pi,pij->pj", apart - apart.round(), reduced[which])  # (P, 3)
        inner = np.einsum("pj,psj->ps", vectors, images[which])
        least = (np.square(vectors).sum(-1)[:, None] + 2 * inner + squares[which]).min(1)
        np.minimum.at(nearest, which, np.sqrt(least.clip(min=0)))
    return nearest, own


def shortest(matrix: np.ndarray) -> np.ndarray:
    """The same lattices (S, 3, 3) by short vectors: each of the three, and their sums, is as short as adding or
    taking away others makes it (Semaev's reduction, which ends in Minkowski's)."""
    reduced = np.array(matrix, np.float64)
    for _ in range(100):
        order = np.square(reduced).sum(-1).argsort(-1)
        reduced = np.take_along_axis(reduced, order[..., None], 1)
        before = reduced.copy()
        a, b = reduced[:, 0], reduced[:, 1]
        times = np.round((a * b).sum(-1) / (a * a).sum(-1))
        reduced[:, 1] = b - times[:, None] * a
        plane = reduced[:, :2]
        coefficients = np.linalg.solve(plane @ plane.swapaxes(1, 2), plane @ reduced[:, 2, :, None])[..., 0]
        options = coefficients.round()[:, None] + NEIGHBOURS  # (S, 9, 2)
        thirds = reduced[:, 2, None] - options @ plane  # (S, 9, 3)
        best = np.square(thirds).sum(-1).argmin(-1)
        reduced[:, 2] = np.take_along_axis(thirds, best[:, None, None], 1)[:, 0]
        shorter = np.square(before).sum(-1) > np.square(reduced).sum(-1) * (1 + 1e-9)
        if not shorter.any():
            break
    return reduced


NEIGHBOURS = np.array([(i, j) for i in (0, -1, 1) for j in (0, -1, 1)], np.float64)


def composition(types: Iterable[int]) -> Composition:
    """Of one crystal; zeros are no atoms."""
    counts = Counter(int(z) for z in types if z)
    least = math.gcd(*counts.values())
    return tuple(sorted((z, count // least) for z, count in counts.items()))


def require_smact() -> None:
    """ValueError where SMACT is not installed."""
    try:
        import smact.screening  # noqa: F401
    except ImportError:
        raise ValueError(f"the validity of compositions needs the package SMACT: {EXTRA}") from None


@lru_cache(maxsize=500_000)
def charges_balance(of: Composition) -> bool:
    """By SMACT: one element, or all metals, or oxidation states that sum to zero with the more electronegative
    elements negative."""
    import pymatgen.core
    from smact import element_dictionary
    from smact.screening import metals, smact_validity

    if not of:
        return False
    symbols = [SYMBOLS[z] for z, _ in of]
    if len(of) == 1 or all(symbol in metals for symbol in symbols):
        return True
    states = [element.oxidation_states_smact14 for element in element_dictionary(symbols).values()]
    if math.prod(len(some or ()) for some in states) > MOST_COMBINATIONS:
        return False
    formula = pymatgen.core.Composition(dict(zip(symbols, (count for _, count in of), strict=True)))
    return bool(
        smact_validity(
            formula, use_pauling_test=True, include_alloys=True, oxidation_states_set=OXIDATION_STATES
        )
    )  # fmt: skip
