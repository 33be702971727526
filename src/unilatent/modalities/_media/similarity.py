"""Similarity of paired images: PSNR, and structural similarity (Wang et al. 2004, IEEE TIP 13(4))."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
"""Side of the Gaussian window and its standard deviation, in pixels."""
K1, K2 = 0.01, 0.03


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 10 log10(1 / mean squared error) of each image (B, C, H, W), in dB: (B,); at most 100."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def masked_psnr(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the PSNR of each sample (B, ..., C, H, W) over the pixels where mask (B, ..., 1, H, W) is True, in dB:
    (B,); at most 100."""
    squared = (prediction.float() - target.float()).square().mean(-3, keepdim=True)  # over channels
    squared = torch.where(mask, squared, 0.0).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
    return -10 * squared.clamp(min=1e-10).log10()


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean SSIM of paired images (B, C, H, W) in [0, 1]: (B,) float64, at most 1.

    Eq. 13 for each channel and each window inside the image, averaged over windows and channels. ValueError if the
    image is smaller than a window or the shapes differ.
    """
    if prediction.shape != target.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"SSIM needs two batches of equal shape (B, C, H, W), got {shapes}")
    if min(prediction.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {tuple(prediction.shape[2:])}")
    a, b = prediction.detach().double(), target.detach().double()
    mean_a, mean_b = _blurred(a), _blurred(b)  # (B, C, H - 10, W - 10)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    shared = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * shared + K2**2) / (var_a + var_b + K2**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    """Return the Gaussian-weighted mean of each window, computed separably."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return flat.view(*x.shape[:2], *flat.shape[2:])
