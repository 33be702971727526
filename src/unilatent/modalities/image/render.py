"""Pictures to PNG files: rounded to 8 bits, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

SMALLEST_CELL = 32
GAP = 2


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] to (B, H, W, C) uint8, rounded to the nearest of 256 levels; NaN becomes black."""
    levels = (images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round()
    return levels.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def draw_grid(rows: Sequence[Tensor], path: Path, columns: int | None = None) -> None:
    """Rows of pictures (B, C, H, W) as one PNG, small ones magnified by a whole factor to 32 to 63 pixels.

    columns: at most so many pictures a line; longer rows continue below, in groups of one line of every row.
    """
    lines = _wrap([to_uint8(row) for row in rows], columns)
    height, width, channels = lines[0].shape[1:]
    factor = max(1, -(-SMALLEST_CELL // min(height, width)))
    down, right = height * factor + GAP, width * factor + GAP
    most = max(len(line) for line in lines)
    canvas = np.full((len(lines) * down + GAP, most * right + GAP, channels), 255, np.uint8)
    for i, line in enumerate(lines):
        for j, picture in enumerate(line):
            cell = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            top, left = GAP + i * down, GAP + j * right
            canvas[top : top + height * factor, left : left + width * factor] = cell
    save(canvas, path)


def write(images: Tensor, folder: Path, start: int = 0) -> list[Path]:
    """One PNG a picture of (B, C, H, W), named by its number in six digits from `start`."""
    paths = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    for picture, path in zip(to_uint8(images), paths, strict=True):
        save(picture, path)
    return paths


def save(picture: np.ndarray, path: Path) -> None:
    """(H, W, 1 or 3) uint8 to a PNG; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _wrap(rows: list[np.ndarray], columns: int | None) -> list[np.ndarray]:
    longest = max((len(row) for row in rows), default=0)
    assert longest, "a grid needs at least one picture"
    step = columns or longest
    return [row[i : i + step] for i in range(0, longest, step) for row in rows if len(row) > i]
