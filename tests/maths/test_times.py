"""Distributions of times, and sampling grids."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths import times, weightings

T = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 7.5])
def test_shift_multiplies_the_odds(factor: float):
    shifted = times.shift(T, factor)
    inner = slice(1, -1)
    torch.testing.assert_close(shifted[inner] / (1 - shifted[inner]), factor * T[inner] / (1 - T[inner]))


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 7.5])
def test_shift_by_the_inverse_factor_undoes_it_and_ends_stay(factor: float):
    shifted = times.shift(T, factor)
    torch.testing.assert_close(times.shift(shifted, 1 / factor), T, rtol=0, atol=1e-14)
    assert shifted[0] == 0 and shifted[-1] == pytest.approx(1, abs=1e-15) and (shifted.diff() > 0).all()
    assert times.shift(T, 1.0).equal(T)


def test_factor_two_is_the_paper_s_half_with_time_turned_round():
    """UNITE, official time u = 1 - t: u' = alpha u / (1 + (alpha - 1) u) with alpha = 0.5."""
    u = 1 - T
    torch.testing.assert_close(1 - times.shift(T, 2.0), 0.5 * u / (1 - 0.5 * u))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_shift_refuses_factors_that_are_not_positive(factor: float):
    with pytest.raises(ValueError, match="must be positive"):
        times.shift(T, factor)


def test_logit_normal():
    n = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = times.logit_normal(n, mean=0.5, std=2.0)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    logits = torch.logit(t.double())
    assert abs(logits.mean() - 0.5) < 0.06 and abs(logits.std() - 2.0) < 0.05
    assert times.logit_normal(torch.zeros(1)).item() == 0.5


def discrepancy(t: torch.Tensor) -> float:
    """Largest difference between the share of times below a point and the point."""
    t = t.double().sort().values
    ranks = torch.arange(len(t) + 1, dtype=torch.float64) / len(t)
    return float(torch.maximum((t - ranks[:-1]).abs(), (ranks[1:] - t).abs()).max())


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("size", [16, 64, 100, 1024])
def test_stratified_times_cover_the_interval_evenly_wherever_a_batch_starts(draw: int, size: int):
    for start in (0, 17, 123_456_789, 10**12):
        t = times.stratified(torch.arange(start, start + size), shift=2**63 + 12345, draw=draw)
        assert t.min() >= 0 and t.max() < 1 and t.dtype == torch.float32
        assert discrepancy(t) < 3.5 / size, "chance gives about 0.87 / sqrt(size)"


def test_stratified_times_of_one_process_among_several_are_even_too():
    for world in (2, 3, 8):
        assert discrepancy(times.stratified(torch.arange(1, 1 + 64 * world, world), shift=99)) < 0.1


def test_stratified_times_are_a_function_of_the_position_alone():
    whole = times.stratified(torch.arange(20), shift=7)
    assert torch.equal(times.stratified(torch.tensor([13, 2]), shift=7), whole[[13, 2]])
    golden = torch.tensor([(7 / 2**64 + i * (5**0.5 - 1) / 2) % 1 for i in range(20)], dtype=torch.float64)
    torch.testing.assert_close(whole.double(), golden, rtol=0, atol=1e-7)


def test_stratified_times_are_uniform_when_the_shift_is():
    shifts = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(2)).tolist()
    first = torch.cat([times.stratified(torch.tensor([5]), 4 * shift) for shift in shifts])
    assert (torch.histc(first, bins=8, min=0, max=1) - 500).abs().max() < 5 * 500**0.5


def test_two_stratified_draws_fill_the_square():
    """If their difference were constant, most of 16 x 16 cells would stay empty."""
    a, b = (times.stratified(torch.arange(2560), 5 + draw, draw) for draw in (0, 1))
    cells = torch.bincount((16 * a).long() * 16 + (16 * b).long(), minlength=256)
    assert cells.min() > 0 and cells.max() < 30


def test_grid():
    grid = times.grid(4)
    assert grid.dtype == torch.float64 and grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = times.grid(10, 2.0)
    assert len(shifted) == 11 and shifted[0] == 1 and shifted[-1] == 0 and (shifted.diff() < 0).all()
    torch.testing.assert_close(shifted, times.shift(times.grid(10), 2.0))
    with pytest.raises(ValueError, match="num_inference_steps: 0"):
        times.grid(0)


def test_velocity_weight_is_the_error_of_the_velocity():
    """|v - v_hat|^2 = w(t) |x - x_hat|^2 on the linear path with the same clamp."""
    from unilatent.maths.paths import LinearPath

    t = torch.tensor([0.01, 0.05, 0.3, 1.0], dtype=torch.float64)
    z, x, estimate = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    path = LinearPath(min_time=0.05)
    error = (path.velocity(z, x, t) - path.velocity(z, estimate, t)).square()
    torch.testing.assert_close(error, weightings.velocity(t, 0.05)[:, None] * (x - estimate).square())
