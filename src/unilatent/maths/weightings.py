"""Loss weights w(t) for the squared error of the clean estimate, |x - x_hat|^2.

|eps - eps_hat|^2 = exp(logsnr) |x - x_hat|^2: a weight here is the weight on the noise error times exp(logsnr).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .paths import NoisePath


def velocity(t: Tensor, min_time: float = 0.05) -> Tensor:
    """Return 1 / max(t, min_time)^2: the velocity error on the linear path (UNITE's flow loss, clamped as in the
    authors' code)."""
    return t.clamp(min=min_time) ** -2


def elbo(t: Tensor, path: NoisePath) -> Tensor:
    """Return -logsnr' / 2 exp(logsnr): nats of the unweighted ELBO (Unified Latents, Eq. 3; w = 1 on the noise error).

    Finite where logsnr is. The loss, summed over dimensions and averaged over t ~ U[0, 1), is the rate between t = 0
    and t = 1.
    """
    return -path.dlogsnr(t) / 2 * path.logsnr(t).exp()


def sigmoid(t: Tensor, path: NoisePath, bias: float) -> Tensor:
    """Return -logsnr' / 2 exp(bias) sigmoid(logsnr - bias): sigmoid(bias - logsnr) on the noise error (UL, Eq. 4,
    Fig. 3).

    It reduces the weight of low noise levels. exp(logsnr) sigmoid(bias - logsnr) is equal but would overflow.
    """
    return -path.dlogsnr(t) / 2 * math.exp(bias) * torch.sigmoid(path.logsnr(t) - bias)
