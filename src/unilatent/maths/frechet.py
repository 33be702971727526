"""Frechet distance between two sets of features, in float64, by symmetric eigendecompositions (no sqrtm)."""

from __future__ import annotations

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


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two (mean, covariance) pairs.

    With C = R R^T, tr((C_a C_b)^(1/2)) is the sum of the singular values of R_a^T R_b. R contains only eigenvectors
    whose eigenvalues exceed rounding errors. This keeps full precision for rank-deficient covariances (fewer samples
    than channels), where the square roots of a thousand rounding errors of 1e-16 would add 1e-8 each. ValueError if D
    differs.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"moments: both need the same D, got {len(mean_a)} and {len(mean_b)}")
    for mean, cov in (a, b):
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError("moments: they contain NaN or infinity")
    cov_a, cov_b = cov_a.double(), cov_b.double().to(cov_a.device)
    cross = torch.linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    distance = (mean_a.double() - mean_b.to(mean_a.device).double()).square().sum()
    return max(float(distance + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """Return R (D, rank) with R R^T = C."""
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    resolved = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, resolved] * values[resolved].sqrt()


def frechet_distance_of(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Frechet distance between two sets of features (N, D), N >= 2 each; sizes may differ.

    With fewer samples than channels no covariance is computed: tr((C_a C_b)^(1/2)) is the sum of the singular values of
    the (N_a, N_b) matrix X_a X_b^T / sqrt((N_a - 1) (N_b - 1)), X being centred features. ValueError on other shapes.
    """
    check_features(features_a)
    check_features(features_b, like=features_a)
    if max(len(features_a), len(features_b)) >= features_a.shape[1]:
        return frechet_distance(moments(features_a), moments(features_b))
    (mean_a, a), (mean_b, b) = _centred(features_a), _centred(features_b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


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


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and Y = X / sqrt(N - 1) (N, D), X being centred features; Y^T Y is the covariance."""
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5
