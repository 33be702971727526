"""Pictures to PNG files: rounded to 8 bits, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 32
GAP = 2
SMALLEST_CAPTIONED = 96
TEXT_SIZE, LINE, MOST_LINES = 10, 13, 6
"""Of captions: size and height of a line in pixels, and how many lines at most."""


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] to (B, H, W, C) uint8, rounded to the nearest of 256 levels; NaN becomes black."""
    levels = (images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round()
    return levels.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def draw_grid(
    rows: Sequence[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
) -> None:
    """Rows of pictures (B, C, H, W) as one PNG, small ones magnified by a whole factor to 32 to 63 pixels.

    columns: at most so many pictures a line; longer rows continue below, in groups of one line of every row.
    captions: B texts, wrapped under each picture of the last row; pictures are then at least 96 pixels wide.
    """
    lines = _wrap([to_uint8(row) for row in rows], columns)
    height, width, channels = lines[0].shape[1:]
    factor = max(1, -(-SMALLEST_CELL // min(height, width)))
    if captions is not None:
        factor = max(factor, -(-SMALLEST_CAPTIONED // width))
    below = _captions(captions, len(lines), [len(row) for row in rows], columns, width * factor)
    down, right = height * factor + GAP, width * factor + GAP
    room = [LINE * max(map(len, texts), default=0) for texts in below]  # pixels under each line of pictures
    tops = [GAP + i * down + sum(room[:i]) for i in range(len(lines))]
    most = max(len(line) for line in lines)
    canvas = np.full((len(lines) * down + sum(room) + GAP, most * right + GAP, channels), 255, np.uint8)
    for top, line in zip(tops, lines, strict=True):
        for j, picture in enumerate(line):
            cell = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            left = GAP + j * right
            canvas[top : top + height * factor, left : left + width * factor] = cell
    for top, texts in zip(tops, below, strict=True):
        for j, text in enumerate(texts):
            corner = canvas[top + height * factor :, GAP + j * right :]
            for k, words in enumerate(text):
                _print(words, corner[k * LINE : (k + 1) * LINE, : width * factor])
    save(canvas, path)


def _captions(
    captions: Sequence[str] | None, lines: int, lengths: list[int], columns: int | None, width: int
) -> list[list[list[str]]]:
    """For each line of pictures what stands under each of them, in lines of text; nothing but under the last of the
    lines that belong together."""
    below: list[list[list[str]]] = [[] for _ in range(lines)]
    if captions is None:
        return below
    longest, at = max(lengths), -1
    step = columns or longest
    for first in range(0, longest, step):
        at += sum(length > first for length in lengths)
        below[at] = [_broken(text, width) for text in captions[first : first + step]]
    return below


def _broken(text: str, width: int) -> list[str]:
    """A text as at most MOST_LINES lines of `width` pixels; words that are longer are broken, what is left is dots."""
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
    """Black words into white (h, w, C) pixels."""
    paper = Image.new("L", (where.shape[1], where.shape[0]), 255)
    ImageDraw.Draw(paper).text((0, 0), words, fill=0, font=ImageFont.load_default(TEXT_SIZE))
    where[:] = np.asarray(paper)[..., None]


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
