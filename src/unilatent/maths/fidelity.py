"""How like real samples generated ones are, from features of both: kernel distance, Inception Score, precision and
recall, density and coverage. All in float64, on whatever device the features are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .frechet import check_features
from .streams import generator


class Estimate(NamedTuple):
    """Over subsets or splits: their mean, and their standard deviation (of the population, not its estimate)."""

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
    """KID (Binkowski et al. 2018, arXiv:1801.01401): squared MMD with the kernel (x.y / D + 1)^3, unbiased, so that it
    can be negative.

    real, generated: (N, D), N >= 2 each. The mean over `subsets` pairs of subsets drawn without replacement on the
    seed's stream, each of `subset_size` samples or, if either set is smaller, of as many as that one has.
    """
    size = min(subset_size, len(check_features(real)), len(check_features(generated, like=real)))
    if size < 2 or subsets < 1:
        raise ValueError(f"kernel distance: needs subset_size >= 2 and subsets >= 1, got {size} and {subsets}")
    stream = generator("kernel distance", seed)
    found = []
    for _ in range(subsets):
        some = [set_[torch.randperm(len(set_), generator=stream)[:size].to(set_.device)] for set_ in (real, generated)]
        found.append(squared_mmd(*some))
    return _estimate(found)


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of MMD^2 between (N, D) and (M, D), N, M >= 2, with the kernel (x.y / D + 1)^3.

    Means of k over unlike pairs within a, within b, less twice the mean over pairs across (Gretton et al. 2012, eq. 3).
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int | None = None) -> Estimate:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv:1606.03498) over splits; between 1 and C.

    probabilities: (N, C), rows that sum to 1; `logits.double().softmax(1)`. N >= splits. Splits are N/splits
    neighbours: in the order given (seed None), where samples sorted by class score low, or in a seeded random order.
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
    """The same in the order given, of probabilities (n, C) that arrive in parts, `total` rows together; holds (splits,
    C) numbers. The mean KL of a split is its mean of sum p log p less sum q log q of its mean q.
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
    """The share of generated samples inside a real one's ball, and of real ones inside a generated one's
    (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2).

    A sample's ball reaches to its k-th nearest neighbour of its own set and includes its surface. real, generated:
    (N, D), N > k each. Holds block x N distances at a time.
    """
    real, generated = _pair(real, generated, k)
    real_radius, generated_radius = neighbour_distance(real, k, block), neighbour_distance(generated, k, block)
    precise = sum(int((d <= real_radius).any(1).sum()) for d in _distances(generated, real, block))
    recalled = sum(int((d <= generated_radius).any(1).sum()) for d in _distances(real, generated, block))
    return PrecisionRecall(precise / len(generated), recalled / len(real))


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5, block: int = 1024) -> DensityCoverage:
    """How many of the k expected real balls a generated sample lies in, on average, and the share of real samples
    whose ball holds a generated one (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4).

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
    """The squared distance from each row (N, D), N > k, to its k-th nearest other row, (N,) float64."""
    features = features.double()
    found = []
    for start, d in zip(range(0, len(features), block), _distances(features, features, block), strict=True):
        rows = torch.arange(len(d), device=d.device)
        d[rows, start + rows] = torch.inf  # itself
        found.append(d.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def _distances(rows: Tensor, columns: Tensor, block: int) -> Iterator[Tensor]:
    """Squared distances (n, M) from n <= block rows at a time to all columns; 0 where rounding falls below it."""
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
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std(correction=0)))
