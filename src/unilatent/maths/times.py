"""Distributions of training times, and time grids for sampling. t = 0 is clean, t = 1 is noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shift(t: Tensor, factor: float) -> Tensor:
    """Shift times towards noise (factor > 1) or data (factor < 1) with fixed end points: f t / (f t + 1 - t).

    UNITE's "alpha = 0.5" (t = 1 clean) is factor 2 here.
    """
    if factor <= 0:
        raise ValueError(f"shift: factor {factor} must be positive")
    return factor * t / (factor * t + (1 - t))


def logit_normal(normals: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Map standard normal numbers n to times in (0, 1): sigmoid(mean + std n), computed in float64."""
    return torch.sigmoid(mean + std * normals.double()).float()


def stratified(positions: Tensor, shift: int, draw: int = 0) -> Tensor:
    """Return low-discrepancy times (B,) in [0, 1): (shift / 2^64 + position m) mod 1. Float32, 24 bits.

    positions: int64 (B,).

    A time depends on its own position only. Consecutive positions cover [0, 1) evenly, whatever their number, and so
    does any batch, however it is divided among processes. Each time is U[0, 1) if shift is uniform below 2^64. m is a
    metallic mean, the golden ratio for draw 0, 1 + sqrt(2) for draw 1, ...: two draws for the same positions cover the
    unit square evenly.
    """
    metallic = (draw + 1 + math.sqrt((draw + 1) ** 2 + 4)) / 2
    step = int(metallic % 1 * 2**64)
    place = positions * _signed(step) + _signed(shift)  # modulo 2^64
    return (place >> 40 & 0xFFFFFF) / 2**24


def _signed(number: int) -> int:
    """The int64 that is congruent to a number modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def grid(num_inference_steps: int, factor: float = 1.0) -> Tensor:
    """Return num_inference_steps + 1 shifted sampling times from 1 to 0, float64 on the CPU.

    The Euler solver evaluates the network at every time but the last.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: {num_inference_steps} must be at least 1")
    return shift(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), factor)
