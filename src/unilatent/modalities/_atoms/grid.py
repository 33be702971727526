"""Images of systems, side by side in one PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

LETTER, LINE = 6, 12
"""Width of a letter and height of a line in Pillow's default font, pixels."""


def paste_grid(
    rows: Sequence[Sequence[Image.Image]], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
) -> None:
    """Write rows of images as one PNG, atomically.

    columns: the most images per line; longer rows wrap: each block of the grid then holds one line of every row, and
    further blocks follow below. captions: one text per image of the last row, printed below it.
    """
    longest = max((len(row) for row in rows), default=0)
    assert longest, "a grid needs at least one image"
    step = min(columns or longest, longest)
    width = max(cell.width for row in rows for cell in row)
    height = max(cell.height for row in rows for cell in row)
    wrapped = [textwrap.wrap(text, width // LETTER) for text in captions or []]
    caption_height = LINE * max(map(len, wrapped), default=0)
    block = len(rows) * height + caption_height
    canvas = Image.new("RGB", (step * width, -(-longest // step) * block), "white")
    words = ImageDraw.Draw(canvas)
    for i in range(longest):
        down, across = divmod(i, step)
        for r, row in enumerate(rows):
            if i < len(row):
                canvas.paste(row[i], (across * width, down * block + r * height))
        for line, text in enumerate(wrapped[i] if i < len(wrapped) else []):
            words.text((across * width + 2, down * block + len(rows) * height + line * LINE), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    canvas.save(temporary, format="PNG")
    temporary.replace(path)
