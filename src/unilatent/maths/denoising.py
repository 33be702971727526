"""The one generative loss: the weighted squared error of a clean estimate, as a mean or as a sum in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .paths import NoisePath, expand


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (B, N, ...) over each sample's real tokens, then over samples. Scalar, float32.

    mask: (B, N), or None when nothing is padding.

    Every sample counts the same, so a batch's mean is the mean of its parts' means however it is cut.
    """
    per_token = values.float().flatten(2).mean(-1) if values.ndim > 2 else values.float()  # (B, N)
    if mask is None:
        return per_token.mean()
    real = mask.to(per_token.dtype)
    return ((per_token * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def denoising_loss(clean: Tensor, estimate: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over channels, each sample's real tokens, and samples of weight(t) |clean - estimate|^2. Scalar, float32.

    clean, estimate: (B, N, C); weight: (B,), already evaluated at each sample's time; mask: (B, N) or None.
    Whether a gradient flows into `clean` is the caller's decision: detach it or do not.
    """
    return masked_mean(expand(weight, clean) * (clean.float() - estimate.float()) ** 2, mask)


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of values (B, N, ...) over each sample's real tokens and channels. (B,) float32 (float64 stays).

    mask: (B, N), or None when nothing is padding.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    per_token = values.flatten(2).sum(-1) if values.ndim > 2 else values  # (B, N)
    return (per_token if mask is None else torch.where(mask, per_token, 0.0)).sum(1)


def denoising_nats(clean: Tensor, estimate: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over channels and each sample's real tokens of weight(t) |clean - estimate|^2. (B,), in the weight's unit.

    As `denoising_loss`, which is the mean: with `weightings.elbo` this is each sample's nats (UL, Eq. 3 and 4).
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    return weight * masked_sum((clean.to(wide) - estimate.to(wide)) ** 2, mask)


def terminal_kl(clean: Tensor, path: NoisePath, mask: Tensor | None = None) -> Tensor:
    """KL[N(alpha_1 clean, sigma_1^2) || N(0, 1)] in nats, summed as in `denoising_nats`. (B,).

    For variance-preserving paths. It is what limits |clean| at the noisiest end: keep it in a rate.
    """
    return kl_to_normal(clean, path.logsnr(torch.tensor(1.0, dtype=torch.float64)), mask)


def kl_to_normal(clean: Tensor, logsnr: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """KL[N(alpha clean, sigma^2) || N(0, 1)] in nats at a log-SNR, summed as in `denoising_nats`. (B,)."""
    at = torch.as_tensor(logsnr, dtype=torch.float64)
    wide = clean.to(torch.promote_types(clean.dtype, torch.float32))
    signal, rest = at.sigmoid(), F.softplus(at) - at.sigmoid()  # sigma^2 - 1 - log sigma^2, without cancellation
    return masked_sum((signal.to(wide) * wide**2 + rest.to(wide)) / 2, mask)
