"""Whether what a user gives are pixels in [0, 1]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOLERANCE = 1e-3
"""How far values may lie outside [0, 1]."""


def check_values(data: Any, noun: str, size: tuple[int, ...], axes: str) -> Tensor:
    """Return the samples in float32; ValueError unless they are floats (B, *size) in [0, 1].

    noun: of one sample, such as image. axes: a hint about what to do with another shape.
    """
    many, want = f"{noun}s", f"(B, {', '.join(map(str, size))})"
    if not isinstance(data, Tensor):
        raise ValueError(f"{many}: expected a tensor {want} in [0, 1], got {type(data).__name__}")
    if tuple(data.shape[1:]) != size or data.ndim != len(size) + 1:
        hint = f"add a batch axis with {many}[None]" if tuple(data.shape) == size else axes
        raise ValueError(f"{many}: expected shape {want}, got {tuple(data.shape)}; {hint}")
    if not data.is_floating_point():
        raise ValueError(f"{many}: expected floats in [0, 1], got {data.dtype}; divide by 255: {many}.float() / 255")
    if data.numel() == 0:
        raise ValueError(f"{many}: expected at least one {noun} {want}, got an empty batch")
    low, high = data.min().item(), data.max().item()
    if low != low or high != high:  # min and max propagate NaN
        raise ValueError(f"{many}: expected values in [0, 1], got NaN; remove the {many} that contain it")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        way_out = f"map [-1, 1] with ({many} + 1) / 2" if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE else "rescale"
        way_out = "divide by 255" if low >= 0 and high <= 255 else way_out
        raise ValueError(f"{many}: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; {way_out}")
    return data.float()
