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
    """Mean and population standard deviation (divisor n) over subsets or splits."""

    mean: float
    std: float


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
    """
    size = min(subset_size, len(check_features(real)), len(check_features(generated, like=real)))
    if size < 2 or subsets < 1:
        raise ValueError(f"kernel distance: needs subset_size >= 2 and subsets >= 1, got {size} and {subsets}")
    stream = generator("kernel distance", seed)
    values = []
    for _ in range(subsets):
        pair = [rows[torch.randperm(len(rows), generator=stream)[:size].to(rows.device)] for rows in (real, generated)]
        values.append(squared_mmd(*pair))
    return _estimate(values)


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Return the unbiased estimate of MMD^2 between (N, D) and (M, D), N, M >= 2, with the kernel (x.y / D + 1)^3.

    The mean of k over pairs of different samples of a, plus the same of b, minus twice the mean over pairs of one
    sample of each (Gretton et al. 2012, eq. 3).
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int | None = None) -> Estimate:
    """Return the Inception Score exp(mean KL(p(y|x) || p(y))) over splits, between 1 and C.

    (Salimans et al. 2016, arXiv:1606.03498.) probabilities: (N, C), rows that sum to 1: `logits.double().softmax(1)`;
    N >= splits. A split is N / splits consecutive rows: in the given order if seed is None (samples sorted by class
    then score low), otherwise in a seeded random order.
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
    return _estimate(scores)


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
    return _estimate(scores.tolist())


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


def _estimate(values: list[float]) -> Estimate:
    results = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(results.mean()), float(results.std(correction=0)))
