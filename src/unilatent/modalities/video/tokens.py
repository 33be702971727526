"""Clips to tubelet tokens and back: a rearrangement of values, exact in both directions."""

from __future__ import annotations

from torch import Tensor

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
