"""Metrics of features: closed forms and small sets computed by hand. Agreement with published code: tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unilatent.maths.fidelity import (
    KernelVariance,
    density_coverage,
    inception_score,
    inception_score_of,
    kernel_distance,
    neighbour_distance,
    precision_recall,
    squared_mmd,
)
from unilatent.maths.frechet import RunningMoments, frechet_distance, frechet_distance_of, moments
from unilatent.maths.streams import generator


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points(*values: float) -> Tensor:
    """On a line, (N, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def gaussian(values: Tensor, basis: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the covariance with these eigenvalues (R,) along the first R columns of the basis (D, D)."""
    vectors = basis[:, : len(values)]
    return mean, (vectors * values) @ vectors.T


# Frechet distance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "rank_a", "rank_b"), [(64, 64, 64), (256, 10, 256), (256, 256, 10), (256, 10, 10)])
def test_frechet_of_known_gaussians_of_any_rank(d: int, rank_a: int, rank_b: int):
    """Covariances with common eigenvectors: |mu|^2 + sum (sqrt a - sqrt b)^2, ranks padded by zeros."""
    basis = torch.linalg.qr(normals(d, d))[0]
    a, b = torch.linspace(1, 3, rank_a).double().square(), torch.linspace(0.1, 2, rank_b).double().square()
    mean = normals(d, seed=1)
    roots = torch.zeros(2, d, dtype=torch.float64)
    roots[0, :rank_a], roots[1, :rank_b] = a.sqrt(), b.sqrt()
    want = float(mean.square().sum() + (roots[0] - roots[1]).square().sum())
    found = frechet_distance(gaussian(a, basis, mean), gaussian(b, basis, 0 * mean))
    assert found == pytest.approx(want, rel=1e-8)


@pytest.mark.slow
def test_frechet_at_the_width_of_inception_and_rank_100():
    test_frechet_of_known_gaussians_of_any_rank(2048, 100, 100)
    test_frechet_of_known_gaussians_of_any_rank(2048, 100, 2048)


def test_frechet_of_covariances_that_do_not_commute():
    """tr of the root of a 2 x 2 product from its trace and determinant: sqrt(tr + 2 sqrt(det))."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    product, zero = a @ b, torch.zeros(2).double()
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    want = float(a.trace() + b.trace() - 2 * root)
    assert want > 0.1
    assert frechet_distance((zero, a), (zero, b)) == pytest.approx(want, rel=1e-12)


def test_frechet_of_constant_sets_is_their_distance():
    a, b = torch.zeros(5, 3), torch.full((7, 3), 2.0)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(12)


def test_a_set_has_no_distance_to_itself_even_where_rank_is_low():
    for features in (normals(300, 64), normals(40, 64), normals(300, 64).relu() * torch.logspace(-6, 0, 64)):
        assert frechet_distance(moments(features), moments(features)) < 1e-6
        assert frechet_distance_of(features, features) < 1e-6


def test_frechet_refuses_unlike_widths_and_numbers_that_are_none():
    with pytest.raises(ValueError, match="the same D, got 4 and 5"):
        frechet_distance(moments(normals(9, 4)), moments(normals(9, 5)))
    bad = normals(9, 4)
    bad[3, 1] = torch.nan
    for call in (lambda: moments(bad), lambda: frechet_distance_of(bad, bad), lambda: RunningMoments().add(bad)):
        with pytest.raises(ValueError, match="NaN or infinity in 1 of 9 samples"):
            call()
    with pytest.raises(ValueError, match="moments: they contain NaN"):
        frechet_distance((torch.zeros(2), torch.eye(2) * torch.nan), (torch.zeros(2), torch.eye(2)))


# Streaming moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[500], [1, 499], [7, 0, 93, 400], [100] * 5])
def test_streaming_moments_are_the_moments_of_everything(parts: list[int]):
    features = (normals(500, 24) * torch.linspace(0.1, 3, 24) + 1000).float()
    running = RunningMoments()
    for part in features.split(parts):
        running.add(part)
    assert running.count == 500
    for found, want in zip(running.moments(), moments(features), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_merged_moments_are_the_moments_of_everything_and_leave_the_others_alone():
    features = normals(300, 8) + 50
    parts = [RunningMoments() for _ in range(4)]
    for running, part in zip(parts, features.split([120, 0, 1, 179]), strict=True):
        running.add(part)
    before = parts[3].moments()
    total = RunningMoments()
    for running in parts:
        total.merge(running)
    total.add(features[:0])
    for found, want in zip(total.moments(), moments(features), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before, parts[3].moments(), strict=True))
    first = parts[0].moments()
    total.add(features)  # what was merged into an empty one is a copy
    assert all(torch.equal(a, b) for a, b in zip(first, parts[0].moments(), strict=True))


def test_streaming_refuses_another_width_and_too_few():
    running = RunningMoments()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        running.moments()
    running.add(normals(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        running.moments()
    with pytest.raises(ValueError, match="the same D, got 4 and 5"):
        running.add(normals(3, 5))
    other = RunningMoments()
    other.add(normals(3, 6))
    with pytest.raises(ValueError, match="the same D, got 4 and 6"):
        running.merge(other)
    assert running.count == 1


# Kernel distance ----------------------------------------------------------------------------------------------------


def test_kernel_distance_by_hand():
    """D = 1, k = (xy + 1)^3: within {0, 1} 1, within {1, 2} 27, across (1 + 1 + 8 + 27) / 4."""
    a, b = points(0, 1), points(1, 2)
    assert squared_mmd(a, b) == pytest.approx(1 + 27 - 2 * 37 / 4, rel=1e-12)
    found = kernel_distance(a, b)
    assert found.mean == pytest.approx(9.5, rel=1e-12) and found.std is None


def test_kernel_distance_divides_by_the_width():
    """Two orthogonal pairs in four channels: every inner product is 0 or 4, over D = 4."""
    a = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]])
    assert squared_mmd(a, a) == pytest.approx(1 + 1 - 2 * (8 + 8 + 1 + 1) / 4, rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Of two sets from one distribution it is zero on average: within three standard errors, and of both signs."""
    found = torch.tensor([squared_mmd(normals(20, 8, seed=2 * i), normals(20, 8, seed=2 * i + 1)) for i in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert 0.2 < (found < 0).double().mean() < 0.8
    biased = found.mean() + 2 * 4 / 20 / 2  # what keeping the diagonal would add, roughly
    assert biased > 10 * found.std() / 20


def test_kernel_distance_repeats_and_sees_a_shift():
    a, b = normals(200, 8), normals(150, 8, seed=1)
    assert kernel_distance(a, b, subset_size=50, subsets=10) == kernel_distance(a, b, subset_size=50, subsets=10)
    assert kernel_distance(a, b, subset_size=50, subsets=10, seed=1) != kernel_distance(
        a, b, subset_size=50, subsets=10
    )
    assert kernel_distance(a, b + 1, subset_size=50, subsets=10).mean > 1


def draw(n: int, seed: int, shift: float = 0.0) -> Tensor:
    """Gaussian features (n, 16) of unequal variances."""
    return normals(n, 16, seed=seed) * torch.linspace(0.2, 1.5, 16) + shift


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize(
    ("n", "m", "subset_size", "repeats"),
    [(100, 100, 1000, 200), (500, 500, 1000, 80), (500, 200, 1000, 100), (1000, 1000, 1000, 40), (150, 150, 100, 150),
     (400, 400, 100, 80), pytest.param(1500, 1500, 1000, 24, marks=pytest.mark.slow),
     pytest.param(5000, 5000, 1000, 16, marks=pytest.mark.slow)],
)  # fmt: skip
def test_standard_error_is_the_spread_between_draws(n: int, m: int, subset_size: int, repeats: int, shift: float):
    """Sets below, just above and far above the size of a subset, of equal and of different distributions."""
    draws = [
        kernel_distance(draw(n, 2 * i), draw(m, 2 * i + 1, shift), subset_size=subset_size, subsets=10)
        for i in range(repeats)
    ]
    means, errors = (torch.tensor(column) for column in zip(*draws, strict=True))
    assert 1 / 1.5 < errors.square().mean().sqrt() / means.std() < 1.5
    assert (errors > means.std() / 4).all(), "no single error is far too small"


def test_the_mean_over_subsets_is_the_published_one_and_its_error_falls_with_their_number():
    a, b = draw(300, 0), draw(300, 1, 0.2)
    one, many = (kernel_distance(a, b, subset_size=100, subsets=count) for count in (1, 50))
    stream = generator("kernel distance", 0)
    pair = [x[torch.randperm(300, generator=stream)[:100]] for x in (a, b)]
    assert one.mean == pytest.approx(squared_mmd(*pair), rel=1e-12)
    variance = KernelVariance.of(a, b)
    whole, part = variance.at(300, 300), variance.at(100, 100)
    assert one.std == pytest.approx(part**0.5) and many.std == pytest.approx((whole + (part - whole) / 50) ** 0.5)
    assert whole < 0.5 * part


def test_parts_of_the_kernel_variance():
    """By brute force: the centred kernels of twelve samples, with U-centring; blocks change nothing."""
    a, b = draw(12, 0), draw(9, 1, 0.5)
    found = KernelVariance.of(a, b)
    k = ((a @ a.T / 16 + 1) ** 3).fill_diagonal_(0)
    row, total = k.sum(1), k.sum()
    centred = k - row[:, None] / 10 - row / 10 + total / 110
    assert found.within_a == pytest.approx(float(centred.fill_diagonal_(0).square().sum() / (12 * 9)))
    cross = (a @ b.T / 16 + 1) ** 3
    residual = cross - cross.mean(1, keepdim=True) - cross.mean(0) + cross.mean()
    assert found.across == pytest.approx(float(residual.square().sum() / (11 * 8)))
    witness = row / 11 - cross.mean(1)
    assert found.witness_a == pytest.approx(float(witness.var()) - found.within_a / 11 - found.across / 9)
    assert KernelVariance.of(a, b, block=5) == pytest.approx(found) and KernelVariance.of(b, a) == pytest.approx(
        (found.witness_b, found.witness_a, found.within_b, found.within_a, found.across)
    )


@pytest.mark.parametrize("sizes", [(2, 2), (3, 50), (50, 3)])
def test_too_few_samples_have_no_standard_error(sizes: tuple[int, int]):
    a, b = draw(sizes[0], 0), draw(sizes[1], 1)
    assert kernel_distance(a, b).std is None
    assert kernel_distance(draw(4, 0), draw(4, 1)).std is not None


# Inception Score ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
def test_score_of_certain_and_balanced_classes_is_their_number(seed: int | None):
    found = inception_score(torch.eye(7).repeat(10, 1), splits=1, seed=seed)
    assert found.mean == pytest.approx(7, rel=1e-12) and found.std is None, "one split has no spread"


def test_score_of_certain_and_balanced_classes_in_splits():
    found = inception_score(torch.eye(5).repeat(10, 1), splits=10)
    assert found.mean == pytest.approx(5, rel=1e-12) and found.std < 1e-12


def test_score_of_no_opinion_is_one():
    found = inception_score(torch.full((50, 10), 0.1))
    assert found.mean == pytest.approx(1, rel=1e-6) and found.std < 1e-6


@pytest.mark.parametrize(("samples", "known"), [(10, False), (19, False), (20, True)])
def test_splits_of_one_sample_have_no_spread(samples: int, known: bool):
    """The score of a single sample is 1 whatever it is: a spread of 0 would say nothing."""
    p = normals(samples, 6).softmax(1)
    for found in (inception_score(p), inception_score_of(p.split(3), samples)):
        assert (found.std is not None) == known
        assert known or samples > 10 or found.mean == pytest.approx(1)


def test_score_by_hand():
    """Two splits: {certain, certain of the other} scores 2, {undecided, undecided} scores 1."""
    p = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]])
    assert inception_score(p, splits=2) == pytest.approx((1.5, 0.5), rel=1e-12)


def test_splits_of_samples_sorted_by_class_need_a_random_order():
    p = torch.eye(4).repeat_interleave(50, 0)
    assert inception_score(p, splits=4).mean == pytest.approx(1)
    shuffled = inception_score(p, splits=4, seed=0)
    assert shuffled.mean > 3.5 and shuffled == inception_score(p, splits=4, seed=0)


def test_score_refuses_logits_and_too_few():
    with pytest.raises(ValueError, match="rows must be non-negative and sum to 1"):
        inception_score(normals(20, 4))
    with pytest.raises(ValueError, match=r"N >= 10, got shape \(9, 4\)"):
        inception_score(torch.full((9, 4), 0.25))
    with pytest.raises(ValueError, match="splits: needs at least 1, got 0"):
        inception_score(torch.full((9, 4), 0.25), splits=0)


# Neighbours ---------------------------------------------------------------------------------------------------------


def test_neighbours_do_not_count_the_sample_itself():
    """0, 1, 3, 7: nearest at 1, 1, 2, 4; second at 3, 2, 3, 6."""
    line = points(0, 1, 3, 7)
    assert neighbour_distance(line, 1).tolist() == [1, 1, 4, 16]
    assert neighbour_distance(line, 2, block=3).tolist() == [9, 4, 9, 36]
    assert neighbour_distance(points(2, 2, 5), 1).tolist() == [0, 0, 9]


def test_precision_and_recall_by_hand():
    """k = 1. Real 0, 1, 10, 12 have balls [-1, 1], [0, 2], [8, 12], [10, 14]; generated 0.5, 1.5, 5, 20 have
    [-0.5, 1.5], [0.5, 2.5], [1.5, 8.5], [5, 35]: two of four generated, all of four real ones are inside."""
    real, generated = points(0, 1, 10, 12), points(0.5, 1.5, 5, 20)
    assert precision_recall(real, generated, k=1) == (0.5, 1.0)
    assert precision_recall(generated, real, k=1) == (1.0, 0.5)
    assert precision_recall(real, generated, k=1, block=3) == (0.5, 1.0)


def test_density_and_coverage_by_hand():
    """k = 1, the same balls: 0.5 lies in two, 1.5 in one, 5 and 20 in none; the balls of 0 and 1 hold something."""
    real, generated = points(0, 1, 10, 12), points(0.5, 1.5, 5, 20)
    assert density_coverage(real, generated, k=1) == (0.75, 0.5)
    assert density_coverage(real, generated, k=1, block=1) == (0.75, 0.5)


def test_collapse_and_copies():
    real = normals(400, 4)
    copies = precision_recall(real, real)
    assert copies == (1.0, 1.0) and density_coverage(real, real).coverage == 1
    collapsed = real[:1] + 1e-3 * normals(400, 4, seed=1)
    assert precision_recall(real, collapsed).precision == 1 and precision_recall(real, collapsed).recall < 0.02
    assert density_coverage(real, collapsed).coverage < 0.1
    elsewhere = normals(400, 4, seed=2) + 100
    assert precision_recall(real, elsewhere) == (0, 0) and density_coverage(real, elsewhere) == (0, 0)


def test_the_same_distribution_is_dense_and_covered():
    """Naeem et al., section 3.3: coverage is 1 - 2^-k and density 1, in expectation, at equal large sizes."""
    real, generated = normals(3000, 8), normals(3000, 8, seed=1)
    density, coverage = density_coverage(real, generated)
    assert density == pytest.approx(1, abs=0.06) and coverage == pytest.approx(1 - 2**-5, abs=0.015)


def test_blocks_change_nothing():
    real, generated = normals(101, 6).float(), 1.2 * normals(77, 6, seed=1).float()
    assert precision_recall(real, generated, block=10) == precision_recall(real, generated)
    assert density_coverage(real, generated, block=10) == density_coverage(real, generated)


@pytest.mark.parametrize(
    "measure", [kernel_distance, precision_recall, density_coverage], ids=lambda measure: measure.__name__
)
def test_what_cannot_be_compared_is_refused(measure):
    good, bad = normals(9, 4), normals(9, 4)
    bad[2, 3] = torch.inf
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="NaN or infinity in 1 of 9 samples"):
            measure(*pair)
    with pytest.raises(ValueError, match="the same D, got 4 and 5"):
        measure(good, normals(9, 5))
    for pair in ((good, good[:1]), (good[:1], good)):
        with pytest.raises(ValueError, match=r"N >= \d, got shape \(1, 4\)"):
            measure(*pair)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_inception_score_in_parts_is_that_of_the_whole(size: int):
    p = torch.randn(237, 12, generator=torch.Generator().manual_seed(0)).double().mul(3).softmax(1)
    whole, parts = inception_score(p), inception_score_of(p.split(size), 237)
    assert parts == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="splits: needs 1 to 5 of 5 samples, got 10"):
        inception_score_of(p[:5].split(2), 5)
