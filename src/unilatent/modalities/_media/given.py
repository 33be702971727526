"""Parts of images and clips that are given: drawn in training, and read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...maths.streams import Streams
from ..base import BadSample
from .pixels import Frame, fit, open_image

FRAMES, BOX = "frames", "box"
SIDES = (0.25, 0.75)
"""Smallest and largest side of a drawn box, as a share of the side of the whole."""


def draw_masks(streams: Streams, shape: tuple[int, ...], kinds: Sequence[str]) -> Tensor:
    """Draw which pixels of each sample are given, all kinds equally likely: (B, *shape) bool.

    shape: (1, H, W) or (T, 1, H, W); of one frame, only boxes can be given. "frames": the first k, k uniform from 1 to
    T - 1. "box": all pixels outside of a box, or all inside, equally likely, in every frame; its sides and place are
    uniform.
    """
    u = streams.uniform(7)[:, :, None, None, None]  # (B, 7, 1, 1, 1)
    length = shape[0] if len(shape) == 4 else 1
    kinds = [kind for kind in kinds if kind != FRAMES or length > 1] or [BOX]
    height, width = shape[-2:]
    rows = torch.arange(height, device=u.device)[:, None]
    columns = torch.arange(width, device=u.device)
    times = torch.arange(length, device=u.device)[:, None, None]
    drawn = {
        FRAMES: (times < 1 + (u[:, 1] * (length - 1)).floor()).expand(-1, -1, height, width),  # (B, T, H, W)
        BOX: _box(u[:, 2:4], rows, height) & _box(u[:, 4:6], columns, width),  # (B, 1, H, W)
    }
    drawn[BOX] = (drawn[BOX] ^ (u[:, 6] < 0.5)).expand(-1, length, -1, -1)
    chosen = (u[:, 0] * len(kinds)).floor()  # (B, 1, 1, 1)
    masks = [(chosen == i) & drawn[kind] for i, kind in enumerate(kinds)]
    return torch.stack(masks).any(0).view(len(u), *shape)


def _box(u: Tensor, places: Tensor, side: int) -> Tensor:
    """Return whether places along an axis of length `side` are in a box; u (B, 2, 1, 1, 1): its length and start."""
    length = (side * (SIDES[0] + (SIDES[1] - SIDES[0]) * u[:, 0])).round().clamp(min=1)
    start = (u[:, 1] * (side - length + 1)).floor()
    return (places >= start) & (places < start + length)


def read_mask(path: Path, frame: Frame) -> Tensor:
    """Read which pixels are given from an image that is white where a model is to paint: (1, H, W) bool, True where
    they are given. It is resized and cropped as the image that it belongs to.

    ValueError if it cannot be read, or leaves nothing to paint.
    """
    try:
        image = open_image(path.read_bytes(), 1, str(path))
    except OSError as error:
        raise ValueError(f"--mask: {path}: {error.strerror or 'cannot be read'}; give an image") from None
    except BadSample as error:
        raise ValueError(f"--mask: {error}") from None
    image = fit(image.convert("L"), frame.height, frame.width)
    white = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, frame.height, frame.width) >= 128
    if not white.any():
        raise ValueError(f"--mask: {path} is black everywhere; paint white what the model is to make")
    return ~white
