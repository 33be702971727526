"""Conversions between prediction types at z_t = alpha x + sigma eps and the clean estimate.

    clean       x
    noise       eps
    velocity    c eps - s x, (c, s) = path.direction(t): alpha eps - sigma x on LogSNRPath, eps - x on LinearPath
    score       -eps / sigma, the gradient of log p(z_t | x)

Divisions by alpha or sigma use max(., SMALLEST): at alpha = 0 a noise prediction does not determine x, and at sigma = 0
x does not determine the noise. Velocities are exact everywhere. Results are at least float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .paths import NoisePath, expand

Prediction = Literal["clean", "noise", "velocity", "score"]
SMALLEST = 1e-5


def to_clean(kind: Prediction, prediction: Tensor, z: Tensor, t: Tensor | float, path: NoisePath) -> Tensor:
    """Return the clean estimate (B, ...) for a prediction (B, ...) at z (B, ...) and t, scalar or (B,)."""
    prediction, z = _precise(prediction), _precise(z)
    s = expand(t, z)
    alpha, sigma = path.alpha(s).to(z.dtype), path.sigma(s).to(z.dtype)
    if kind == "clean":
        return prediction
    if kind == "velocity":
        return path.direction(s)[0].to(z.dtype) * z - sigma * prediction
    noise = prediction if kind == "noise" else -sigma * prediction
    return (z - sigma * noise) / alpha.clamp(min=SMALLEST)


def from_clean(kind: Prediction, clean: Tensor, z: Tensor, t: Tensor | float, path: NoisePath) -> Tensor:
    """Return the prediction that corresponds to a clean estimate: the inverse of `to_clean`."""
    clean, z = _precise(clean), _precise(z)
    s = expand(t, z)
    alpha, sigma = path.alpha(s).to(z.dtype), path.sigma(s).to(z.dtype)
    if kind == "clean":
        return clean
    noise = (z - alpha * clean) / sigma.clamp(min=SMALLEST)
    if kind == "velocity":
        noise_factor, clean_factor = (factor.to(z.dtype) for factor in path.direction(s))
        return noise_factor * noise - clean_factor * clean
    return noise if kind == "noise" else -noise / sigma.clamp(min=SMALLEST)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
