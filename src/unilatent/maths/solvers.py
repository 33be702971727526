"""Samplers as functions: (denoise, z, times, path, noise) -> z.

denoise(z, t) returns the clean estimate at the float time t; z (B, ...) is noise at times[0]; times is a decreasing
float64 CPU tensor. All but `dopri5` take fixed steps, so a sample never depends on the other samples in its batch.
noise() returns new N(0, 1) noise of z's shape from each sample's own random number stream; only `ancestral` and
`restarting` call it.

They return z at times[-1]. On a path with sigma(0) > 0, that is a noisy z_0.
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
    """The signature of every solver."""

    def __call__(
        self, denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None
    ) -> Tensor: ...


def euler(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """Euler's method in t: first order, one evaluation per step."""
    for t, s in _pairs(times):
        z = z + (s - t) * path.velocity(z, denoise(z, t), t)
    return z


def heun(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """Heun's method: second order, two evaluations per step; one in a last step that ends at sigma = 0."""
    for t, s in _pairs(times):
        v = path.velocity(z, denoise(z, t), t)
        z_euler = z + (s - t) * v
        if path.sigma(torch.tensor(s)) > 0:
            z = z + (s - t) / 2 * (v + path.velocity(z_euler, denoise(z_euler, s), s))
        else:
            z = z_euler
    return z


def ddim(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """DDIM: first order, exact if the clean estimate is constant over a step (Song et al. 2021a)."""
    for t, s in _pairs(times):
        z = _towards(z, denoise(z, t), t, s, path)
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order in log-SNR, one evaluation per step.

    Steps from pure noise or to sigma = 0, where log-SNR is infinite, are first order.
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
    """Ancestral sampling: z_s ~ p(z_s | z_t, x = clean estimate) (Ho et al. 2020), one evaluation per step.

    share: interpolates the log-variance between its lower bound (0), exact if x is known, and its upper bound (1),
        exact if x ~ N(0, 1). Hoogeboom et al. 2023 use 0.2.
    """
    assert noise is not None, "ancestral sampling needs noise at every step"
    logsnr = path.logsnr(times).tolist()
    alpha, sigma = path.alpha(times).tolist(), path.sigma(times).tolist()
    for i, (t, _) in enumerate(_pairs(times)):
        gain = -math.expm1(logsnr[i] - logsnr[i + 1])  # 1 - SNR_t / SNR_s
        factor = alpha[i] * sigma[i + 1] ** 2 / (alpha[i + 1] * sigma[i] ** 2)
        z = factor * z + alpha[i + 1] * gain * denoise(z, t)
        z = z + math.sqrt(gain) * sigma[i] ** share * sigma[i + 1] ** (1 - share) * noise().to(z)
    return z


def dopri5(
    denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None,
    rtol: float = 1e-3, atol: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Adaptive Dormand-Prince (torchdiffeq) between the first and the last of `times`; no evaluation lies outside.

    Step sizes depend on the whole batch: a sample changes slightly with the other samples in it.
    """
    from torchdiffeq import odeint

    def field(t: Tensor, z: Tensor) -> Tensor:
        return path.velocity(z, denoise(z, float(t)), float(t))

    ends = times[[0, -1]].to(device=z.device, dtype=z.dtype)
    return odeint(field, z, ends, method="dopri5", rtol=rtol, atol=atol, options={"step_t": ends[-1:]})[-1]


def ending_clean(solver: Solver) -> Solver:
    """Return the solver with its last step replaced: it returns the clean estimate at the last time before the end.

    On the probability-flow ODE the two differ by O(t^2) at that time t, so the order of convergence stays; fixed steps
    need as many evaluations. A clamped velocity (`LinearPath.min_time`) leaves noise in its last steps, this does not.
    Only for paths that end at sigma = 0; ValueError on others, where z at the end is noisy.
    """

    def solve(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
        if path.sigma(times[-1]) > 0:
            raise ValueError(
                "denoise_to_zero: true, but this model's latents keep noise at t = 0, which its decoder expects; set "
                "it to false"
            )
        if len(times) > 2:
            z = solver(denoise, z, times[:-1], path, noise)
        return denoise(z, float(times[-2]))

    return solve


def restarting(solver: Solver, restarts: int, interval: tuple[float, float]) -> Solver:
    """Return the solver with `restarts` returns to noise (Xu et al. 2023, arXiv 2306.14878, who take solvers of the
    ODE): when it has come down to the lower end of the interval of times, noise is added up to the upper end, and the
    steps between the two are taken again.

    The distribution of an exact denoiser stays as it is. With a trained one, noise covers the errors of the steps
    before, and new steps make smaller ones, since they begin closer to data. The ends are the nearest times of the
    grid, at least one step apart, so that few steps widen the interval. `dpmpp_2m` begins anew at each end.
    """

    def solve(denoise: Denoise, z: Tensor, times: Tensor, path: NoisePath, noise: Noise | None = None) -> Tensor:
        assert noise is not None, "restarts need noise"
        lower, upper = ((times - end).abs().argmin().item() for end in interval)
        lower = max(lower, 1)
        upper = min(upper, lower - 1)
        again = times[upper : lower + 1]
        z = solver(denoise, z, times[: lower + 1], path, noise)
        for _ in range(restarts):
            z = solver(denoise, _noisier(z, again[-1], again[0], path, noise), again, path, noise)
        return solver(denoise, z, times[lower:], path, noise) if lower < len(times) - 1 else z

    return solve


def _noisier(z: Tensor, t: Tensor, s: Tensor, path: NoisePath, noise: Noise) -> Tensor:
    """Draw z_s from its distribution given z_t, s > t."""
    factor = float(path.alpha(s) / path.alpha(t))
    variance = float(path.sigma(s) ** 2 - (factor * path.sigma(t)) ** 2)
    return factor * z + math.sqrt(max(variance, 0.0)) * noise().to(z)


SOLVERS: dict[str, Solver] = {
    "euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "ancestral": ancestral, "dopri5": dopri5,
}  # fmt: skip

ADAPTIVE = ("dopri5",)
"""Solvers whose number of evaluations depends on the batch."""


def find_solver(name: str) -> Solver:
    """Return the solver of that name; ValueError lists all names."""
    if name not in SOLVERS:
        raise ValueError(f"unknown; use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _pairs(times: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(times.tolist()))


def _towards(z: Tensor, clean: Tensor, t: float, s: float, path: NoisePath) -> Tensor:
    """Move z_t to time s with the clean estimate and the noise it implies unchanged."""
    return path.add_noise(clean, path.noise_of(z, clean, t), s)
