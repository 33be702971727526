"""The denoising loss: weighted squared error of a clean estimate, as a mean or as a sum in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .paths import NoisePath, expand


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of values (B, N, ...) over each sample's real tokens, then over samples. Scalar, float32.

    mask: (B, N), True for real tokens; None if there is no padding.

    Every sample has the same weight, so the mean does not depend on how a batch is split into equal micro-batches.
    """
    per_token = values.float().flatten(2).mean(-1) if values.ndim > 2 else values.float()  # (B, N)
    if mask is None:
        return per_token.mean()
    real = mask.to(per_token.dtype)
    return ((per_token * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def denoising_loss(clean: Tensor, estimate: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return weight(t) (clean - estimate)^2, averaged over channels, real tokens and samples. Scalar, float32.

    clean, estimate: (B, N, C); weight: (B,), already evaluated at each sample's time; mask: (B, N) or None.
    Gradients flow into `clean` unless the caller detaches it.
    """
    return masked_mean(expand(weight, clean) * (clean.float() - estimate.float()) ** 2, mask)


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of values (B, N, ...) over each sample's real tokens and channels. (B,), at least float32.

    mask: (B, N), True for real tokens; None if there is no padding.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    per_token = values.flatten(2).sum(-1) if values.ndim > 2 else values  # (B, N)
    return (per_token if mask is None else torch.where(mask, per_token, 0.0)).sum(1)


def denoising_nats(clean: Tensor, estimate: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return weight(t) (clean - estimate)^2, summed over channels and each sample's real tokens. (B,).

    The sum that corresponds to the mean in `denoising_loss`. With `weightings.elbo` it is in nats per sample (UL,
    Eq. 3 and 4).
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    return weight * masked_sum((clean.to(wide) - estimate.to(wide)) ** 2, mask)


def terminal_kl(clean: Tensor, path: NoisePath, mask: Tensor | None = None) -> Tensor:
    """Return KL[N(alpha_1 clean, sigma_1^2) || N(0, 1)] in nats, summed as in `denoising_nats`. (B,).

    For variance-preserving paths. A rate must include it: it bounds |clean| at t = 1, where some signal remains.
    """
    return kl_to_normal(clean, path.logsnr(torch.tensor(1.0, dtype=torch.float64)), mask)


def kl_to_normal(clean: Tensor, logsnr: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Return KL[N(alpha clean, sigma^2) || N(0, 1)] in nats at a log-SNR, summed as in `denoising_nats`. (B,)."""
    logsnr = torch.as_tensor(logsnr, dtype=torch.float64)
    wide = clean.to(torch.promote_types(clean.dtype, torch.float32))
    alpha_squared = logsnr.sigmoid()
    constant = F.softplus(logsnr) - alpha_squared  # sigma^2 - 1 - log sigma^2, without cancellation
    return masked_sum((alpha_squared.to(wide) * wide**2 + constant.to(wide)) / 2, mask)
