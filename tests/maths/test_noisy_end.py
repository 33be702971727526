"""Solvers on a path with sigma(0) > 0, as for latents: they return z_0, with that noise."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.maths import times
from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath
from unilatent.maths.solvers import SOLVERS, ancestral
from unilatent.maths.streams import Streams

PATHS = [LogSNRPath(5.0, -10.0), LogSNRPath(5.0, -8.0, "linear")]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.2, 0.8], [0.3, 0.5]))
PLACES = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)


def marginal(path: NoisePath, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the two Gaussians that z_t is a mixture of."""
    s = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(s), path.sigma(s)
    return alpha * MEANS, (alpha**2 * STDS**2 + sigma**2).sqrt()


def quantiles(path: NoisePath, t: float) -> torch.Tensor:
    """Where z_t's distribution function is PLACES: in one dimension the probability flow keeps it. (9, 1)."""
    means, stds = marginal(path, t)
    low, high = torch.full_like(PLACES, -9), torch.full_like(PLACES, 9)
    for _ in range(60):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((middle[:, None] - means) / stds)).sum(1) < PLACES
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[:, None]


def mixture(path: NoisePath):
    """E[x | z_t] of the mixture, in closed form."""

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        means, stds = marginal(path, t)
        alpha = path.alpha(torch.tensor(t, dtype=torch.float64))
        share = torch.softmax(WEIGHTS.log() - stds.log() - ((z - means) / stds) ** 2 / 2, dim=-1)
        return (share * (MEANS + alpha * STDS**2 / stds**2 * (z - means))).sum(-1, keepdim=True)

    return denoise


def error(name: str, path: NoisePath, steps: int) -> float:
    made = SOLVERS[name](mixture(path), quantiles(path, 1.0), times.grid(steps), path)
    return float((made - quantiles(path, 0.0)).abs().max())


@every_path
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence_on_a_mixture(name: str, order: int, path: NoisePath):
    assert order - 0.3 < math.log(error(name, path, 128) / error(name, path, 512)) / math.log(4) < order + 0.45


@every_path
@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_deterministic_solvers_hand_over_the_noise_of_the_clean_end(name: str, path: NoisePath):
    """With one possible x, z_0 = alpha_0 x + sigma_0 eps with the noise it started from."""
    x, eps = torch.full((5, 1), 0.9, dtype=torch.float64), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    want = x / math.sqrt(1 + math.exp(-5)) + eps / math.sqrt(1 + math.exp(5))
    exact = name in ("ddim", "dpmpp_2m")
    made = SOLVERS[name](lambda z, t: x, path.add_noise(x, eps, 1.0), times.grid(8 if exact else 400), path)
    torch.testing.assert_close(made, want, rtol=0, atol=1e-6 if exact else 0.01 if name == "euler" else 1e-4)
    assert (made - x).abs().max() > 0.1


def variance(path: NoisePath, std: float, steps: int, share: float = 0.2) -> float:
    """The exact standard deviation of the result for x ~ N(0, std^2): every step is linear in z and in its noise."""

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        s = torch.tensor(t, dtype=torch.float64)
        return path.alpha(s) * std**2 / (path.alpha(s) ** 2 * std**2 + path.sigma(s) ** 2) * z

    pulses = iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    start = torch.eye(steps + 1, dtype=torch.float64)[0]
    responses = ancestral(denoise, start[:, None], times.grid(steps), path, lambda: next(pulses)[:, None], share=share)
    return float(responses.square().sum())


def wanted(path: NoisePath, std: float) -> float:
    end = torch.tensor(0.0, dtype=torch.float64)
    return float(path.alpha(end) ** 2 * std**2 + path.sigma(end) ** 2)


@pytest.mark.parametrize("path", [*PATHS, LogSNRPath(10.0, -10.0)], ids=repr)
def test_ancestral_variance_is_exact_where_its_bounds_are(path: NoisePath):
    """Upper bound: unit Gaussian data; lower bound: data that is one point. In any number of steps."""
    for steps in (1, 3, 10):
        assert variance(path, 1.0, steps, share=1.0) == pytest.approx(wanted(path, 1.0), rel=1e-9)
    for steps in (3, 10):
        assert variance(path, 0.0, steps, share=0.0) == pytest.approx(wanted(path, 0.0), rel=1e-9)


@pytest.mark.parametrize("path", [*PATHS, LinearPath()], ids=repr)
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_ancestral_variance_converges_to_that_of_the_noisy_data(path: NoisePath, std: float):
    errors = [abs(variance(path, std, steps) / wanted(path, std) - 1) for steps in (64, 256)]
    assert errors[1] < 0.05 and errors[1] < errors[0] / 2


def test_ancestral_samples_come_from_their_own_streams():
    path = PATHS[0]

    def made(rows: range) -> torch.Tensor:
        streams = Streams(("sample", 0), rows)
        return ancestral(
            lambda z, t: torch.tanh(z), streams.normal(3, 2), times.grid(7), path, lambda: streams.normal(3, 2)
        )

    whole = made(range(5))
    assert torch.equal(made(range(3, 5)), whole[3:]) and torch.equal(made(range(5)), whole)
    assert whole.dtype == torch.float32 and len(whole.unique(dim=0)) == 5
