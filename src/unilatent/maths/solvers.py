"""Samplers as free functions: (denoise, z, times, path, noise) -> z.

denoise(z, t) returns the clean estimate at the float time t; z (B, ...) starts as noise at times[0]; times is a
decreasing float64 CPU tensor. All but `dopri5` take fixed steps, so a sample never depends on its batch mates.
noise() returns a fresh N(0, 1) like z, from each sample's own stream; only `ancestral` asks for any.

What is returned is z at times[-1]. On a path whose clean end keeps noise (sigma(0) > 0), that is a noisy z_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .guidance import Denoise
from .paths import NoisePath

Noise = Callable[[], Tensor]


class Solver(Protocol):
    """What every function below is."""

    def __call__(
        self, denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None
    ) -> Tensor: ...


def euler(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """First order in t; one evaluation a step."""
    for t, s in _pairs(times):
        z = z + (s - t) * path.velocity(z, denoise(z, t), t)
    return z


def heun(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """Second order (trapezium); two evaluations a step, one in a last step that ends without noise."""
    for t, s in _pairs(times):
        v = path.velocity(z, denoise(z, t), t)
        z_euler = z + (s - t) * v
        if path.sigma(torch.tensor(s)) > 0:
            z = z + (s - t) / 2 * (v + path.velocity(z_euler, denoise(z_euler, s), s))
        else:
            z = z_euler
    return z


def ddim(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """First order, exact when the clean estimate is constant over a step (Song et al. 2021a)."""
    for t, s in _pairs(times):
        z = _towards(z, denoise(z, t), t, s, path)
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order in log-SNR; one evaluation a step.

    Steps that start from pure noise or end without noise, where log-SNR is infinite, are first order.
    """
    logsnr = path.logsnr(times)
    previous: Tensor | None = None
    for i, (t, s) in enumerate(_pairs(times)):
        clean = denoise(z, t)
        estimate = clean
        if previous is not None and torch.isfinite(logsnr[i - 1 : i + 2]).all():
            ratio = float((logsnr[i] - logsnr[i - 1]) / (logsnr[i + 1] - logsnr[i]))
            estimate = clean + (clean - previous) / (2 * ratio)
        z, previous = _towards(z, estimate, t, s, path), clean
    return z


def ancestral(
    denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None,
    share: float = 0.2,
) -> Tensor:  # fmt: skip
    """Steps drawn from p(z_s | z_t, x = the clean estimate) (Ho et al. 2020); one evaluation a step.

    share: the log-variance goes that far from its lower bound, right when x is certain, to its upper bound, right
        when x ~ N(0, 1); Hoogeboom et al. 2023 take 0.2.
    """
    assert noise is not None, "this solver draws noise at every step"
    logsnr = path.logsnr(times).tolist()
    alpha, sigma = path.alpha(times).tolist(), path.sigma(times).tolist()
    for i, (t, _) in enumerate(_pairs(times)):
        news = -math.expm1(logsnr[i] - logsnr[i + 1])  # 1 - SNR_t / SNR_s
        kept = alpha[i] * sigma[i + 1] ** 2 / (alpha[i + 1] * sigma[i] ** 2)
        z = kept * z + alpha[i + 1] * news * denoise(z, t)
        z = z + math.sqrt(news) * sigma[i] ** share * sigma[i + 1] ** (1 - share) * noise().to(z)
    return z


def dopri5(
    denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None,
    rtol: float = 1e-3, atol: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Adaptive Dormand-Prince through torchdiffeq; `times` gives only the ends, which no evaluation passes.

    Step sizes come from the whole batch: a sample changes slightly with its batch mates.
    """
    from torchdiffeq import odeint

    def field(t: Tensor, z: Tensor) -> Tensor:
        return path.velocity(z, denoise(z, float(t)), float(t))

    ends = times[[0, -1]].to(device=z.device, dtype=z.dtype)
    return odeint(field, z, ends, method="dopri5", rtol=rtol, atol=atol, options={"step_t": ends[-1:]})[-1]


SOLVERS: dict[str, Solver] = {
    "euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "ancestral": ancestral, "dopri5": dopri5,
}  # fmt: skip


def find_solver(name: str) -> Solver:
    """The solver of that name; ValueError names those that exist."""
    if name not in SOLVERS:
        raise ValueError(f"unknown; use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _pairs(times: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(times.tolist()))


def _towards(z: Tensor, clean: Tensor, t: float, s: float, path: NoisePath) -> Tensor:
    """From z_t to time s along the line that keeps this clean estimate and its noise."""
    return path.add_noise(clean, path.noise_of(z, clean, t), s)
