"""Pictures of systems side by side in one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

LETTER, LINE = 6, 12
"""Pixels of a letter and of a line of Pillow's own font."""


def paste_grid(
    rows: Sequence[Sequence[Image.Image]], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
) -> None:
    """Rows of pictures as one PNG, which appears whole or not at all.

    columns: at most so many a line; longer rows continue below, in groups of one line of every row. captions: a text
    for each picture of the last row, under it.
    """
    longest = max((len(row) for row in rows), default=0)
    assert longest, "a grid needs at least one picture"
    step = min(columns or longest, longest)
    width = max(cell.width for row in rows for cell in row)
    height = max(cell.height for row in rows for cell in row)
    wrapped = [textwrap.wrap(text, width // LETTER) for text in captions or []]
    under = LINE * max(map(len, wrapped), default=0)
    block = len(rows) * height + under
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
