"""Prediction types: definitions, round trips, and float32 at the ends of a path."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath
from unilatent.maths.predictions import Prediction, from_clean, to_clean

PATHS = [LogSNRPath(5, -12), LogSNRPath(15, -15, "linear"), LinearPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
T = torch.linspace(0.02, 0.98, 20, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, EPS = normals(20, 3, 2), normals(20, 3, 2, seed=1)


@every_path
def test_each_kind_is_what_it_says(path: NoisePath):
    z, sigma, alpha = path.add_noise(X, EPS, T), path.sigma(T)[:, None, None], path.alpha(T)[:, None, None]
    velocity = EPS - X if isinstance(path, LinearPath) else alpha * EPS - sigma * X
    wanted = {"clean": X, "noise": EPS, "velocity": velocity, "score": -EPS / sigma}
    assert wanted.keys() == set(get_args(Prediction))
    for kind, want in wanted.items():
        torch.testing.assert_close(from_clean(kind, X, z, T, path), want, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_clean(kind, want, z, T, path), X, rtol=1e-8, atol=1e-8)


@every_path
@pytest.mark.parametrize("kind", get_args(Prediction))
def test_any_prediction_survives_the_way_to_the_clean_estimate_and_back(path: NoisePath, kind: Prediction):
    z, raw = normals(20, 3, 2, seed=2), normals(20, 3, 2, seed=3)
    torch.testing.assert_close(from_clean(kind, to_clean(kind, raw, z, T, path), z, T, path), raw, rtol=1e-7, atol=1e-7)


@every_path
def test_velocity_points_along_the_path(path: NoisePath):
    """dz/dt with x and eps held is a positive multiple of the velocity, and the directions' determinant is 1."""
    c, s = path.direction(T)
    torch.testing.assert_close(path.alpha(T) * c + path.sigma(T) * s, torch.ones_like(T))
    torch.testing.assert_close(path.dalpha(T) * c, -path.dsigma(T) * s, rtol=1e-9, atol=1e-12)
    assert (path.dsigma(T) > 0).all() and (c > 0).all()


@every_path
@pytest.mark.parametrize("t", [0.0, 1e-4, 1.0])
def test_velocities_lose_nothing_in_float32_at_the_ends(path: NoisePath, t: float):
    z = path.add_noise(X, EPS, t)
    velocity = from_clean("velocity", X, path.add_noise(X, EPS, max(t, 1e-4)), max(t, 1e-4), path)
    got = to_clean("velocity", velocity.float(), z.float(), t, path)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), to_clean("velocity", velocity, z, t, path), rtol=1e-5, atol=1e-6)


@every_path
@pytest.mark.parametrize("kind", get_args(Prediction))
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_nothing_is_infinite_at_the_ends(path: NoisePath, kind: Prediction, t: float):
    z = normals(4, 3).float()
    assert to_clean(kind, normals(4, 3, seed=1).float(), z, t, path).isfinite().all()
    assert from_clean(kind, normals(4, 3, seed=1).float(), z, t, path).isfinite().all()


def test_half_precision_becomes_float32():
    got = to_clean("velocity", normals(2, 3).bfloat16(), normals(2, 3).bfloat16(), torch.tensor([0.1, 0.9]), PATHS[0])
    assert got.dtype == torch.float32
