"""Noise paths (interpolants, noise schedules): z_t = alpha(t) x + sigma(t) eps, t = 0 clean and t = 1 noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def expand(t: Tensor | float, like: Tensor) -> Tensor:
    """Reshape a scalar or (B,) time to (B, 1, ..., 1), to broadcast against `like` (B, ...).

    All broadcasting of times in this package happens here. Floats become float64 scalars on the CPU, which combine with
    tensors on any device, so that closed forms are computed in float64.
    """
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else t


class NoisePath(ABC):
    """Closed forms of a noise path. Times are tensors of any shape; results have the same shape."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal coefficient."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise coefficient."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""

    @abstractmethod
    def feature(self, t: Tensor) -> Tensor:
        """Return the number that a network receives as the noise level."""

    @abstractmethod
    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (c, s) of the velocity c eps - s x that networks predict, with alpha c + sigma s = 1.

        It is dz/dt up to a factor.
        """

    def logsnr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), which decreases in t and is infinite where alpha or sigma is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def dlogsnr(self, t: Tensor) -> Tensor:
        """Return d logsnr / dt, negative everywhere."""
        return 2 * (self.dalpha(t) / self.alpha(t) - self.dsigma(t) / self.sigma(t))

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """Return z_t for x and eps (B, ...) at t, scalar or (B,)."""
        t = expand(t, x)
        return self.alpha(t).to(x.dtype) * x + self.sigma(t).to(x.dtype) * eps

    def noise_of(self, z: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the eps with z_t = alpha x + sigma eps; t > 0."""
        t = expand(t, z)
        return (z - self.alpha(t).to(z.dtype) * x) / self.sigma(t).to(z.dtype)

    def velocity(self, z: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Return dz/dt of the probability-flow ODE for the clean estimate x: alpha' x + sigma' eps."""
        s = expand(t, z)
        return self.dalpha(s).to(z.dtype) * x + self.dsigma(s).to(z.dtype) * self.noise_of(z, x, t)


@dataclass(frozen=True)
class LinearPath(NoisePath):
    """Rectified flow: alpha = 1 - t, sigma = t.

    min_time: the velocity is (z - x) / max(t, min_time). UNITE's authors use 0.05, in training and in sampling. The
    default only keeps t = 0 finite.
    """

    min_time: float = 1e-5

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def feature(self, t: Tensor) -> Tensor:
        """Return 1 - t: the signal coefficient, which is the time of UNITE's paper."""
        return 1 - t

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of eps - x."""
        return torch.ones_like(t), torch.ones_like(t)

    def velocity(self, z: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        return (z - x) / expand(t, z).clamp(min=self.min_time).to(z.dtype)


@dataclass(frozen=True)
class LogSNRPath(NoisePath):
    """Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr), with exact end points.

    start: log-SNR at t = 0; end: at t = 1; start > end.
    shape: "cosine" (logsnr = -2 log tan of an angle linear in t, Hoogeboom et al. 2023) or "linear" in t.
    """

    start: float = 10.0
    end: float = -10.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if self.start <= self.end:
            raise ValueError(f"LogSNRPath: start {self.start} must exceed end {self.end} (t = 0 is the clean end)")
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"LogSNRPath: shape {self.shape!r} is unknown; use 'cosine' or 'linear'")

    def _angles(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.start / 2)), math.atan(math.exp(-self.end / 2))

    def logsnr(self, t: Tensor) -> Tensor:
        if self.shape == "linear":
            return self.start + (self.end - self.start) * t
        a0, a1 = self._angles()
        return -2 * torch.tan(a0 + (a1 - a0) * t).log()

    def dlogsnr(self, t: Tensor) -> Tensor:
        if self.shape == "linear":
            return torch.full_like(t, self.end - self.start)
        a0, a1 = self._angles()
        return -4 * (a1 - a0) / torch.sin(2 * (a0 + (a1 - a0) * t))

    def alpha(self, t: Tensor) -> Tensor:
        return self.logsnr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.logsnr(t)).sigmoid().sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self.dlogsnr(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self.dlogsnr(t)

    def feature(self, t: Tensor) -> Tensor:
        """Return logsnr / 8."""
        return self.logsnr(t) / 8

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of alpha eps - sigma x (Salimans & Ho 2022)."""
        return self.alpha(t), self.sigma(t)
