"""Guidance: its estimates, and the number of network evaluations."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths.guidance import classifier_free, is_guided
from unilatent.types import Conditioning

B, D = 3, 4
STREAM = torch.Generator().manual_seed(0)
COND = Conditioning(torch.randn(B, D, generator=STREAM))
NULL = Conditioning(torch.randn(1, D, generator=STREAM).expand(B, D))
Z = torch.randn(B, D, generator=STREAM)


class Network:
    """A denoiser that records its batch sizes; its estimate depends on z, t and the condition."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, z: torch.Tensor, t: float, cond: Conditioning) -> torch.Tensor:
        assert len(z) == len(cond)
        self.batches.append(len(z))
        return torch.tanh(z) * (1 + t) + cond.vector


def estimates(t: float) -> tuple[torch.Tensor, torch.Tensor]:
    network = Network()
    return network(Z, t, COND), network(Z, t, NULL)


@pytest.mark.parametrize(("scale", "evaluated"), [(0.0, [B]), (1.0, [B]), (0.5, [2 * B]), (2.5, [2 * B])])
def test_scale(scale: float, evaluated: list[int]):
    network = Network()
    c, u = estimates(0.4)
    torch.testing.assert_close(classifier_free(network, COND, NULL, scale)(Z, 0.4), u + scale * (c - u))
    assert network.batches == evaluated


@pytest.mark.parametrize("t", [0.1, 0.2, 0.8, 1.0])
def test_outside_the_interval_the_plain_conditional_estimate_in_one_evaluation(t: float):
    network = Network()
    torch.testing.assert_close(classifier_free(network, COND, NULL, 3.0, (0.2, 0.8))(Z, t), estimates(t)[0])
    assert network.batches == [B]


def test_inside_the_interval_it_is_guided():
    network = Network()
    c, u = estimates(0.5)
    torch.testing.assert_close(classifier_free(network, COND, NULL, 3.0, (0.2, 0.8))(Z, 0.5), u + 3 * (c - u))
    assert network.batches == [2 * B]


def test_ends_of_the_interval():
    assert is_guided(1.0, (0.0, 1.0)) and not is_guided(0.0, (0.0, 1.0))
    assert not is_guided(0.9, (0.0, 0.9)) and not is_guided(0.1 + 0.2, (0.3, 1.0)), "compared in float32"
    assert is_guided(0.89999, (0.0, 0.9))


def test_the_two_orders_of_norm_and_guidance():
    def project(estimate: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(estimate, dim=-1)

    def finished(z: torch.Tensor, t: float, cond: Conditioning) -> torch.Tensor:
        return project(Network()(z, t, cond))

    c, u = estimates(0.4)
    norm_first = classifier_free(finished, COND, NULL, 3.0)(Z, 0.4)
    guidance_first = classifier_free(Network(), COND, NULL, 3.0, project=project)(Z, 0.4)
    torch.testing.assert_close(norm_first, project(u) + 3 * (project(c) - project(u)))
    torch.testing.assert_close(guidance_first, project(u + 3 * (c - u)))
    assert (norm_first - guidance_first).abs().max() > 0.1


@pytest.mark.parametrize(("scale", "t"), [(0.0, 0.4), (1.0, 0.4), (3.0, 0.95), (3.0, 0.4)])
def test_a_solver_sees_only_finished_estimates(scale: float, t: float):
    guided = classifier_free(Network(), COND, NULL, scale, (0.0, 0.9), project=torch.nn.LayerNorm(D))
    assert guided(Z, t).mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.0, 0.9), (0.5, 1.0)])
@pytest.mark.parametrize("first", ["norm_first", "guidance_first"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("t", [0.1, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_one_evaluation_at_scales_0_and_1_is_the_limit_of_two(
    scale: float, first: str, interval: tuple[float, float], t: float
):
    """Scales 0 and 1 need one evaluation; nearby scales give the same estimate, inside and outside an interval."""
    network = Network()

    def finished(z: torch.Tensor, t: float, cond: Conditioning) -> torch.Tensor:
        return torch.nn.functional.normalize(network(z, t, cond), dim=-1)

    def estimate(scale: float) -> torch.Tensor:
        if first == "norm_first":
            return classifier_free(finished, COND, NULL, scale, interval)(Z, t)
        project = torch.nn.functional.normalize
        return classifier_free(network, COND, NULL, scale, interval, project)(Z, t)

    exact = estimate(scale)
    assert network.batches == [B]
    c, u = estimates(t)
    inside = is_guided(t, interval)
    want = torch.nn.functional.normalize(u if inside and scale == 0 else c, dim=-1)
    assert torch.equal(exact, want)
    for near in (scale + 1e-6, abs(scale - 1e-6)):
        torch.testing.assert_close(estimate(near), exact, rtol=0, atol=1e-5)
    assert network.batches[1:] == [2 * B if inside else B] * 2


def test_without_an_interval_scale_0_is_unconditional_at_both_ends():
    for t in (0.0, 1.0):
        assert torch.equal(classifier_free(Network(), COND, NULL, 0.0)(Z, t), estimates(t)[1])


def test_condition_tokens_are_doubled_with_the_batch():
    tokens = Conditioning(COND.vector, torch.ones(B, 2, D), torch.ones(B, 2, dtype=torch.bool))
    none = Conditioning(NULL.vector, torch.zeros(B, 2, D), torch.zeros(B, 2, dtype=torch.bool))

    def network(z, t, cond):
        assert cond.tokens.shape == (2 * B, 2, D) and cond.mask.shape == (2 * B, 2)
        return z * 0 + cond.tokens.sum(1)

    torch.testing.assert_close(classifier_free(network, tokens, none, 2.0)(Z, 0.5), torch.full((B, D), 4.0))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.0, 1.1)])
def test_impossible_intervals_are_refused(interval: tuple[float, float]):
    with pytest.raises(ValueError, match="guidance_interval"):
        classifier_free(Network(), COND, NULL, 2.0, interval)


def test_negative_scales_are_refused():
    with pytest.raises(ValueError, match="guidance_scale: -1"):
        classifier_free(Network(), COND, NULL, -1.0)
