"""Clips to tubelet tokens and back: a rearrangement of values, exact in both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOLERANCE = 1e-3
"""How far values may lie outside [0, 1]."""
Tubelet = tuple[int, int, int]
"""Frames, rows and columns of a token."""


def pack(clips: Tensor, tubelet: Tubelet) -> Tensor:
    """Convert (B, T, C, H, W) to (B, N, t h w C): tubelets by time, row and column; their values as (frame, row,
    column, channel)."""
    b, frames, channels, height, width = clips.shape
    t, h, w = tubelet
    grid = clips.reshape(b, frames // t, t, channels, height // h, h, width // w, w)
    return grid.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(b, -1, t * h * w * channels)


def unpack(values: Tensor, frames: int, height: int, width: int, tubelet: Tubelet) -> Tensor:
    """Convert (B, N, t h w C) to (B, frames, C, height, width); the inverse of `pack`."""
    t, h, w = tubelet
    grid = values.reshape(len(values), frames // t, height // h, width // w, t, h, w, -1)  # (B, T', H', W', t, h, w, C)
    return grid.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(len(values), frames, -1, height, width)


def check(clips: Any, frames: int, channels: int, height: int, width: int) -> Tensor:
    """Return the clips in float32; ValueError unless they are floats (B, T, C, H, W) of this size in [0, 1]."""
    size = (frames, channels, height, width)
    want = f"(B, {', '.join(map(str, size))})"
    if not isinstance(clips, Tensor):
        raise ValueError(f"clips: expected a tensor {want} in [0, 1], got {type(clips).__name__}")
    if clips.ndim != 5 or tuple(clips.shape[1:]) != size:
        hint = "; add a batch axis with clips[None]" if tuple(clips.shape) == size else ""
        hint = hint or "; axes are batch, time, channel, row and column"
        raise ValueError(f"clips: expected shape {want}, got {tuple(clips.shape)}{hint}")
    if not clips.is_floating_point():
        raise ValueError(f"clips: expected floats in [0, 1], got {clips.dtype}; divide by 255: clips.float() / 255")
    if clips.numel() == 0:
        raise ValueError(f"clips: expected at least one clip {want}, got an empty batch")
    low, high = clips.min().item(), clips.max().item()
    if low != low or high != high:  # min and max propagate NaN
        raise ValueError("clips: expected values in [0, 1], got NaN; remove the clips that contain it")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        way_out = "map [-1, 1] with (clips + 1) / 2" if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE else "rescale"
        way_out = "divide by 255" if low >= 0 and high <= 255 else way_out
        raise ValueError(f"clips: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; {way_out}")
    return clips.float()
