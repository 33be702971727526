"""Variance of latents over samples, and its effective rank."""

from __future__ import annotations

import torch
from torch import Tensor


class Spread:
    """Running moments of latents (B, K, D), additive over batches and processes, in float64.

    The covariance is over samples at the same latent position, so differences between the positions' means do not
    count. It does not depend on how samples are split into batches.
    """

    def __init__(self, most: int, channels: int, device: torch.device | str = "cpu"):
        """most: the largest K that will be added."""
        self.count = torch.zeros(most, dtype=torch.float64, device=device)  # (K,)
        self.total = torch.zeros(most, channels, dtype=torch.float64, device=device)  # (K, D)
        self.square = torch.zeros(channels, channels, dtype=torch.float64, device=device)  # (D, D)

    def add(self, latents: Tensor, mask: Tensor | None = None) -> None:
        """Add latents (B, K, D); mask (B, K) is True for real ones."""
        z = latents.detach().double()
        k = z.shape[1]
        real = torch.ones(z.shape[:2], dtype=z.dtype, device=z.device) if mask is None else mask.to(z)
        z = torch.where(real[..., None] > 0, z, 0.0)
        self.count[:k] += real.sum(0)
        self.total[:k] += z.sum(0)
        flat = z.flatten(0, 1)  # (B K, D)
        self.square += flat.T @ flat

    @property
    def sums(self) -> list[Tensor]:
        """Tensors to be summed over processes, in place."""
        return [self.count, self.total, self.square]

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D), pooled over latent positions; 0 if no position has two samples."""
        mean = self.total / self.count.clamp(min=1)[:, None]
        within = self.square - self.total.T @ mean
        return within / (self.count - 1).clamp(min=0).sum().clamp(min=1)

    def numbers(self) -> dict[str, Tensor]:
        """Return summary statistics, by metric name.

        latent_std: square root of the mean variance of a channel over samples. latent_rms: root mean square of a
        channel. latent_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance C, from 1 (all samples on a line)
        to D (equal variance in all directions); 0 if all samples are equal.
        """
        c = self.covariance()
        trace, d = c.trace().clamp(min=0), len(c)
        rms = (self.square.trace() / (self.count.sum().clamp(min=1) * d)).sqrt()
        floor = torch.finfo(torch.float64).eps * rms.square() * d
        rank = torch.where(trace > floor, trace.square() / c.square().sum().clamp(min=1e-300), 0.0)
        return {"latent_std": (trace / d).sqrt(), "latent_rms": rms, "latent_rank": rank}
