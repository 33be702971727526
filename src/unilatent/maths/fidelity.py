"""Metrics of generated samples from features: kernel distance (KID), Inception Score, precision and recall, density and
coverage. All in float64, on the device of the features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .frechet import check_features
from .streams import generator


class Estimate(NamedTuple):
    """A number and its standard deviation; None where the samples are too few to know it."""

    mean: float
    std: float | None


class PrecisionRecall(NamedTuple):
    """Each in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density >= 0, about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


def kernel_distance(
    real: Tensor, generated: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> Estimate:
    """Return the KID (Binkowski et al. 2018, arXiv:1801.01401): squared MMD with the kernel (x.y / D + 1)^3.

    The estimator is unbiased, so it can be negative. real, generated: (N, D), N >= 2 each. Mean over `subsets` pairs of
    random subsets, drawn without replacement, of `subset_size` samples each or as many as the smaller set has.

    std: the standard error of that mean, which is how much it varies between sets of these sizes (`KernelVariance`).
    The spread of the subsets is not: they share samples, and are all the same if a set has no more than `subset_size`.
    None for fewer than four samples in a set.
    """
    size = min(subset_size, len(check_features(real)), len(check_features(generated, like=real)))
    if size < 2 or subsets < 1:
        raise ValueError(f"kernel distance: needs subset_size >= 2 and subsets >= 1, got {size} and {subsets}")
    stream = generator("kernel distance", seed)
    values = []
    for _ in range(subsets):
        pair = [rows[torch.randperm(len(rows), generator=stream)[:size].to(rows.device)] for rows in (real, generated)]
        values.append(squared_mmd(*pair))
    mean = float(torch.tensor(values, dtype=torch.float64).mean())
    if min(len(real), len(generated)) < 4:
        return Estimate(mean, None)
    variance = KernelVariance.of(real, generated)
    whole, part = variance.at(len(real), len(generated)), variance.at(size, size)
    return Estimate(mean, (whole + max(part - whole, 0.0) / subsets) ** 0.5)


class KernelVariance(NamedTuple):
    """What the variance of `squared_mmd` between two sets from two distributions consists of (its Hoeffding
    decomposition; Sutherland et al. 2017, arXiv:1611.04488, appendix A), each part estimated without bias.

    witness_a, witness_b: variance of the witness function, the difference of the two mean kernels, over each
        distribution; both are 0 if the distributions are equal. within_a, within_b, across: mean square of the kernel,
        centred in both arguments, between samples of one distribution, and of one each.
    """

    witness_a: float
    witness_b: float
    within_a: float
    within_b: float
    across: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, block: int = 1024) -> KernelVariance:
        """Estimate from (N, D) and (M, D), N, M >= 4, in float64. Memory: block x N kernels."""
        a, b = a.double(), b.double().to(a.device)
        n, m = len(a), len(b)
        square_a, rows_a = _kernel_sums(a, a, block, diagonal=False)
        square_b, rows_b = _kernel_sums(b, b, block, diagonal=False)
        square, across_a = _kernel_sums(a, b, block)
        _, across_b = _kernel_sums(b, a, block)
        within_a, within_b = _centred_square(square_a, rows_a), _centred_square(square_b, rows_b)
        residual = square - across_a.square().sum() / m - across_b.square().sum() / n + across_a.sum() ** 2 / (n * m)
        across = float(residual) / ((n - 1) * (m - 1))
        witness_a, witness_b = rows_a / (n - 1) - across_a / m, rows_b / (m - 1) - across_b / n
        return cls(
            float(witness_a.var()) - within_a / (n - 1) - across / m,  # without what the means' own errors add
            float(witness_b.var()) - within_b / (m - 1) - across / n,
            within_a, within_b, across,
        )  # fmt: skip

    def at(self, n: int, m: int) -> float:
        """Return the variance for sets of n and m samples."""
        first = 4 * self.witness_a / n + 4 * self.witness_b / m
        second = 2 * self.within_a / (n * (n - 1)) + 2 * self.within_b / (m * (m - 1)) + 4 * self.across / (n * m)
        second = max(second, 0.0)
        return max(first + second, second / 2)  # an estimate of first may be below 0


def _kernel_sums(a: Tensor, b: Tensor, block: int, diagonal: bool = True) -> tuple[Tensor, Tensor]:
    """Sum of all squared kernels between (N, D) and (M, D), and the sum of each row's kernels (N,)."""
    square, rows = a.new_zeros(()), []
    for start, part in zip(range(0, len(a), block), a.split(block), strict=True):
        k = _kernel(part, b)
        if not diagonal:
            k.diagonal(start).zero_()
        square += k.square().sum()
        rows.append(k.sum(1))
    return square, torch.cat(rows)


def _centred_square(square: Tensor, rows: Tensor) -> float:
    """Unbiased mean square of a centred kernel, from the sums over pairs of different samples (U-centring; Szekely and
    Rizzo 2014, prop. 1)."""
    n = len(rows)
    total = square - 2 / (n - 2) * rows.square().sum() + rows.sum() ** 2 / ((n - 1) * (n - 2))
    return float(total) / (n * (n - 3))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Return the unbiased estimate of MMD^2 between (N, D) and (M, D), N, M >= 2, with the kernel (x.y / D + 1)^3.

    The mean of k over pairs of different samples of a, plus the same of b, minus twice the mean over pairs of one
    sample of each (Gretton et al. 2012, eq. 3).
    """
    a, b = a.double(), b.double()

    def within(x: Tensor) -> Tensor:
        k = _kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int | None = None) -> Estimate:
    """Return the Inception Score exp(mean KL(p(y|x) || p(y))) over splits, between 1 and C.

    (Salimans et al. 2016, arXiv:1606.03498.) probabilities: (N, C), rows that sum to 1: `logits.double().softmax(1)`;
    N >= splits. A split is N / splits consecutive rows: in the given order if seed is None (samples sorted by class
    then score low), otherwise in a seeded random order.

    std: over the splits (divisor n), as published: how much the score of N / splits samples varies. None for one split,
    or splits of one sample, whose score is always 1.
    """
    if splits < 1:
        raise ValueError(f"splits: needs at least 1, got {splits}")
    check_features(probabilities, at_least=splits)
    p = probabilities.double()
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-4).any()):
        raise ValueError("probabilities: rows must be non-negative and sum to 1; take the softmax of logits")
    if seed is not None:
        p = p[torch.randperm(len(p), generator=generator("inception score", seed)).to(p.device)]
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for part in (p[start:end] for start, end in pairwise(bounds)):
        marginal = part.mean(0)
        kl = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)  # (n,)
        scores.append(float(kl.mean().exp()))
    return _over_splits(scores, len(p))


def inception_score_of(parts: Iterable[Tensor], total: int, *, splits: int = 10) -> Estimate:
    """Return `inception_score` (seed None) of probabilities (n, C) that arrive in parts, `total` rows together.

    Stores (splits, C) numbers: the mean KL of a split is the mean of sum p log p, minus sum q log q of the mean q.
    """
    if not 1 <= splits <= total:
        raise ValueError(f"splits: needs 1 to {total} of {total} samples, got {splits}")
    bounds = torch.tensor([i * total // splits for i in range(1, splits + 1)])
    sums = entropies = torch.zeros(0)
    row = 0
    for part in parts:
        p = check_features(part, at_least=0).double()
        if not row:
            sums, entropies = p.new_zeros(splits, p.shape[1]), p.new_zeros(splits)
        split = torch.bucketize(torch.arange(row, row + len(p)), bounds, right=True).to(p.device)
        sums.index_add_(0, split, p)
        entropies.index_add_(0, split, torch.xlogy(p, p).sum(1))
        row += len(p)
    assert row == total, (row, total)
    counts = bounds.diff(prepend=torch.zeros(1, dtype=torch.long)).to(sums.device)
    marginals = sums / counts[:, None]
    scores = (entropies / counts - torch.xlogy(marginals, marginals).sum(1)).exp()
    return _over_splits(scores.tolist(), total)


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3, block: int = 1024) -> PrecisionRecall:
    """Return precision, the share of generated samples inside the ball of a real one, and recall, the reverse.

    (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2.) A sample's ball reaches to its k-th nearest neighbour in
    its own set and includes the surface. real, generated: (N, D), N > k each. Memory: block x N distances.
    """
    real, generated = _pair(real, generated, k)
    real_radius, generated_radius = neighbour_distance(real, k, block), neighbour_distance(generated, k, block)
    precise = sum(int((d <= real_radius).any(1).sum()) for d in _distances(generated, real, block))
    recalled = sum(int((d <= generated_radius).any(1).sum()) for d in _distances(real, generated, block))
    return PrecisionRecall(precise / len(generated), recalled / len(real))


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5, block: int = 1024) -> DensityCoverage:
    """Return density, the mean number of real balls around a generated sample divided by k, and coverage, the share of
    real samples whose ball contains a generated one (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4).

    Balls, shapes and memory as in `precision_recall`.
    """
    real, generated = _pair(real, generated, k)
    radius = neighbour_distance(real, k, block)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for d in _distances(generated, real, block):
        hit = d <= radius  # (block, N)
        inside += int(hit.sum())
        covered |= hit.any(0)
    return DensityCoverage(inside / (k * len(generated)), float(covered.double().mean()))


def neighbour_distance(features: Tensor, k: int, block: int = 1024) -> Tensor:
    """Return the squared distance from each row (N, D), N > k, to its k-th nearest other row. (N,) float64."""
    features = features.double()
    distances = []
    for start, d in zip(range(0, len(features), block), _distances(features, features, block), strict=True):
        rows = torch.arange(len(d), device=d.device)
        d[rows, start + rows] = torch.inf  # the row itself
        distances.append(d.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(distances)


def _distances(rows: Tensor, columns: Tensor, block: int) -> Iterator[Tensor]:
    """Yield squared distances (n, M) from n <= block rows at a time to all columns; negative rounding errors are 0."""
    norms = columns.square().sum(1)
    for part in rows.split(block):
        yield (part.square().sum(1, keepdim=True) + norms - 2 * part @ columns.T).clamp_(min=0)


def _pair(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"k: needs at least 1 neighbour, got {k}")
    check_features(real, at_least=k + 1)
    check_features(generated, like=real, at_least=k + 1)
    return real.double(), generated.double().to(real.device)


def _over_splits(scores: list[float], samples: int) -> Estimate:
    results = torch.tensor(scores, dtype=torch.float64)
    known = len(scores) > 1 and samples >= 2 * len(scores)
    return Estimate(float(results.mean()), float(results.std(correction=0)) if known else None)
