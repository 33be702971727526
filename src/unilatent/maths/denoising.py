"""The one generative loss: the weighted squared error of a clean estimate."""

from __future__ import annotations

from torch import Tensor

from .paths import expand


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (B, N, ...) over everything real; mask (B, N) or None. Scalar, float32."""
    values = values.float()
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype).reshape(*mask.shape, *[1] * (values.ndim - 2))
    return (values * weights).sum() / weights.expand_as(values).sum().clamp(min=1)


def denoising_loss(clean: Tensor, estimate: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over samples, real tokens and channels of weight(t) |clean - estimate|^2. Scalar, float32.

    clean, estimate: (B, N, C); weight: (B,), already evaluated at each sample's time; mask: (B, N) or None.
    Whether a gradient flows into `clean` is the caller's decision: detach it or do not.
    """
    return masked_mean(expand(weight, clean) * (clean.float() - estimate.float()) ** 2, mask)
