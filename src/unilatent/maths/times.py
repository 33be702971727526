"""Laws of the training time, and time grids for sampling. t = 0 is clean, t = 1 is noise."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def shift(t: Tensor, factor: float) -> Tensor:
    """Move times towards noise (factor > 1) or data (factor < 1), end points fixed: f t / (f t + 1 - t).

    UNITE's "alpha = 0.5" (t = 1 clean) is factor 2 here.
    """
    if factor <= 0:
        raise ValueError(f"shift: factor {factor} must be positive")
    return factor * t / (factor * t + (1 - t))


def logit_normal(normals: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normals: sigmoid(mean + std n), through float64."""
    return torch.sigmoid(mean + std * normals.double()).float()


def stratified(positions: Iterable[int], shift: int, draw: int = 0) -> Tensor:
    """Low-discrepancy times (B,) in [0, 1): (shift / 2^64 + position m) mod 1, a function of each position alone.

    Any run of positions covers [0, 1) evenly, whatever its length, and so any batch, however it is cut among
    processes; each time is U[0, 1) when shift is uniform below 2^64. m is a metallic mean: the golden ratio for draw 0,
    1 + sqrt(2) for draw 1, ...: two draws at one position are evenly spread over the square. Float32, 24 bits.
    """
    metallic = (draw + 1 + math.sqrt((draw + 1) ** 2 + 4)) / 2
    step = int(metallic % 1 * 2**64)
    return torch.tensor([((shift + position * step) % 2**64 >> 40) / 2**24 for position in positions])


def grid(num_inference_steps: int, factor: float = 1.0) -> Tensor:
    """Sampling times from 1 to 0: num_inference_steps + 1 of them, shifted; float64 on the CPU.

    An Euler solver makes one evaluation at every time but the last.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: {num_inference_steps} must be at least 1")
    return shift(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), factor)
