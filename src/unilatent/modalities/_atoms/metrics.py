"""Measures of samples and reconstructions that apply to every kind of system."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def type_accuracy(made: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    """Return the percentage (B,) of atoms with the right element in each reconstruction, float64 on the CPU.

    made, data: reconstructions and originals, with `types` (B, N), 0 at padding.
    """
    types = data["types"].cpu()
    atoms = types > 0
    right = ((made["types"].cpu() == types) & atoms).sum(1)
    return 100 * (right / atoms.sum(1).clamp(min=1)).double()


def wasserstein(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Return the 1-Wasserstein distance between two samples of numbers (n,) and (m,); infinity if either is empty."""
    from scipy.stats import wasserstein_distance

    if not len(a) or not len(b):
        return float("inf")
    return float(wasserstein_distance(np.asarray(a, np.float64), np.asarray(b, np.float64)))
