"""Frechet distance between two sets of features, in float64, by symmetric eigenvalues (no sqrtm)."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: need (N, D) with N >= 2, got shape {tuple(features.shape)}")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for two (mean, covariance) pairs.

    The trace of the root is the sum of square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric
    and positive semi-definite: real on rank-deficient covariances too.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).double().square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance_of(features_a: Tensor, features_b: Tensor) -> float:
    """The distance between two sets of features (N, D), each with N >= 2; the sets may differ in size.

    With fewer samples than channels no covariance is built: tr((C_a C_b)^(1/2)) is the sum of singular values of
    X_a X_b^T / sqrt((N_a - 1) (N_b - 1)) for centred features X, an (N_a, N_b) matrix. ValueError on other shapes.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features: need (N, D) with N >= 2, got shape {tuple(features.shape)}")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"features: both need the same D, got {features_a.shape[1]} and {features_b.shape[1]}")
    if max(len(features_a), len(features_b)) >= features_a.shape[1]:
        return frechet_distance(moments(features_a), moments(features_b))
    (mean_a, a), (mean_b, b) = _centred(features_a), _centred(features_b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and X / sqrt(N - 1) (N, D) with X the centred features, whose Gram matrix is the covariance."""
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5
