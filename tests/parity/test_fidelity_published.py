"""Distances and scores compared with torch-fidelity's and pytorch-fid's on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import published
from torch import Tensor

from unilatent.maths.fidelity import inception_score, kernel_distance, precision_recall
from unilatent.maths.frechet import frechet_distance_of


def features(n: int, seed: int) -> Tensor:
    """Return (n, 64) float64, non-negative with different scales, like Inception's features."""
    normals = torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (normals * torch.linspace(0.1, 1, 64) + 0.1 * seed).relu()


@pytest.fixture(scope="module")
def a() -> Tensor:
    return features(300, 1)


@pytest.fixture(scope="module")
def b() -> Tensor:
    return features(250, 2)


def test_frechet_distance(a: Tensor, b: Tensor):
    fidelity = published("torch_fidelity.metric_fid")
    statistics = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance_of(a, b) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_by_pytorch_fid(a: Tensor, b: Tensor):
    theirs = published("pytorch_fid.fid_score").calculate_frechet_distance
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    assert frechet_distance_of(a, b) == pytest.approx(float(theirs(mean_a, cov_a, mean_b, cov_b)), rel=1e-6)


def test_kernel_distance(a: Tensor, b: Tensor):
    """With one subset of all samples: their generator of subsets differs."""
    kernel = published("torch_fidelity.metric_kid")
    options = {"kid_subset_size": 250, "kid_subsets": 1, "verbose": False}
    theirs = kernel.kid_features_to_metric(a[:250], b, **options)[kernel.KEY_METRIC_KID_MEAN]
    assert kernel_distance(a[:250], b, subsets=1).mean == pytest.approx(theirs, rel=1e-6)


def test_inception_score(a: Tensor):
    score = published("torch_fidelity.metric_isc")
    theirs = score.isc_features_to_metric(a, shuffle=False)
    wanted = (theirs[score.KEY_METRIC_ISC_MEAN], theirs[score.KEY_METRIC_ISC_STD])
    assert inception_score(a.softmax(1)) == pytest.approx(wanted, rel=1e-6)


def test_precision_and_recall(a: Tensor, b: Tensor):
    """Theirs takes the generated samples first."""
    theirs = published("torch_fidelity.metric_prc").calculate_precision_recall_full(b, a, 3)
    assert min(theirs) > 0.1 and theirs[0] != theirs[1]
    assert precision_recall(a, b) == pytest.approx(theirs, rel=1e-6)
