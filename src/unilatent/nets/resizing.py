"""Bilinear resizing by the two rules that published feature networks were used with: part of a number's protocol."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def stretch_tf1(levels: Tensor, side: int) -> Tensor:
    """Stretch (B, C, H, W) float32 to (B, C, side, side) by TensorFlow 1's `resize_bilinear`.

    Output pixel i is at input coordinate i * H / side, counted from the centre of the first pixel: no half-pixel
    offset, no antialiasing (at half the size, every second pixel is taken). The last pixels are clamped to the edge.
    """
    return _stretch_axis(_stretch_axis(levels, 3, side), 2, side)


def stretch_torch(levels: Tensor, side: int) -> Tensor:
    """Stretch (B, C, H, W) to (B, C, side, side) as torch does, with half-pixel centres and without antialiasing."""
    return F.interpolate(levels, (side, side), mode="bilinear", align_corners=False)


STRETCHES: dict[str, Callable[[Tensor, int], Tensor]] = {"tf1": stretch_tf1, "torch": stretch_torch}


def _stretch_axis(x: Tensor, dim: int, side: int) -> Tensor:
    size = x.shape[dim]
    source = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side, dtype=torch.float32)
    lower = source.long().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    weight = (source - lower).view([-1 if axis == dim else 1 for axis in range(x.ndim)])
    below, above = x.index_select(dim, lower), x.index_select(dim, upper)
    return below + (above - below) * weight
