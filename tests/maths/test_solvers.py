"""Orders of convergence where the solution is known: Gaussian data, whose optimal denoiser is linear."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.maths import times
from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath
from unilatent.maths.solvers import SOLVERS, ddim, dopri5, ending_clean, euler, find_solver, heun, restarting

MEAN, STD = 0.7, 0.6
PATHS = [LinearPath(), LogSNRPath(8.0, -8.0), LogSNRPath(6.0, -6.0, "linear")]
FIXED = [name for name in SOLVERS if name not in ("dopri5", "ancestral")]
NOISE = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]

every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def spread(path: NoisePath, t: float) -> float:
    """Standard deviation of z_t."""
    s = torch.tensor(t, dtype=torch.float64)
    return math.sqrt(float((path.alpha(s) * STD) ** 2 + path.sigma(s) ** 2))


def exact(path: NoisePath, t: float) -> torch.Tensor:
    """The probability-flow trajectories: z_t stays at the same number of standard deviations from its mean."""
    return float(path.alpha(torch.tensor(t, dtype=torch.float64))) * MEAN + spread(path, t) * NOISE


def denoiser(path: NoisePath):
    """E[x | z_t] for x ~ N(MEAN, STD^2)."""

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        alpha = float(path.alpha(torch.tensor(t, dtype=torch.float64)))
        return MEAN + alpha * STD**2 * (z - alpha * MEAN) / spread(path, t) ** 2

    return denoise


def error(solver, path: NoisePath, grid: torch.Tensor) -> float:
    start, end = float(grid[0]), float(grid[-1])
    return float((solver(denoiser(path), exact(path, start), grid, path) - exact(path, end)).abs().max())


def slope(solver, path: NoisePath, start: float, end: float) -> float:
    errors = [error(solver, path, torch.linspace(start, end, n + 1, dtype=torch.float64)) for n in (64, 256)]
    return math.log(errors[0] / errors[1]) / math.log(4)


@every_path
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("ends", [(0.9, 0.1), (1.0, 0.0)])
def test_order_of_convergence(name: str, order: int, path: NoisePath, ends: tuple[float, float]):
    assert order - 0.3 < slope(SOLVERS[name], path, *ends) < order + 0.45


@every_path
def test_dopri5_meets_a_tight_tolerance(path: NoisePath):
    grid = torch.tensor([0.95, 0.5, 0.05], dtype=torch.float64)
    assert error(lambda *a: dopri5(*a, rtol=1e-10, atol=1e-12), path, grid) < 1e-8


@every_path
def test_dopri5_never_asks_beyond_the_ends(path: NoisePath):
    """Every time at which the network is evaluated lies in the interval, and the default tolerance is met."""
    seen: list[float] = []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return denoiser(path)(z, t)

    made = dopri5(denoise, exact(path, 0.95), torch.tensor([0.95, 0.05], dtype=torch.float64), path)
    assert min(seen) >= 0.05 - 1e-12 and max(seen) <= 0.95 + 1e-12
    assert (made - exact(path, 0.05)).abs().max() < 1e-2


@every_path
@pytest.mark.parametrize("name", FIXED)
def test_whole_way_from_noise_to_data(name: str, path: NoisePath):
    assert error(SOLVERS[name], path, times.grid(100, 2.0)) < (0.05 if name in ("euler", "ddim") else 1e-2)


@every_path
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ddim_is_exact_for_a_constant_estimate(path: NoisePath, steps: int):
    x = torch.full_like(NOISE, 1.3)
    made = ddim(lambda z, t: x, path.add_noise(x, NOISE, 1.0), times.grid(steps), path)
    torch.testing.assert_close(made, path.add_noise(x, NOISE, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [euler, heun, ddim])
def test_straight_trajectories_take_one_step(solver):
    x = torch.full_like(NOISE, 1.3)
    made = solver(lambda z, t: x, NOISE, times.grid(1), LinearPath(min_time=0.05))
    torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "count"), [("euler", 10), ("ddim", 10), ("dpmpp_2m", 10), ("heun", 19)])
def test_number_of_evaluations(name: str, count: int):
    seen: list[float] = []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return z * 0

    SOLVERS[name](denoise, NOISE, times.grid(10), LinearPath(min_time=0.05))
    assert len(seen) == count and max(seen) == 1.0 and min(seen) > 0


@pytest.mark.parametrize("name", FIXED)
def test_fixed_steps_keep_samples_apart(name: str):
    path, grid = LinearPath(min_time=0.05), times.grid(8)
    together = SOLVERS[name](denoiser(path), NOISE, grid, path)
    alone = torch.cat([SOLVERS[name](denoiser(path), row[None], grid, path) for row in NOISE])
    assert torch.equal(together, alone)
    other = torch.cat([NOISE[:1], 1e6 * torch.ones(4, 1, dtype=torch.float64)])
    assert torch.equal(SOLVERS[name](denoiser(path), other, grid, path)[0], together[0])


@pytest.mark.parametrize("name", list(SOLVERS))
def test_samples_keep_shape_and_precision(name: str):
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    path = LinearPath(min_time=0.05)
    made = SOLVERS[name](lambda z, t: torch.tanh(z), z, times.grid(4), path, lambda: torch.ones_like(z).double())
    assert made.shape == z.shape and made.dtype == torch.float32 and made.isfinite().all()


def test_find_solver():
    assert find_solver("heun") is heun
    with pytest.raises(ValueError, match=r"unknown; use one of .*heun"):
        find_solver("rk45")


CLAMPED = LinearPath(min_time=0.05)
LEFT = {"euler": 0.0144, "heun": 0.06 * 0.7 * 0.68 * 0.6, "dopri5": 0.05 / math.e}
"""Shares of noise - x that a clamped velocity leaves after 50 steps; dopri5 meets the exact 0.05 / e to its tolerance.
If both have unit variance, Heun leaves 2.4 % (0.0171 times the square root of 2)."""


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_clean_end_returns_a_point_mass_exactly(name: str, steps: int):
    """With a perfect denoiser of a single point. Otherwise, up to 1.8 % of the way is left."""
    x = torch.full_like(NOISE, 1.3)
    arguments = (lambda z, t: x, NOISE, times.grid(steps), CLAMPED, lambda: NOISE)
    assert torch.equal(ending_clean(SOLVERS[name])(*arguments), x)
    if steps == 50:
        left = (SOLVERS[name](*arguments) - x) / (NOISE - x)
        want = torch.full_like(left, LEFT.get(name, 0.0))
        torch.testing.assert_close(left, want, rtol=0, atol=2e-3 if name == "dopri5" else 1e-12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_a_clean_end_keeps_the_order_of_convergence(name: str, order: int):
    """Where nothing is clamped, these solvers end at the clean estimate anyway; a clamped one comes nearer."""
    path, clean = LinearPath(), ending_clean(SOLVERS[name])
    assert order - 0.3 < slope(clean, path, 1.0, 0.0) < order + 0.45
    for steps in (1, 10, 50, 200):
        grid = times.grid(steps)
        assert error(clean, path, grid) == pytest.approx(error(SOLVERS[name], path, grid), rel=1e-9, abs=1e-12)
        assert error(clean, CLAMPED, grid) <= error(SOLVERS[name], CLAMPED, grid) + 1e-12


@pytest.mark.parametrize(
    ("name", "count"), [("euler", 10), ("ddim", 10), ("dpmpp_2m", 10), ("ancestral", 10), ("heun", 19)]
)
def test_a_clean_end_evaluates_as_often(name: str, count: int):
    seen: list[float] = []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return z * 0

    ending_clean(SOLVERS[name])(denoise, NOISE, times.grid(10), CLAMPED, lambda: NOISE)
    assert len(seen) == count and seen[-1] == pytest.approx(0.1)


def test_a_clean_end_needs_a_path_that_is_clean():
    with pytest.raises(ValueError, match=r"^denoise_to_zero: true, but this model's latents keep noise at t = 0"):
        ending_clean(heun)(lambda z, t: z, NOISE, times.grid(4), LogSNRPath(5.0, -10.0))


def level(path: NoisePath, t: float) -> tuple[float, float]:
    """Factor and standard deviation of the noise."""
    s = torch.tensor(t, dtype=torch.float64)
    return float(path.alpha(s)), float(path.sigma(s))


@every_path
@pytest.mark.parametrize("count", [0, 1, 3])
def test_restarts_leave_the_correlation_of_a_linear_denoiser(path: NoisePath, count: int):
    """From t up to s, noise leaves the correlation alpha_s/alpha_t std_t/std_s; exact steps down do not change it."""
    grid = torch.linspace(1, 0, 801, dtype=torch.float64)
    drawn = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)

    def noise() -> torch.Tensor:
        return torch.randn(4000, 1, generator=generator, dtype=torch.float64)

    (factor, _), (upper, _) = level(path, 0.25), level(path, 0.5)
    expected = (upper / factor * spread(path, 0.25) / spread(path, 0.5)) ** count
    start = float(path.alpha(grid[0])) * MEAN + spread(path, 1.0) * drawn
    end = restarting(heun, count, (0.25, 0.5))(denoiser(path), start, grid, path, noise)
    assert float(end.mean()) == pytest.approx(float(path.alpha(grid[-1])) * MEAN, abs=0.04)
    assert float(end.std()) == pytest.approx(spread(path, 0.0), rel=0.04)
    assert float(torch.corrcoef(torch.cat([end, drawn], 1).T)[0, 1]) == pytest.approx(expected, abs=0.04)


def test_restarts_make_the_errors_of_the_first_steps_smaller():
    """A denoiser that is wrong above t = 0.5 shifts the mean; each restart below multiplies the shift by one factor."""
    path = LinearPath()
    right, generator = denoiser(path), torch.Generator().manual_seed(0)

    def wrong(z: torch.Tensor, t: float) -> torch.Tensor:
        return right(z, t) + (0.5 if t > 0.5 else 0.0)

    def noise() -> torch.Tensor:
        return torch.randn(20_000, 1, generator=generator, dtype=torch.float64)

    grid = torch.linspace(1, 0, 401, dtype=torch.float64)
    shifts = []
    for count in (0, 1, 2):
        end = restarting(heun, count, (0.2, 0.5))(wrong, noise(), grid, path, noise)
        shifts.append(float(end.mean()) - MEAN)
    (factor, _), (upper, _) = level(path, 0.2), level(path, 0.5)
    kept = upper / factor * spread(path, 0.2) / spread(path, 0.5)
    assert shifts[0] > 0.1
    assert shifts[1] == pytest.approx(kept * shifts[0], abs=0.02)
    assert shifts[2] == pytest.approx(kept**2 * shifts[0], abs=0.02)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "ancestral"])
def test_restarts_cost_the_steps_of_their_interval(name: str):
    path, calls = LogSNRPath(8.0, -8.0), []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return denoiser(path)(z, t)

    restarting(SOLVERS[name], 3, (0.3, 0.6))(denoise, NOISE, times.grid(10), path, lambda: torch.randn_like(NOISE))
    assert len(calls) == 10 + 3 * 3
    assert calls.count(calls[4]) == 4 and round(calls[4], 9) == 0.6


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.01), (0.99, 1.0), (0.4, 0.41)])
def test_restart_intervals_have_a_step_at_least(interval: tuple[float, float]):
    path, calls = LinearPath(), []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return denoiser(path)(z, t)

    end = restarting(euler, 2, interval)(denoise, NOISE, times.grid(5), path, lambda: torch.zeros_like(NOISE))
    assert len(calls) in (5 + 2, 5 + 2 * 5)
    assert end.shape == NOISE.shape and bool(end.isfinite().all())
