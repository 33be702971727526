"""How far latents are from one another: their spread over samples, and over how many directions it goes."""

from __future__ import annotations

import torch
from torch import Tensor


class Spread:
    """Running moments of latents (B, K, D), additive over batches and processes, in float64.

    The covariance is between samples at the same latent position: what tells samples apart, whatever each position's
    own mean. Its sums do not depend on how samples are cut into batches.
    """

    def __init__(self, most: int, channels: int, device: torch.device | str = "cpu"):
        """most: the largest K that will come."""
        self.count = torch.zeros(most, dtype=torch.float64, device=device)  # (K,)
        self.total = torch.zeros(most, channels, dtype=torch.float64, device=device)  # (K, D)
        self.square = torch.zeros(channels, channels, dtype=torch.float64, device=device)  # (D, D)

    def add(self, latents: Tensor, mask: Tensor | None = None) -> None:
        """Latents (B, K, D), of which mask (B, K) says which are real."""
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
        """What adds up over processes."""
        return [self.count, self.total, self.square]

    def covariance(self) -> Tensor:
        """(D, D), unbiased, pooled over latent positions; zeros where no position has two samples."""
        mean = self.total / self.count.clamp(min=1)[:, None]
        within = self.square - self.total.T @ mean
        return within / (self.count - 1).clamp(min=0).sum().clamp(min=1)

    def numbers(self) -> dict[str, Tensor]:
        """latent_std: root of the mean variance of a channel over samples. latent_rms: root mean square of a channel.

        latent_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance C, from 1 (all samples on a line) to D
        (equally far in all directions); 0 when samples do not differ at all.
        """
        c = self.covariance()
        trace, d = c.trace().clamp(min=0), len(c)
        rms = (self.square.trace() / (self.count.sum().clamp(min=1) * d)).sqrt()
        floor = torch.finfo(torch.float64).eps * rms.square() * d
        rank = torch.where(trace > floor, trace.square() / c.square().sum().clamp(min=1e-300), 0.0)
        return {"latent_std": (trace / d).sqrt(), "latent_rms": rms, "latent_rank": rank}
