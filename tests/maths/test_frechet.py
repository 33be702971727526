"""Frechet distance: closed forms in float64, and both ways of computing it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unilatent.maths.frechet import frechet_distance, frechet_distance_of, moments


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normals(d, d, seed=seed))[0]


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_one_dimension():
    """(mu_a - mu_b)^2 + (s_a - s_b)^2."""
    a = (torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = (torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double())
    assert frechet_distance(a, b) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_diagonal_covariances():
    zero = torch.zeros(3).double()
    a, b = (zero, diagonal(1, 4, 9)), (zero + 1, diagonal(4, 4, 1))
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4, rel=1e-12)


def test_commuting_covariances_in_any_basis():
    q, zero = rotation(4), torch.zeros(4).double()
    a = (zero, q @ diagonal(1, 2, 3, 4) @ q.T)
    b = (zero, q @ diagonal(9, 1, 5, 0.5) @ q.T)
    want = sum((x**0.5 - y**0.5) ** 2 for x, y in zip((1, 2, 3, 4), (9, 1, 5, 0.5), strict=True))
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-10)


def test_covariances_that_do_not_commute():
    """A 2 x 2 case by hand: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = C_a C_b."""
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[4.0, -1.0], [-1.0, 1.0]]).double()
    product = a @ b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    assert frechet_distance((zero, a), (zero, b)) == pytest.approx(float(a.trace() + b.trace() - 2 * root), rel=1e-10)


def test_rank_deficient():
    zero = torch.zeros(3).double()
    flat, point = (zero, diagonal(4, 0, 0)), (zero, diagonal(0, 0, 0))
    other = (zero, diagonal(0, 9, 0))
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(flat, point) == pytest.approx(4) and frechet_distance(flat, other) == pytest.approx(13)


def test_moments():
    features = normals(50, 3)
    mean, covariance = moments(features.float())
    torch.testing.assert_close(mean, features.float().double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.float().double().T))
    assert mean.dtype == covariance.dtype == torch.float64


SIZES = [(400, 300, 5), (30, 20, 64), (20, 100, 64), (64, 64, 64), (63, 63, 64), (2, 2, 8)]


@pytest.mark.parametrize(("na", "nb", "d"), SIZES)
def test_both_ways_agree(na: int, nb: int, d: int):
    a, b = normals(na, d) @ rotation(d) * 2 + 1, normals(nb, d, seed=1) * torch.linspace(0.1, 3, d).double()
    want = frechet_distance(moments(a), moments(b))
    assert frechet_distance_of(a, b) == pytest.approx(want, rel=1e-5)
    assert frechet_distance_of(a, b) == pytest.approx(frechet_distance_of(b, a), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(200, 5), (20, 64)])
def test_identical_sets_in_any_order_are_at_zero_and_a_shift_costs_its_square(n: int, d: int):
    a = normals(n, d)
    assert frechet_distance_of(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance_of(a, a + 0.5) == pytest.approx(0.25 * d, rel=1e-6)
    assert frechet_distance_of(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * float(a.var(0).sum()), rel=1e-6)


def test_float32_features_are_compared_in_float64():
    a = (normals(20, 64) * 1e-3 + 100).float()
    assert frechet_distance_of(a, a) < 1e-12


@pytest.mark.parametrize("shape", [(1, 4), (4,), (3, 4, 5), (0, 4)])
def test_shapes_that_have_no_covariance_are_refused(shape: tuple[int, ...]):
    for call in (lambda x: moments(x), lambda x: frechet_distance_of(x, normals(5, 4)),
                 lambda x: frechet_distance_of(normals(5, 4), x)):  # fmt: skip
        with pytest.raises(ValueError, match="need \\(N, D\\) with N >= 2"):
            call(torch.zeros(shape))


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match="the same D, got 4 and 5"):
        frechet_distance_of(normals(6, 4), normals(6, 5))
