"""How far a reconstruction is from its picture: means over pixels and batch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """Factors of the terms; a term of factor 0 is not computed."""

    l1: float
    squared: float
    perceptual: float


def terms(prediction: Tensor, target: Tensor, weights: Weights, lpips_file: str | None = None) -> dict[str, Tensor]:
    """Weighted scalar terms between two batches of pictures (B, C, H, W), in float32 whatever autocast says.

    `l1`: mean |difference|; `squared`: mean difference^2; `perceptual`: mean LPIPS-VGG (Zhang et al. 2018, eq. 1).
    lpips_file: a local file with the perceptual network's weights, or None for the cached download.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        out = {}
        if weights.l1:
            out["l1"] = weights.l1 * (prediction - target).abs().mean()
        if weights.squared:
            out["squared"] = weights.squared * (prediction - target).square().mean()
        if weights.perceptual:
            distance = lpips(lpips_file, prediction.device)(2 * prediction - 1, 2 * target - 1)  # (B,)
            out["perceptual"] = weights.perceptual * distance.mean()
    return out


@cache
def lpips(weights: str | None, device: torch.device) -> nn.Module:
    """The perceptual network, kept here and not in any model: so it is in no checkpoint and in no average."""
    from ...nets.lpips import LPIPS

    with torch.inference_mode(False):  # first used inside inference mode, it must still pass gradients later
        return LPIPS.load(weights).to(device)
