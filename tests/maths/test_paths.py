"""Noise paths: derivatives against autograd, end points, inverses, broadcasting; all in float64."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath, expand

LOGSNR = [LogSNRPath(), LogSNRPath(5.0, -10.0), LogSNRPath(10.0, -10.0, "linear"), LogSNRPath(4.6, -3.0, "linear")]
PATHS = [LinearPath(), *LOGSNR]
INSIDE = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)

every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
every_logsnr_path = pytest.mark.parametrize("path", LOGSNR, ids=repr)


def derivative(function, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_path
def test_derivatives_are_those_of_autograd(path: NoisePath):
    torch.testing.assert_close(path.dalpha(INSIDE), derivative(path.alpha, INSIDE), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.dsigma(INSIDE), derivative(path.sigma, INSIDE), rtol=1e-9, atol=1e-12)


@every_logsnr_path
def test_derivative_of_logsnr(path: LogSNRPath):
    torch.testing.assert_close(path.dlogsnr(INSIDE), derivative(path.logsnr, INSIDE), rtol=1e-9, atol=1e-12)
    assert (path.dlogsnr(INSIDE) < 0).all()


@every_path
def test_logsnr_is_that_of_alpha_and_sigma_and_falls(path: NoisePath):
    torch.testing.assert_close(path.logsnr(INSIDE), (path.alpha(INSIDE) ** 2 / path.sigma(INSIDE) ** 2).log())
    assert (path.logsnr(INSIDE).diff() < 0).all()


@every_logsnr_path
def test_variance_is_preserved(path: LogSNRPath):
    torch.testing.assert_close(path.alpha(INSIDE) ** 2 + path.sigma(INSIDE) ** 2, torch.ones_like(INSIDE))


@every_logsnr_path
def test_ends_are_exact(path: LogSNRPath):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    want = torch.tensor([path.start, path.end], dtype=torch.float64)
    torch.testing.assert_close(path.logsnr(ends), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(path.logsnr(ends.float()), want.float(), rtol=0, atol=1e-3)


def test_cosine_is_the_cosine_schedule_far_from_its_ends():
    """Without truncation logsnr = -2 log tan(pi t / 2) (Hoogeboom et al. 2023)."""
    want = -2 * (torch.pi * INSIDE / 2).tan().log()
    torch.testing.assert_close(LogSNRPath(60.0, -60.0).logsnr(INSIDE), want, rtol=1e-9, atol=1e-9)


def test_linear_path_goes_from_data_to_noise():
    x, eps = normals(3, 4), normals(3, 4, seed=1)
    path = LinearPath()
    assert torch.equal(path.add_noise(x, eps, 0.0), x) and torch.equal(path.add_noise(x, eps, 1.0), eps)
    assert path.feature(torch.tensor(0.25)) == 0.75


@every_path
def test_velocity_is_the_derivative_of_the_noisy_sample(path: NoisePath):
    x, eps = normals(25, 3), normals(25, 3, seed=1)
    z = path.add_noise(x, eps, INSIDE)
    want = path.dalpha(INSIDE)[:, None] * x + path.dsigma(INSIDE)[:, None] * eps
    torch.testing.assert_close(path.velocity(z, x, INSIDE), want, rtol=1e-9, atol=1e-9)


def test_linear_velocity_divides_by_the_clamped_time():
    x, eps = normals(4, 3), normals(4, 3, seed=1)
    t = torch.tensor([0.01, 0.05, 0.06, 1.0], dtype=torch.float64)
    path = LinearPath(min_time=0.05)
    z = path.add_noise(x, eps, t)
    want = (z - x) / torch.tensor([0.05, 0.05, 0.06, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(path.velocity(z, x, t), want)
    torch.testing.assert_close(path.velocity(z[:1], x[:1], 0.01), want[:1])


@every_path
def test_noise_of_inverts_add_noise(path: NoisePath):
    x, eps = normals(25, 2, 3), normals(25, 2, 3, seed=1)
    torch.testing.assert_close(path.noise_of(path.add_noise(x, eps, INSIDE), x, INSIDE), eps, rtol=1e-6, atol=1e-8)


@every_path
@pytest.mark.parametrize("verb", ["add_noise", "noise_of", "velocity"])
def test_every_form_of_time_broadcasts_like_an_explicit_loop(path: NoisePath, verb: str):
    a, b = normals(5, 2, 3), normals(5, 2, 3, seed=1)
    function = getattr(path, verb)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    rows = torch.cat([function(a[i : i + 1], b[i : i + 1], float(t[i])) for i in range(5)])
    torch.testing.assert_close(function(a, b, t), rows, rtol=1e-12, atol=1e-12)
    whole = function(a, b, 0.3)
    torch.testing.assert_close(function(a, b, torch.tensor(0.3, dtype=torch.float64)), whole, rtol=0, atol=0)
    torch.testing.assert_close(
        function(a, b, torch.full((5,), 0.3, dtype=torch.float64)), whole, rtol=1e-12, atol=1e-12
    )


@every_path
def test_results_keep_the_precision_of_the_data(path: NoisePath):
    x, eps = normals(2, 3).float(), normals(2, 3, seed=1).float()
    for t in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.full((2,), 0.5)):
        for verb in (path.add_noise, path.noise_of, path.velocity):
            assert verb(x, eps, t).dtype == torch.float32


def test_expand():
    like = torch.zeros(4, 2, 3)
    assert expand(torch.zeros(4), like).shape == (4, 1, 1)
    assert expand(torch.tensor(0.5), like).shape == () and expand(0.5, like).shape == ()
    assert expand(0.1, like).dtype == torch.float64


def test_impossible_paths_are_refused():
    with pytest.raises(ValueError, match=r"start -3.0 must exceed end 3.0"):
        LogSNRPath(-3.0, 3.0)
    with pytest.raises(ValueError, match="'sigmoid' is unknown"):
        LogSNRPath(shape="sigmoid")
