"""Latents in a plane: where samples lie in the two directions of greatest variance, and what is between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentMap:
    """n samples' latents, projected on their first two principal components.

    latents: (n, K, D), zeros at padding. mask: (n, K) bool, real latents; None without padding. points: (n, 2) float64,
    each sample's place. axes: (2, F) float64, orthonormal: the directions in the space of features. The F features of a
    sample are its K D values, or, where samples have different numbers of latents, the mean over its latents, D values.
    shares: (2,) of the variance of the features.
    """

    latents: Tensor
    mask: Tensor | None
    points: Tensor
    axes: Tensor
    shares: Tensor

    @staticmethod
    def of(latents: Tensor, mask: Tensor | None = None) -> LatentMap:
        """Project latents (n, K, D), mask (n, K) as above; ValueError for fewer than three samples."""
        if len(latents) < 3:
            raise ValueError(f"latents: {len(latents)} samples; a map needs at least 3")
        features = _features(latents, mask)
        centred = features - features.mean(0)
        _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
        axes = torch.zeros(2, features.shape[1], dtype=features.dtype)
        axes[: len(rows[:2])] = rows[:2]
        variances = singular.square()
        shares = torch.zeros(2, dtype=features.dtype)
        shares[: len(variances[:2])] = variances[:2] / variances.sum().clamp(min=1e-30)
        return LatentMap(latents, mask, centred @ axes.T, axes, shares)

    def nearest(self, place: Tensor) -> int:
        """Return the sample whose point is nearest to a place (2,)."""
        return int((self.points - place).square().sum(1).argmin())

    def moved(self, index: int, place: Tensor) -> Tensor:
        """Return the latents (1, K, D) of a sample, moved in the plane of the map to a place (2,).

        Everything that the map does not show of the sample stays. At its own point they are its latents.
        """
        step = (place - self.points[index]) @ self.axes  # (F,)
        z, k, d = self.latents[index], *self.latents.shape[1:]
        if self.mask is None:
            return (z + step.view(k, d).to(z))[None]
        return torch.where(self.mask[index][:, None], z + step.to(z), 0.0)[None]


def _features(latents: Tensor, mask: Tensor | None) -> Tensor:
    """(n, F) float64."""
    if mask is None:
        return latents.flatten(1).double()
    real = mask[..., None]
    return torch.where(real, latents, 0.0).double().sum(1) / real.sum(1).clamp(min=1)
