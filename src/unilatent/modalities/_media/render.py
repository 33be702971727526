"""Images to PNG files: rounded to 8 bits, written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 32
"""Images with a smaller side (in pixels) are magnified."""
GAP = 2
"""Pixels between images."""
SMALLEST_CAPTIONED = 96
"""Smallest width in pixels of images with captions."""
TEXT_SIZE, LINE, MOST_LINES = 10, 13, 6
"""Of captions: font size and line height in pixels, and largest number of lines."""


def to_levels(values: Tensor) -> Tensor:
    """Round values in [0, 1] to 256 levels, uint8 on the same device; NaN becomes black. Levels stay as they are."""
    if values.dtype == torch.uint8:
        return values
    return (values.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def finite_levels(data: Tensor, noun: str, axes: str) -> Tensor:
    """Round samples in [0, 1] to 256 levels: uint8 on their device, a quarter of the bytes to move from there.

    noun: of one sample; axes: of a batch, such as "B, C, H, W". ValueError on others, and on NaN or infinity.
    """
    if data.ndim != len(axes.split(", ")):
        raise ValueError(f"{noun}s: need ({axes}), got shape {tuple(data.shape)}")
    if not data.isfinite().all():
        bad = int((~data.flatten(1).isfinite().all(1)).sum())
        raise ValueError(f"{noun}s: NaN or infinity in {bad} of {len(data)}; the model that generated them diverged")
    return to_levels(data)


def to_uint8(images: Tensor) -> np.ndarray:
    """Round (B, C, H, W) in [0, 1], or levels of 0 to 255, to 256 levels: (B, H, W, C) uint8; NaN becomes black."""
    return to_levels(images).cpu().permute(0, 2, 3, 1).numpy()


def draw_grid(
    rows: Sequence[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
) -> None:
    """Draw the `grid` of rows of images (B, C, H, W) in one PNG."""
    save(grid(rows, columns, captions), path)


def grid(rows: Sequence[Tensor], columns: int | None = None, captions: Sequence[str] | None = None) -> np.ndarray:
    """Put rows of images (B, C, H, W) on one canvas (H', W', C) uint8; small images are magnified by an integer factor
    to 32 to 63 pixels.

    columns: largest number of images per line; longer rows are wrapped, in groups of one line of each row. captions: B
    texts, drawn under the images of the last row; images are then at least 96 pixels wide.
    """
    lines = _wrap([to_uint8(row) for row in rows], columns)
    height, width, channels = lines[0].shape[1:]
    factor = max(1, -(-SMALLEST_CELL // min(height, width)))
    if captions is not None:
        factor = max(factor, -(-SMALLEST_CAPTIONED // width))
    below = _captions(captions, len(lines), [len(row) for row in rows], columns, width * factor)
    down, right = height * factor + GAP, width * factor + GAP
    heights = [LINE * max(map(len, texts), default=0) for texts in below]  # pixels under each line of images
    tops = [GAP + i * down + sum(heights[:i]) for i in range(len(lines))]
    longest = max(len(line) for line in lines)
    canvas = np.full((len(lines) * down + sum(heights) + GAP, longest * right + GAP, channels), 255, np.uint8)
    for top, line in zip(tops, lines, strict=True):
        for j, image in enumerate(line):
            cell = image.repeat(factor, axis=0).repeat(factor, axis=1)
            left = GAP + j * right
            canvas[top : top + height * factor, left : left + width * factor] = cell
    for top, texts in zip(tops, below, strict=True):
        for j, text in enumerate(texts):
            corner = canvas[top + height * factor :, GAP + j * right :]
            for k, words in enumerate(text):
                _print(words, corner[k * LINE : (k + 1) * LINE, : width * factor])
    return canvas


def _captions(
    captions: Sequence[str] | None, lines: int, lengths: list[int], columns: int | None, width: int
) -> list[list[list[str]]]:
    """Return for each line of images the captions under it, each split into lines of text.

    Only the last line of each group of wrapped rows has captions.
    """
    below: list[list[list[str]]] = [[] for _ in range(lines)]
    if captions is None:
        return below
    longest, at = max(lengths), -1
    step = columns or longest
    for first in range(0, longest, step):
        at += sum(length > first for length in lengths)
        below[at] = [_wrap_text(text, width) for text in captions[first : first + step]]
    return below


def _wrap_text(text: str, width: int) -> list[str]:
    """Wrap a text into at most MOST_LINES lines of `width` pixels. Long words are split; truncation ends in dots."""
    font, lines = ImageFont.load_default(TEXT_SIZE), [""]
    text = "".join(letter if letter.isprintable() else " " for letter in text[: MOST_LINES * width])
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line for line in lines if line]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _print(words: str, where: np.ndarray) -> None:
    """Draw black words into white pixels (h, w, C)."""
    paper = Image.new("L", (where.shape[1], where.shape[0]), 255)
    ImageDraw.Draw(paper).text((0, 0), words, fill=0, font=ImageFont.load_default(TEXT_SIZE))
    where[:] = np.asarray(paper)[..., None]


def write(images: Tensor, folder: Path, start: int = 0) -> list[Path]:
    """Write one PNG per image of (B, C, H, W), named by a six-digit number from `start`."""
    paths = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    for image, path in zip(to_uint8(images), paths, strict=True):
        save(image, path)
    return paths


def save(image: np.ndarray, path: Path) -> None:
    """Write (H, W, 1 or 3) uint8 to a PNG, atomically."""
    drawn = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    replace(path, lambda partial: drawn.save(partial, format="PNG"))


def replace(path: Path, write_to: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and move it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _wrap(rows: list[np.ndarray], columns: int | None) -> list[np.ndarray]:
    """Split rows into lines of `columns` images: the first line of each row, then the second of each, ..."""
    longest = max((len(row) for row in rows), default=0)
    assert longest, "a grid needs at least one image"
    step = columns or longest
    return [row[i : i + step] for i in range(0, longest, step) for row in rows if len(row) > i]
