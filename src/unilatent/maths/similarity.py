"""How alike two representations of the same samples are: linear CKA and CKNNA, both from unbiased estimates of HSIC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST = 4
"""Samples that an unbiased estimate of HSIC needs."""


def gram(features: Tensor) -> Tensor:
    """Return the inner products (n, n) of features (n, D), centred over samples, in float64."""
    features = features.double()
    features = features - features.mean(0)
    return features @ features.T


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Return the unbiased estimate of HSIC of two kernels (n, n), n >= 4 (Song et al. 2012, Theorem 5).

    ValueError for fewer samples. Symmetric kernels are not required: CKNNA's are not.
    """
    n = len(k)
    if n < FEWEST:
        raise ValueError(f"HSIC: {n} samples, but an unbiased estimate needs at least {FEWEST}")
    off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, l = k * off, l * off  # noqa: E741
    traced = (k * l.T).sum()
    means = k.sum() * l.sum() / ((n - 1) * (n - 2))
    crossed = 2 * (k.sum(0) * l.sum(1)).sum() / (n - 2)
    return (traced + means - crossed) / (n * (n - 3))


class LinearCKA:
    """Linear CKA (Kornblith et al. 2019) over minibatches: sums of unbiased HSICs (Nguyen et al. 2021, Eq. 3), so that
    its expectation depends on no batch size.

    1 for features that are equal up to rotation, translation and scale, about 0 for independent ones.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # of k l, k k, l l

    def add(self, k: Tensor, l: Tensor, own: Tensor | None = None, other: Tensor | None = None) -> None:  # noqa: E741
        """Add a batch: the `gram`s (n, n) of both features of the same n >= 4 samples. own, other: their HSICs with
        themselves, if these are known."""
        own, other = hsic(k, k) if own is None else own, hsic(l, l) if other is None else other
        self.sums += torch.stack([hsic(k, l), own, other])

    @property
    def value(self) -> float:
        """NaN if one of the representations is the same for all samples."""
        together, own, other = self.sums.tolist()
        return together / (own * other) ** 0.5 if own > 0 and other > 0 else float("nan")


def nearest(kernel: Tensor, count: int) -> Tensor:
    """Return which samples are the `count` nearest of each by a kernel (n, n), in rows: bool, never itself."""
    alone = kernel.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, alone.topk(count, dim=1).indices, True)


def cknna(a: Tensor, b: Tensor, count: int = 10) -> float:
    """Return CKNNA (Huh et al. 2024, appendix A): CKA of cosines in which sample j counts for sample i only if it is
    among the `count` nearest of i in both representations.

    As in their code, features (n, D) and (n, D'), n > count, are scaled to unit length and not centred before
    neighbours are chosen; the unbiased HSIC is of the masked kernels. ValueError if there are fewer samples. NaN where
    no pair counts.
    """
    if not 1 <= count < len(a):
        raise ValueError(f"CKNNA: {count} neighbours of {len(a)} samples; give 1 to {len(a) - 1}")
    k, l = (x @ x.T for x in (F.normalize(part.double(), dim=1).cpu() for part in (a, b)))  # noqa: E741
    near_k, near_l = nearest(k, count), nearest(l, count)

    def aligned(x: Tensor, y: Tensor, near: Tensor) -> float:
        return float(hsic(torch.where(near, x, 0.0), torch.where(near, y, 0.0)))

    own, other = aligned(k, k, near_k), aligned(l, l, near_l)
    return aligned(k, l, near_k & near_l) / (own * other) ** 0.5 if own > 0 and other > 0 else float("nan")
