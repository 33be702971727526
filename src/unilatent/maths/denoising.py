"""The one generative loss: the weighted squared error of a clean estimate."""

from __future__ import annotations

from torch import Tensor

from .paths import expand


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
