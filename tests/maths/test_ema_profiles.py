"""EMA profiles over training: closed forms against numerical integrals, and post-hoc EMA from stored profiles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unilatent.maths.ema_profiles import (
    LONGEST,
    ExponentialProfile,
    PowerProfile,
    Profile,
    coefficients,
    decay_at,
    gamma_of,
    inner,
    sigma_of,
)

CELLS = 100_000
END = 1000
LENGTHS = (0.05, 0.10)
STORED = [PowerProfile(gamma_of(s), at) for at in range(100, END + 1, 100) for s in LENGTHS]


def density(profile: Profile, t: Tensor) -> Tensor:
    """The density as the papers write it."""
    if isinstance(profile, PowerProfile):
        out = t**profile.gamma * (profile.gamma + 1) / profile.end ** (profile.gamma + 1)
    else:
        rate = -math.log(profile.decay)
        out = rate * torch.exp(rate * (t - profile.end)) / (1 - profile.decay**profile.end)
    return out * (t <= profile.end)


def integral(values: Tensor, end: float) -> float:
    return float(values.mean() * end)


def midpoints(end: float) -> Tensor:
    return (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (end / CELLS)


@pytest.mark.parametrize("sigma", [0.005, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_of_a_relative_length(sigma: float) -> None:
    """The numerically integrated standard deviation of the profile is sigma_rel."""
    t = midpoints(1)
    p = density(PowerProfile(gamma_of(sigma), 1), t)
    mean = integral(t * p, 1)
    assert integral(p, 1) == pytest.approx(1, rel=1e-6)
    assert math.sqrt(integral((t - mean) ** 2 * p, 1)) == pytest.approx(sigma, rel=1e-4)
    assert sigma_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-10)


def test_published_exponents() -> None:
    """The paper's two values: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(LONGEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.3, math.nan])
def test_lengths_that_no_profile_has_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
def test_the_update_gives_the_profile_of_weights_held_over_a_step(gamma: float) -> None:
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average = 123.0  # whatever it starts as
    for step, weight in enumerate(weights.tolist(), 1):
        beta = decay_at(gamma, step)
        average = beta * average + (1 - beta) * weight
    edges = (torch.arange(51, dtype=torch.float64) / 50) ** (gamma + 1)
    assert average == pytest.approx(float((edges.diff() * weights).sum()), rel=1e-12)


PAIRS = [
    (PowerProfile(16.97, 700), PowerProfile(6.94, 1000)),
    (PowerProfile(0.0, 1000), PowerProfile(80.0, 900)),
    (PowerProfile(6.94, 1000), PowerProfile(6.94, 1000)),
    (PowerProfile(6.94, 700), ExponentialProfile(0.99, 1000)),
    (PowerProfile(16.97, 1000), ExponentialProfile(0.999, 800)),
    (PowerProfile(2.0, 50), ExponentialProfile(0.9, 1000)),
    (ExponentialProfile(0.99, 1000), ExponentialProfile(0.995, 600)),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_inner_products(a: Profile, b: Profile) -> None:
    t = midpoints(end := min(a.end, b.end))
    assert inner(a, b) == pytest.approx(integral(density(a, t) * density(b, t), end), rel=1e-5, abs=1e-60)
    assert inner(a, b) == inner(b, a)


def test_a_stored_profile_is_itself() -> None:
    found, error = coefficients(STORED, STORED[7])
    assert found.tolist() == [float(i == 7) for i in range(len(STORED))] and error == 0


WANTED = [
    *[PowerProfile(gamma_of(s), END) for s in (0.04, 0.06, 0.08, 0.12, 0.15, 0.2)],
    ExponentialProfile(0.99, END), ExponentialProfile(0.98, END), PowerProfile(gamma_of(0.07), 600),
]  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED)
def test_others_are_put_together(wanted: Profile) -> None:
    """The returned error equals the numerically integrated error of the combined profiles; it is small."""
    found, error = coefficients(STORED, wanted)
    t = midpoints(END)
    target = density(wanted, t)
    total = sum(c * density(p, t) for c, p in zip(found.tolist(), STORED, strict=True))
    assert isinstance(total, Tensor)
    real = math.sqrt(integral((total - target) ** 2, END) / integral(target**2, END))
    assert error == pytest.approx(real, rel=0.01, abs=1e-5)
    assert error < 0.1 and float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_more_snapshots_fit_better() -> None:
    wanted = PowerProfile(gamma_of(0.03), END)
    errors = [coefficients([p for p in STORED if p.end > END - n * 100], wanted)[1] for n in (1, 2, 5, 10)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]


def trajectory() -> Tensor:
    """Weights (END, 64) of a simulated training: they converge at different rates, with noise."""
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(1, END + 1, dtype=torch.float64)[:, None]
    pace = torch.logspace(1, 3, 64, dtype=torch.float64)
    noise = torch.randn(END, 64, generator=generator, dtype=torch.float64)
    return 3 * torch.exp(-t / pace) + torch.linspace(-1, 1, 64, dtype=torch.float64) + 0.1 * noise


def tracked(weights: Tensor, gamma: float) -> list[Tensor]:
    """Float32 EMA weights after each step, as training computes them."""
    average, kept = torch.zeros(weights.shape[1]), []
    for step, weight in enumerate(weights, 1):
        average = torch.lerp(average, weight.float(), 1 - decay_at(gamma, step))
        kept.append(average)
    return kept


def tracked_exponential(weights: Tensor, decay: float) -> Tensor:
    share = decay ** torch.arange(END - 1, -1, -1, dtype=torch.float64)
    return (share[:, None] * weights).sum(0) / share.sum()


def test_a_trajectory_of_weights_end_to_end() -> None:
    """From float32 snapshots of two profiles, other EMA weights within 1 % of directly computed ones."""
    weights = trajectory()
    kept = {length: tracked(weights, gamma_of(length)) for length in LENGTHS}
    snapshots = torch.stack([kept[s][at - 1] for at in range(100, END + 1, 100) for s in LENGTHS]).double()
    for sigma in (0.04, 0.07, 0.12, 0.15):
        found, _ = coefficients(STORED, PowerProfile(gamma_of(sigma), END))
        direct = tracked(weights, gamma_of(sigma))[-1].double()
        assert (found @ snapshots - direct).norm() / direct.norm() < 0.01
        assert (found @ snapshots - direct).norm() < 0.5 * (snapshots[-1] - direct).norm()  # closer than a stored one
    found, _ = coefficients(STORED, ExponentialProfile(0.99, END))
    direct = tracked_exponential(weights, 0.99)
    assert (found @ snapshots - direct).norm() / direct.norm() < 0.01
