"""Frechet distance between two sets of features, in float64, by symmetric eigendecompositions (no sqrtm)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]
"""Mean (D,) and unbiased covariance (D, D), float64."""


def moments(features: Tensor) -> Moments:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    features = check_features(features).double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


class RunningMoments:
    """Mean and covariance of features that arrive in parts, in float64 (Chan, Golub & LeVeque 1983).

    Sums are centred, so features far from zero lose no digits; how the features are split changes rounding errors only.
    Stores (D, D) numbers, on the device of the first part.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        """(D,); None before the first part."""
        self.scatter: Tensor | None = None
        """(D, D), the sum of (x - mean) (x - mean)^T; None before the first part."""

    def add(self, features: Tensor) -> None:
        """Add features (n, D), n >= 0. ValueError on another D, NaN or infinity."""
        features = check_features(features, at_least=0)
        self._check_width(features.shape[1])
        if len(features) == 0:
            return
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = len(features), mean, centred.T @ centred
            return
        self.scatter.addmm_(centred.T.to(self.scatter), centred.to(self.scatter))
        self._shift(len(features), mean)

    def merge(self, other: RunningMoments) -> None:
        """Add all samples of `other`, which does not change."""
        if other.mean is None or other.scatter is None:
            return
        self._check_width(len(other.mean))
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        self.scatter += other.scatter.to(self.scatter)
        self._shift(other.count, other.mean)

    def moments(self) -> Moments:
        """Return mean and covariance as `moments` does of all parts together; ValueError for fewer than two samples."""
        if self.count < 2 or self.mean is None or self.scatter is None:
            raise ValueError(f"features: a covariance needs at least 2 samples, got {self.count}")
        return self.mean.clone(), self.scatter / (self.count - 1)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Update mean and count for `count` more samples, and add the scatter between the two means."""
        assert self.mean is not None and self.scatter is not None
        total = self.count + count
        step = mean.to(self.mean) - self.mean
        self.scatter.addr_(step, step, alpha=self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def _check_width(self, width: int) -> None:
        if self.mean is not None and len(self.mean) != width:
            raise ValueError(f"features: both need the same D, got {len(self.mean)} and {width}")


class Factor(NamedTuple):
    """Mean (D,) and R (D, r) with the covariance R R^T, float64: what distances to one set have in common."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Factor:
        """From mean and covariance. R has only eigenvectors whose eigenvalues exceed rounding. ValueError if they
        are not finite."""
        mean, covariance = moments
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("moments: they contain NaN or infinity")
        values, vectors = torch.linalg.eigh(covariance.double())  # ascending
        resolved = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return cls(mean.double(), vectors[:, resolved] * values[resolved].sqrt())

    @classmethod
    def of_features(cls, features: Tensor) -> Factor:
        """From features (N, D), N >= 2. With fewer samples than channels no covariance is computed: R is X^T /
        sqrt(N - 1), X being centred features. ValueError on other shapes, NaN or infinity."""
        features = check_features(features).double()
        if len(features) >= features.shape[1]:
            return cls.of(moments(features))
        mean = features.mean(0)
        return cls(mean, (features - mean).T / (len(features) - 1) ** 0.5)

    def distance(self, other: Factor) -> float:
        """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); ValueError if D differs.

        tr((C_a C_b)^(1/2)) is the sum of the singular values of R_a^T R_b. This keeps full precision for rank-deficient
        covariances (fewer samples than channels), where the square roots of a thousand rounding errors of 1e-16 would
        add 1e-8 each.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features: both need the same D, got {len(self.mean)} and {len(other.mean)}")
        mean, root = other.mean.to(self.mean.device), other.root.to(self.root.device)
        cross = torch.linalg.svdvals(self.root.T @ root).sum()
        means = (self.mean - mean).square().sum()
        return max(float(means + self.root.square().sum() + root.square().sum() - 2 * cross), 0.0)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Frechet distance of two (mean, covariance) pairs; see `Factor.distance`."""
    return Factor.of(a).distance(Factor.of(b))


def frechet_distance_of(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Frechet distance between two sets of features (N, D), N >= 2 each; sizes may differ."""
    check_features(features_a)
    check_features(features_b, like=features_a)
    return Factor.of_features(features_a).distance(Factor.of_features(features_b))


def check_features(features: Tensor, like: Tensor | None = None, at_least: int = 2) -> Tensor:
    """Return the features if they are finite, (N, D) with N >= at_least, and as wide as `like`; else ValueError."""
    if features.ndim != 2 or len(features) < at_least:
        raise ValueError(f"features: need (N, D) with N >= {at_least}, got shape {tuple(features.shape)}")
    if like is not None and features.shape[1] != like.shape[1]:
        raise ValueError(f"features: both need the same D, got {like.shape[1]} and {features.shape[1]}")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"features: NaN or infinity in {bad} of {len(features)} samples")
    return features
