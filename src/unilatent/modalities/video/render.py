"""Clips to files: animations for people, and filmstrips where images must stand still."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .._media import render
from . import decoding

SHOWN = 8
"""Largest number of frames of a filmstrip."""
QUANTISER = 17
"""H.264's, of a drawn .mp4: differences cannot be seen."""


def to_uint8(clips: Tensor) -> np.ndarray:
    """Round (B, T, C, H, W) in [0, 1], or levels, to 256 levels: (B, T, H, W, C) uint8; NaN becomes black."""
    return render.to_levels(clips).cpu().movedim(2, -1).numpy()


def draw_grid(
    rows: Sequence[Tensor], path: Path, columns: int | None, captions: Sequence[str] | None, fps: float
) -> None:
    """Draw rows of clips (B, T, C, H, W): filmstrips as a PNG at `path`, and beside it the clips moving, as .webp and,
    where PyAV is installed, as .mp4. Clips of a row that are shorter than those of another stay at their last frame."""
    longest = max(row.shape[1] for row in rows)
    rows = [row[:, [min(t, row.shape[1] - 1) for t in range(longest)]] for row in rows]
    strips = [filmstrip(row) for row in rows]
    narrow = max(1, (columns or len(strips[0])) // 4)
    render.draw_grid(strips, path, narrow, captions)
    frames = np.stack([render.grid([row[:, t] for row in rows], columns, captions) for t in range(longest)])
    animate(frames, path.with_suffix(".webp"), fps)
    try:
        encoded = decoding.encode(map(_image, frames), Fraction(fps).limit_denominator(1000), QUANTISER, len(frames))
    except ValueError:  # no PyAV, or one without an encoder of H.264: the .webp shows the same
        return
    render.replace(path.with_suffix(".mp4"), lambda partial: partial.write_bytes(encoded))


def filmstrip(clips: Tensor) -> Tensor:
    """Put at most SHOWN frames of each clip (B, T, C, H, W), evenly spaced, side by side: (B, C, H, W')."""
    frames = clips.shape[1]
    shown = np.unique(np.linspace(0, frames - 1, min(frames, SHOWN)).round().astype(int)).tolist()
    return clips[:, shown].permute(0, 2, 3, 1, 4).flatten(3)


def write(clips: Tensor, folder: Path, start: int, fps: float) -> list[Path]:
    """Write one lossless animated WebP per clip of (B, T, C, H, W), named by a six-digit number from `start`."""
    paths = [folder / f"{start + i:06d}.webp" for i in range(len(clips))]
    for clip, path in zip(to_uint8(clips), paths, strict=True):
        animate(clip, path, fps)
    return paths


def animate(frames: np.ndarray, path: Path, fps: float) -> None:
    """Write (T, H, W, 1 or 3) uint8 as a lossless animated WebP, atomically."""
    images = [_image(frame) for frame in frames]

    def save(partial: Path) -> None:
        images[0].save(
            partial, format="WEBP", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0,
            lossless=True,
        )  # fmt: skip

    render.replace(path, save)


def _image(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(frame, 3, axis=2) if frame.shape[-1] == 1 else frame)
