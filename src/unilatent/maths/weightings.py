"""Loss weights w(t) that multiply |x - x_hat|^2, the squared error of the clean estimate.

exp(logsnr) |x - x_hat|^2 = |eps - eps_hat|^2, so a weight here is one on the noise's error times exp(logsnr).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .paths import NoisePath


def velocity(t: Tensor, min_time: float = 0.05) -> Tensor:
    """1 / max(t, min_time)^2: the linear path's velocity error (UNITE's flow loss, clamp as in the authors' code)."""
    return t.clamp(min=min_time) ** -2


def elbo(t: Tensor, path: NoisePath) -> Tensor:
    """-logsnr' / 2 exp(logsnr): nats of the unweighted bound (Unified Latents, Eq. 3; w = 1 on the noise's error).

    Finite where logsnr is; summed over dimensions and t ~ U[0, 1) it is the rate between the path's ends.
    """
    return -path.dlogsnr(t) / 2 * path.logsnr(t).exp()


def sigmoid(t: Tensor, path: NoisePath, bias: float) -> Tensor:
    """-logsnr' / 2 exp(bias) sigmoid(logsnr - bias): sigmoid(bias - logsnr) on the noise's error (UL, Eq. 4, Fig. 3).

    Low noise is discounted. Unlike exp(logsnr) sigmoid(bias - logsnr), which it equals, it overflows nowhere.
    """
    return -path.dlogsnr(t) / 2 * math.exp(bias) * torch.sigmoid(path.logsnr(t) - bias)
