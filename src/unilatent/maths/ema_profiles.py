"""EMA profiles over training time, and post-hoc EMA (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and appendix C).

A profile is a density over training time in steps, zero after its `end`. Its EMA weights are the integral of profile
times weights, where the weights of step i apply over (i - 1, i]. A linear combination of stored EMA snapshots
approximates the EMA weights of nearly any other profile. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 1 / math.sqrt(12)
"""Relative length (sigma_rel) of gamma = 0, the plain mean over all of training: the longest profile."""
RANK = 1e-13
"""Relative cutoff of singular values in the least-squares solution."""


@dataclass(frozen=True)
class PowerProfile:
    """Power function EMA, (gamma + 1) t^gamma / end^(gamma + 1), whose length grows with training (equation 1)."""

    gamma: float
    end: float

    @property
    def mass(self) -> float:
        """Total weight of the profile."""
        return 1.0


@dataclass(frozen=True)
class ExponentialProfile:
    """The usual EMA with a constant decay per step, restricted to trained weights.

    The initial weights have the share decay^end, which no profile over time can represent; the profile is the
    remainder, scaled to integrate to 1.
    """

    decay: float
    end: float

    @property
    def rate(self) -> float:
        """Decay rate -log(decay), in 1 / steps."""
        return -math.log(self.decay)

    @property
    def mass(self) -> float:
        """Share of trained weights in the EMA, before scaling to 1."""
        return -math.expm1(-self.rate * self.end)


Profile = PowerProfile | ExponentialProfile


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power profile with standard deviation sigma_rel * end (equation 126).

    sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) is a cubic in g; the result is its largest root, by the trigonometric
    formula. ValueError outside (0, 0.2887].
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(
            f"sigma_rel: {sigma_rel!r} is not the relative length of a power profile; use a number above 0 and at most "
            f"{LONGEST:.4f}"
        )
    s = sigma_rel**-2
    p = (16 - s) - 49 / 3
    q = 686 / 27 - 7 * (16 - s) / 3 + (12 - s)
    angle = math.acos(min(1.0, max(-1.0, 3 * q / (2 * p) * math.sqrt(-3 / p))))
    return max(0.0, 2 * math.sqrt(-p / 3) * math.cos(angle / 3) - 7 / 3)


def sigma_of(gamma: float) -> float:
    """Return the relative length sigma_rel of a power profile, gamma >= 0."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def decay_at(gamma: float, step: int) -> float:
    """Return beta of a step, 1, 2, ... (equation 127); 0 at step 1.

    With it, ema = beta ema + (1 - beta) weight is exactly the power profile applied to piecewise-constant weights.
    """
    return (1 - 1 / step) ** (gamma + 1)


def inner(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    end = min(a.end, b.end)
    if isinstance(a, PowerProfile) and isinstance(b, PowerProfile):
        scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * end / (a.end * b.end)
        return scale * (end / a.end) ** a.gamma * (end / b.end) ** b.gamma
    if isinstance(a, ExponentialProfile) and isinstance(b, ExponentialProfile):
        rate = a.rate + b.rate
        tail = math.exp(-a.rate * (a.end - end) - b.rate * (b.end - end))
        return a.rate * b.rate / rate * tail * -math.expm1(-rate * end) / (a.mass * b.mass)
    if isinstance(a, ExponentialProfile):
        a, b = b, a
    assert isinstance(a, PowerProfile) and isinstance(b, ExponentialProfile)
    tail = math.exp(-b.rate * (b.end - end)) * (end / a.end) ** (a.gamma + 1)
    return b.rate / b.mass * tail * _kummer(a.gamma + 1, b.rate * end)


def _kummer(a: float, x: float) -> float:
    """Return exp(-x) M(a, a + 1, x) = a exp(-x) / x^a times the integral of u^(a - 1) exp(u) from 0 to x, a > 0.

    Computed as the mean of a / (a + n) for n ~ Poisson(x): all terms are positive, so none cancel.
    """
    width = 12 * math.sqrt(x) + 40
    n = torch.arange(max(0, math.floor(x - width)), math.ceil(x + width), dtype=torch.float64)
    if x == 0:
        return 1.0
    return float(((n * math.log(x) - x - torch.lgamma(n + 1)).exp() * a / (a + n)).sum())


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """Return coefficients (n,) of the combination of stored profiles closest to `wanted` in L2, and its relative error.

    The error is ||combination - wanted|| / ||wanted||. The coefficients sum to 1 (which the paper leaves to the fit),
    so that a weight that never changed keeps its value. A profile that is stored is returned exactly. ValueError if
    none is stored.
    """
    if not stored:
        raise ValueError("no EMA profile is stored, so no other can be computed")
    if wanted in stored:
        one_hot = torch.zeros(len(stored), dtype=torch.float64)
        one_hot[stored.index(wanted)] = 1
        return one_hot, 0.0
    gram = torch.tensor([[inner(a, b) for b in stored] for a in stored], dtype=torch.float64)
    right = torch.tensor([inner(a, wanted) for a in stored], dtype=torch.float64)
    norm = inner(wanted, wanted)
    scale = gram.diagonal().rsqrt()
    masses = scale / scale.norm()
    system = torch.cat([
        torch.cat([scale[:, None] * gram * scale, masses[:, None]], dim=1),
        torch.cat([masses, torch.zeros(1, dtype=torch.float64)])[None],
    ])  # fmt: skip
    known = torch.cat([scale * right / math.sqrt(norm), (1 / (scale.norm() * math.sqrt(norm)))[None]])
    solution = torch.linalg.lstsq(system, known[:, None], rcond=RANK, driver="gelsd").solution[:-1, 0]
    shares = solution * scale * math.sqrt(norm)
    shares = shares / shares.sum()
    error = norm - 2 * shares @ right + shares @ gram @ shares
    return shares, math.sqrt(max(0.0, float(error) / norm))
