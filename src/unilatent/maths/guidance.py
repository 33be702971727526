"""Classifier-free guidance, as a wrapper around a denoiser; solvers need no knowledge of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..types import Conditioning

Denoise = Callable[[Tensor, float], Tensor]
ConditionalDenoise = Callable[[Tensor, float, Conditioning], Tensor]


def is_guided(t: float, interval: tuple[float, float]) -> bool:
    """Return whether low < t < high, compared in float32; high = 1 includes t = 1."""
    low, at, high = torch.tensor([interval[0], t, interval[1]], dtype=torch.float32).tolist()
    return low < at and (at < high or high >= 1)


def classifier_free(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    null: Conditioning,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    project: Callable[[Tensor], Tensor] | None = None,
) -> Denoise:
    """Return a denoiser with estimates u + scale (c - u), c conditional and u unconditional (Ho & Salimans 2022).

    scale: 0 is unconditional, 1 conditional (one evaluation each), above 1 guided (both, in one batch of 2 B).
    interval: (low, high) in t; outside it the conditional estimate at every scale, one evaluation (Kynkaanniemi et al.
        2024). (0, 1) is no interval: scale 0 is then unconditional at t = 0 too.
    project: None if `denoise` returns projected estimates, which are then combined ("norm_first"). Otherwise `denoise`
        returns raw estimates, which are combined and then projected ("guidance_first"). It is applied without guidance
        too, so a solver always receives projected estimates.
    """
    if scale < 0:
        raise ValueError(f"guidance_scale: {scale} must not be negative (0 unconditional, 1 conditional, > 1 guided)")
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval: {low} {high} must satisfy 0 <= low < high <= 1 (t = 0 clean, t = 1 noise)"
        )
    finish = project or (lambda estimate: estimate)
    both = cond.cat(null)
    everywhere = scale == 0 and low == 0 and high == 1

    def guided(z: Tensor, t: float) -> Tensor:
        if scale == 1 or not (everywhere or is_guided(t, interval)):
            return finish(denoise(z, t, cond))
        if scale == 0:
            return finish(denoise(z, t, null))
        conditional, unconditional = denoise(z.repeat(2, *[1] * (z.ndim - 1)), t, both).chunk(2)
        return finish(unconditional + scale * (conditional - unconditional))

    return guided
