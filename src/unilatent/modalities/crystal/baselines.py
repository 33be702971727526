"""What metrics of crystals are compared with: real crystals, and these with random coordinates, elements or noise."""

from __future__ import annotations

import numpy as np

from ...maths.streams import seed_of
from ...records import Rows

REAL = "held-out real"
RANDOM_COORDINATES = "random coordinates in true cells"
RANDOM_ELEMENTS = "random elements on true sites"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""types (S, N), fractional (S, N, 3), lattice (S, 6)."""


def of_key(baselines: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    """Return the numbers of one metric in baselines: baseline -> key -> number."""
    return {name: values[key] for name, values in baselines.items() if key in values}


def has(rows: Rows | None) -> bool:
    """Whether there are crystals with features."""
    return rows is not None and len(rows) > 0 and "valid" in rows


def arrays_in(rows: Rows | None, limit: int | None = None) -> Arrays:
    """Return the first crystals of stored rows; None: all."""
    assert rows is not None
    count = len(rows) if limit is None else limit
    types, fractional, lattice = (rows.first(key, count).numpy() for key in ("types", "fractional", "lattice"))
    return types, fractional, lattice


def random_coordinates(fractional: np.ndarray) -> np.ndarray:
    """Return uniform fractional coordinates of the same shape, the same in every call."""
    return np.random.default_rng(seed_of("crystal controls", "places")).random(fractional.shape)


def random_elements(types: np.ndarray) -> np.ndarray:
    """Replace the elements of each crystal by as many different ones, drawn from all that occur in the set."""
    rng = np.random.default_rng(seed_of("crystal controls", "elements"))
    pool = np.unique(types[types > 0])
    drawn = np.zeros_like(types)
    for row, row_types in enumerate(types):
        elements = np.unique(row_types[row_types > 0])
        for old, new in zip(elements, rng.choice(pool, len(elements), replace=len(pool) < len(elements)), strict=True):
            drawn[row][row_types == old] = new
    return drawn


def with_noise(real: Arrays, lengths: float, coordinates: float) -> Arrays:
    """Add Gaussian noise, the same in every call.

    lengths: relative standard deviation of a, b and c. coordinates: standard deviation of fractional coordinates.
    """
    rng = np.random.default_rng(seed_of("crystal controls", "noise"))
    types, fractional, lattice = real
    scale = np.ones_like(lattice)
    scale[:, :3] += lengths * rng.standard_normal((len(lattice), 3))
    return types, (fractional + coordinates * rng.standard_normal(fractional.shape)) % 1, lattice * scale
