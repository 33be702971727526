"""Images to patch tokens and back: a rearrangement of values, exact in both directions."""

from __future__ import annotations

from torch import Tensor


def pack(images: Tensor, patch: int) -> Tensor:
    """Convert (B, C, H, W) to (B, N, patch * patch * C): patches row by row, values as (row, column, channel)."""
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)  # (B, C, h, p, w, q)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)  # (B, h, w, p, q, C) -> (B, N, p*q*C)


def unpack(values: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Convert (B, N, patch * patch * C) to (B, C, height, width); the inverse of `pack`."""
    b = values.shape[0]
    grid = values.reshape(b, height // patch, width // patch, patch, patch, -1)  # (B, h, w, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)  # (B, C, h, p, w, q) -> (B, C, H, W)
