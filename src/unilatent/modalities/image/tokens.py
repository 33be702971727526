"""Images to patch tokens and back: a rearrangement of values, exact in both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOLERANCE = 1e-3
"""How far pixel values may lie outside [0, 1]."""


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


def check(images: Any, channels: int, height: int, width: int) -> Tensor:
    """Return the images in float32; ValueError unless they are floats (B, channels, height, width) in [0, 1]."""
    want = f"(B, {channels}, {height}, {width})"
    if not isinstance(images, Tensor):
        raise ValueError(f"images: expected a tensor {want} in [0, 1], got {type(images).__name__}")
    if images.ndim != 4 or tuple(images.shape[1:]) != (channels, height, width):
        hint = "; add a batch axis with images[None]" if tuple(images.shape) == (channels, height, width) else ""
        hint = hint or "; crop or resize them, or convert their channels"
        raise ValueError(f"images: expected shape {want}, got {tuple(images.shape)}{hint}")
    if not images.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {images.dtype}; divide by 255: images.float() / 255")
    if images.numel() == 0:
        raise ValueError(f"images: expected at least one image {want}, got an empty batch")
    low, high = images.min().item(), images.max().item()
    if low != low or high != high:  # min and max propagate NaN
        raise ValueError("images: expected values in [0, 1], got NaN; remove the images that contain it")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        way_out = "map [-1, 1] with (images + 1) / 2" if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE else "rescale"
        way_out = "divide by 255" if low >= 0 and high <= 255 else way_out
        raise ValueError(f"images: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; {way_out}")
    return images.float()
