"""Lattices in numpy: parameters and vectors, Niggli reduction, distances over periodic images."""

from __future__ import annotations

import itertools

import numpy as np

EXTRA = "pip install 'unilatent[atoms]'"
ELONGATED = 1e6
"""Cube of a cell's longest side by its volume, above which pymatgen's reduction takes too much time and memory."""
STEPS = np.array(list(itertools.product((-1, 0, 1), repeat=3)), np.float64)
"""(27, 3) offsets of a cell and its neighbours; index 13 is the cell itself."""


def require() -> None:
    """Raise ValueError if pymatgen is not installed."""
    try:
        import pymatgen.core  # noqa: F401
    except ImportError:
        raise ValueError(f"crystals need the package pymatgen: {EXTRA}") from None


def cell_matrix(lattice: np.ndarray) -> np.ndarray:
    """Convert parameters (..., 6), lengths in Angstrom and angles in degrees, to row vectors (..., 3, 3), float64.

    pymatgen's convention: c along z, a in the xz plane.
    """
    a, b, c, alpha, beta, gamma = np.moveaxis(np.asarray(lattice, np.float64), -1, 0)
    alpha, beta, gamma = np.radians(alpha), np.radians(beta), np.radians(gamma)
    value = (np.cos(alpha) * np.cos(beta) - np.cos(gamma)) / (np.sin(alpha) * np.sin(beta))
    star = np.arccos(np.clip(value, -1, 1))
    zero = np.zeros_like(a)
    rows = (
        (a * np.sin(beta), zero, a * np.cos(beta)),
        (-b * np.sin(alpha) * np.cos(star), b * np.sin(alpha) * np.sin(star), b * np.cos(alpha)),
        (zero, zero, c),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def wrap(fractional: np.ndarray) -> np.ndarray:
    """Wrap fractional coordinates into [0, 1), also after rounding to float32."""
    wrapped = np.asarray(fractional % 1, np.float32)
    wrapped[wrapped >= 1] = 0
    return wrapped


def elongated(matrix: np.ndarray, most: float = ELONGATED) -> bool:
    """Whether the longest side of a cell (3, 3), cubed, is more than `most` times its volume. To reduce it, pymatgen
    lists four times as many points of its lattice; by default: so many that it cannot."""
    return bool(np.linalg.norm(matrix, axis=1).max() ** 3 > most * abs(np.linalg.det(matrix)))


def niggli(matrix: np.ndarray, fractional: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the Niggli reduced cell as parameters (6,) float32, and the coordinates (n, 3) in it, float32.

    matrix: (3, 3) row vectors. keep: leave a cell that is already reduced unchanged; pymatgen may choose another one
    with equal parameters.
    """
    from pymatgen.core import Lattice

    original = Lattice(matrix)
    reduced = original.get_niggli_reduced_lattice()
    if keep and np.allclose(original.parameters, reduced.parameters, rtol=1e-5, atol=1e-5):
        return np.array(original.parameters, np.float32), wrap(np.asarray(fractional))
    coordinates = np.asarray(fractional, np.float64) @ matrix @ np.linalg.inv(reduced.matrix)
    coordinates[abs(coordinates - coordinates.round()) < 1e-6] = 0
    return np.array(reduced.parameters, np.float32), wrap(coordinates)


def distances_of(matrix: np.ndarray, fractional: np.ndarray) -> np.ndarray:
    """Return distances (n, n) to the nearest image in a reduced cell (3, 3); the diagonal is to an atom's own image."""
    apart = fractional[:, None] - fractional
    vectors = (apart - apart.round())[:, :, None] + STEPS  # (n, n, 27, 3)
    squares = np.square(vectors @ matrix).sum(-1)
    squares[np.arange(len(fractional)), np.arange(len(fractional)), 13] = np.inf  # itself
    return np.sqrt(squares.min(-1))


def vacuum(matrix: np.ndarray, fractional: np.ndarray) -> tuple[float, int]:
    """Return the widest layer without atoms (Angstrom, between planes of a cell's faces), and the index of its axis."""
    heights = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=0)
    places = np.sort(np.asarray(fractional, np.float64) % 1, axis=0)
    gaps = np.diff(places, axis=0, append=places[:1] + 1).max(0) * heights
    return float(gaps.max()), int(gaps.argmax())
