"""Laws of the training time, and time grids for sampling. t = 0 is clean, t = 1 is noise."""

from __future__ import annotations

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


def stratified(uniforms: Tensor, offset: Tensor) -> Tensor:
    """Low-discrepancy times: (offset + rank / B) mod 1 over a batch, ranks given by the order of `uniforms` (B,).

    Each time is U[0, 1) when `offset` (scalar) is; together they cover [0, 1) evenly (Kingma et al. 2021).
    """
    ranks = uniforms.argsort().argsort().to(uniforms.dtype)
    return (offset + ranks / len(uniforms)) % 1.0


def grid(num_inference_steps: int, factor: float = 1.0) -> Tensor:
    """Sampling times from 1 to 0: num_inference_steps + 1 of them, shifted; float64 on the CPU.

    An Euler solver makes one evaluation at every time but the last.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: {num_inference_steps} must be at least 1")
    return shift(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), factor)
