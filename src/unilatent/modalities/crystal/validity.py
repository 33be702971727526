"""Validity of crystals: possible cells, distances between atoms, and charge balance.

The rules are those of CDVAE (Xie et al., 2022) as applied by FlowMM and ADiT, computed for many crystals at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .._atoms.elements import SYMBOLS
from .lattices import EXTRA, STEPS, cell_matrix

ANGLES = (50.0, 130.0)
"""Smallest and largest angle of a valid cell in degrees."""
SMALLEST = 0.1
"""Smallest volume of a valid cell in cubic Angstrom."""
CLOSEST = 0.5
"""Smallest distance between two atoms of a valid structure in Angstrom."""
OXIDATION_STATES = "smact14"
"""SMACT's set of oxidation states that reproduces the decisions of its version 2.6, which the literature uses; the
default set of version 4 does not."""
MOST_COMBINATIONS = 10**7
"""Combinations of oxidation states above which a composition counts as invalid, as in ADiT."""
PAIRS = 20_000
"""Pairs of atoms processed at a time."""
MOST_DISTANCES = 2_000_000
"""Distances held at a time."""

Composition = tuple[tuple[int, int], ...]
"""(atomic number, count) sorted by atomic number; counts are divided by their greatest common divisor."""


@dataclass(frozen=True)
class ValidityResult:
    """Validity of S crystals; every array is (S,).

    constructed: the cell is possible. structure: so is the distance between atoms. composition: the charges balance, or
    all elements are metals (False unless constructed). nearest: smallest distance in Angstrom between two atoms,
    infinite for a single atom. own_image: smallest distance from an atom to its own image.
    """

    constructed: np.ndarray
    structure: np.ndarray
    composition: np.ndarray
    nearest: np.ndarray
    own_image: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        return self.structure & self.composition


def validate(types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray) -> ValidityResult:
    """Return the validity of crystals: types (S, N), 0 at padding, fractional (S, N, 3) and lattice (S, 6)."""
    constructed, nearest, own_image = structure_checks(types, fractional, lattice)
    balanced = np.array([charges_balance(composition(row)) for row in types], bool).reshape(len(types))
    return ValidityResult(constructed, constructed & (nearest >= CLOSEST), constructed & balanced, nearest, own_image)


def structure_checks(
    types: np.ndarray, fractional: np.ndarray, lattice: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return `constructed`, `nearest` and `own_image` of ValidityResult; distances are 0 for impossible cells."""
    lattice = np.asarray(lattice, np.float64).reshape(-1, 6)
    lengths, angles = lattice[:, :3], lattice[:, 3:]
    possible = (angles > ANGLES[0]) & (angles < ANGLES[1]) & (lengths > 0)
    built = possible.all(1) & (types > 0).any(1) & np.isfinite(fractional).all((1, 2))
    safe = np.where(built[:, None], lattice, [1, 1, 1, 90, 90, 90])
    matrix = cell_matrix(safe)
    built &= abs(np.linalg.det(matrix)) >= SMALLEST
    matrix[~built] = np.eye(3)
    nearest, own_image = distances(types > 0, np.where(built[:, None, None], fractional, 0), matrix)
    return built, np.where(built, nearest, 0), np.where(built, own_image, 0)


def distances(atoms: np.ndarray, fractional: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest distance (S,) between two atoms, and that from an atom to its own image.

    atoms: (S, N) bool. matrix: (S, 3, 3). The minimum is over all periodic images, as in pymatgen's distance matrix:
    cells are reduced first, so that 27 images suffice. It is infinite for crystals of one atom.
    """
    nearest = np.full(len(matrix), np.inf)
    own_image = np.zeros(len(matrix))
    step = max(1, MOST_DISTANCES // max(atoms.shape[1] ** 2, 1))
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        between, own_image[part] = _between(atoms[part], fractional[part], matrix[part])
        nearest[part] = between.min((1, 2), initial=np.inf)
    return nearest, own_image


def _between(
    atoms: np.ndarray, fractional: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the distances (S, N, N) between different atoms, infinite elsewhere, and those (S,) of an atom to its
    image."""
    reduced = shortest(matrix)
    cartesian = np.asarray(fractional, np.float64) @ matrix
    coordinates = cartesian @ np.linalg.inv(reduced)
    images = STEPS @ reduced  # (S, 27, 3)
    squares = np.square(images).sum(-1)  # (S, 27)
    own_image = np.sqrt(np.delete(squares, 13, axis=1).min(1))
    between = np.full((*atoms.shape, atoms.shape[1]), np.inf)
    both = np.triu(np.ones((atoms.shape[1], atoms.shape[1]), bool), 1) & atoms[:, :, None] & atoms[:, None, :]
    systems, first, second = np.nonzero(both)
    for start in range(0, len(systems), PAIRS):
        which = systems[start : start + PAIRS]
        apart = coordinates[which, first[start : start + PAIRS]] - coordinates[which, second[start : start + PAIRS]]
        vectors = np.einsum("pi,pij->pj", apart - apart.round(), reduced[which])  # (P, 3)
        inner = np.einsum("pj,psj->ps", vectors, images[which])
        least = (np.square(vectors).sum(-1)[:, None] + 2 * inner + squares[which]).min(1)
        pairs = which, first[start : start + PAIRS], second[start : start + PAIRS]
        between[pairs] = between[pairs[0], pairs[2], pairs[1]] = np.sqrt(least.clip(min=0))
    return between, own_image


def neighbours(atoms: np.ndarray, fractional: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance (S, N) of each atom to its nearest neighbour, and the index (S, N) of that neighbour.

    atoms: (S, N) bool. matrix: (S, 3, 3). An image of an atom is a neighbour of it. Infinite, and -1, at padding.
    """
    count, most = atoms.shape
    nearest, which = np.full(atoms.shape, np.inf), np.full(atoms.shape, -1)
    step = max(1, MOST_DISTANCES // max(most * most, 1))
    for start in range(0, count, step):
        part = slice(start, start + step)
        between, own_image = _between(atoms[part], fractional[part], matrix[part])
        diagonal = np.arange(most)
        between[:, diagonal, diagonal] = np.where(atoms[part], own_image[:, None], np.inf)
        nearest[part] = between.min(-1)
        which[part] = np.where(np.isfinite(nearest[part]), between.argmin(-1), -1)
    return nearest, which


def shortest(matrix: np.ndarray) -> np.ndarray:
    """Return reduced vectors (S, 3, 3) of the same lattices (Semaev's algorithm, which gives a Minkowski reduction).

    Adding integer multiples of the other two makes none of the three vectors shorter.
    """
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
    """Return the composition of one crystal. Types of 0 are padding."""
    counts = Counter(int(z) for z in types if z)
    least = math.gcd(*counts.values())
    return tuple(sorted((z, count // least) for z, count in counts.items()))


def require_smact() -> None:
    """Raise ValueError if SMACT is not installed."""
    try:
        import smact.screening  # noqa: F401
    except ImportError:
        raise ValueError(f"the validity of compositions needs the package SMACT: {EXTRA}") from None


@lru_cache(maxsize=500_000)
def charges_balance(crystal_composition: Composition) -> bool:
    """Return whether SMACT finds a composition valid.

    It is valid if it has one element, if all elements are metals, or if oxidation states exist that sum to zero and in
    which the more electronegative elements are negative.
    """
    import pymatgen.core
    from smact import element_dictionary
    from smact.screening import metals, smact_validity

    if not crystal_composition:
        return False
    symbols = [SYMBOLS[z] for z, _ in crystal_composition]
    if len(symbols) == 1 or all(symbol in metals for symbol in symbols):
        return True
    states = [element.oxidation_states_smact14 for element in element_dictionary(symbols).values()]
    if math.prod(len(element_states or ()) for element_states in states) > MOST_COMBINATIONS:
        return False
    formula = pymatgen.core.Composition(dict(zip(symbols, (count for _, count in crystal_composition), strict=True)))
    return bool(
        smact_validity(
            formula, use_pauling_test=True, include_alloys=True, oxidation_states_set=OXIDATION_STATES
        )
    )  # fmt: skip
