"""Averages of weights as profiles over training time, and profiles put together from others (Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and appendix C).

A profile is a density over training time in steps, zero after its `end`; the average it stands for is the integral of
the weights under it, those of step i being held over (i - 1, i]. Snapshots of the averages of some profiles at several
ends, and a little algebra, give the average of nearly any other. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 1 / math.sqrt(12)
"""Relative length of gamma = 0, the plain mean over all of training: no profile here is longer."""
RANK = 1e-13
"""Directions of a system of equations below this share of the largest are left out of its solution."""


@dataclass(frozen=True)
class PowerProfile:
    """(gamma + 1) t^gamma / end^(gamma + 1): its length grows with training (equation 1)."""

    gamma: float
    end: float

    @property
    def mass(self) -> float:
        """What it weighs in all."""
        return 1.0


@dataclass(frozen=True)
class ExponentialProfile:
    """The usual average of a constant decay a step, as far as it weighs trained weights: the initial weights keep
    decay^end, which no profile over time can give them, and the rest is scaled to 1."""

    decay: float
    end: float

    @property
    def rate(self) -> float:
        """1 / steps."""
        return -math.log(self.decay)

    @property
    def mass(self) -> float:
        """Of the average that is trained weights, before it is scaled to 1."""
        return -math.expm1(-self.rate * self.end)


Profile = PowerProfile | ExponentialProfile


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power profile whose standard deviation is `sigma_rel` of its end (equation 126).

    sigma^2 = (g + 1) / ((g + 2)^2 (g + 3)) is a cubic in g; its largest root, by the cosine. ValueError outside
    (0, 0.2887].
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(
            f"sigma_rel: {sigma_rel!r} is no power profile's relative length; give more than 0, at most {LONGEST:.4f}"
        )
    s = sigma_rel**-2
    p = (16 - s) - 49 / 3
    q = 686 / 27 - 7 * (16 - s) / 3 + (12 - s)
    angle = math.acos(min(1.0, max(-1.0, 3 * q / (2 * p) * math.sqrt(-3 / p))))
    return max(0.0, 2 * math.sqrt(-p / 3) * math.cos(angle / 3) - 7 / 3)


def sigma_of(gamma: float) -> float:
    """The relative length of a power profile, gamma >= 0."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def decay_at(gamma: float, step: int) -> float:
    """beta of step 1, 2, ...: average = beta average + (1 - beta) weight is then exactly the power profile of weights
    held over a step (equation 127); that of step 1 is 0."""
    return (1 - 1 / step) ** (gamma + 1)


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    end = min(a.end, b.end)
    if isinstance(a, PowerProfile) and isinstance(b, PowerProfile):
        scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * end / (a.end * b.end)
        return scale * (end / a.end) ** a.gamma * (end / b.end) ** b.gamma
    if isinstance(a, ExponentialProfile) and isinstance(b, ExponentialProfile):
        both = a.rate + b.rate
        tail = math.exp(-a.rate * (a.end - end) - b.rate * (b.end - end))
        return a.rate * b.rate / both * tail * -math.expm1(-both * end) / (a.mass * b.mass)
    if isinstance(a, ExponentialProfile):
        a, b = b, a
    assert isinstance(a, PowerProfile) and isinstance(b, ExponentialProfile)
    tail = math.exp(-b.rate * (b.end - end)) * (end / a.end) ** (a.gamma + 1)
    return b.rate / b.mass * tail * _kummer(a.gamma + 1, b.rate * end)


def _kummer(a: float, x: float) -> float:
    """exp(-x) M(a, a + 1, x) = a exp(-x) / x^a times the integral of u^(a - 1) exp(u) from 0 to x, a > 0.

    The mean of a / (a + n) over n of a Poisson distribution with mean x: no term is negative, nothing cancels.
    """
    wide = 12 * math.sqrt(x) + 40
    n = torch.arange(max(0, math.floor(x - wide)), math.ceil(x + wide), dtype=torch.float64)
    if x == 0:
        return 1.0
    return float(((n * math.log(x) - x - torch.lgamma(n + 1)).exp() * a / (a + n)).sum())


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """(n,) whose sum of stored profiles is closest to `wanted` in the mean square, and how far: ||sum - wanted|| over
    ||wanted||.

    They add up to 1 (which the paper leaves to the fit), so that a weight that never moved stays where it is. A profile
    that is stored is itself. ValueError without any.
    """
    if not stored:
        raise ValueError("no profile is stored, so none can be put together")
    if wanted in stored:
        out = torch.zeros(len(stored), dtype=torch.float64)
        out[stored.index(wanted)] = 1
        return out, 0.0
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
    found = solution * scale * math.sqrt(norm)
    found = found / found.sum()
    error = norm - 2 * found @ right + found @ gram @ found
    return found, math.sqrt(max(0.0, float(error) / norm))
