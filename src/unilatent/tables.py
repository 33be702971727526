"""Tables on standard output: in a terminal as wide as it is, in a file or a pipe one line a row, whatever its width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

ARROWS = {"higher": "↑", "lower": "↓", "same": "="}
"""Direction in which a number is better -> its mark."""
CAUTION = "⚠"
GAP = 2
"""Columns between two columns of a table."""
ENDLESS = 10**6
"""More columns than any table has."""


def marked(cautions: Iterable[str]) -> list[str]:
    """Return cautions as they are shown beside a number: readable without colours too."""
    return [f"{CAUTION} {caution}" for caution in cautions]


def show(table: Any, console: Console | None = None) -> None:
    """Print a rich Table, or a Group of tables and lines of Text, to standard output.

    In a terminal, cells are wrapped between words. A table that is too wide even so is printed as one block of lines
    per row, each with the name of its column. Elsewhere nothing is wrapped, so that other programs can read it.
    """
    from rich.console import Console, Group
    from rich.table import Table

    console = console or Console()
    for part in table.renderables if isinstance(table, Group) else [table]:
        if not isinstance(part, Table):
            console.print(part, soft_wrap=not console.is_terminal, highlight=False)
            continue
        widths = [_widths(part, index, console) for index in range(len(part.columns))]
        if not console.is_terminal:
            console.width = max(console.width, sum(most for _, most in widths) + GAP * len(widths))
        if sum(least for least, _ in widths) + GAP * len(widths) > console.width:
            _show_blocks(part, console)
        else:
            _show_table(part, [least for least, _ in widths], console)


def _show_table(table: Table, least: list[int], console: Console) -> None:
    """Print a table under one line, in columns of at least these widths, without spaces at the ends of lines."""
    from rich.box import SIMPLE_HEAD

    table.box, table.show_edge, table.pad_edge, table.padding = SIMPLE_HEAD, False, False, (0, GAP - 1, 0, 0)
    title, table.title = table.title, None
    for column, width in zip(table.columns, least, strict=True):
        column.min_width = width  # words are not broken
    if title:
        console.print(title, style="bold", highlight=False, soft_wrap=True)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _widths(table: Table, index: int, console: Console) -> tuple[int, int]:
    """Widths of the longest word, and of the longest line, in a column of a table."""
    from rich.measure import Measurement

    column, options = table.columns[index], console.options.update(width=ENDLESS)
    cells = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    most = max(cell.maximum for cell in cells)
    return (most if column.no_wrap else max(cell.minimum for cell in cells)), most


def _show_blocks(table: Table, console: Console) -> None:
    """Print each row as lines of a column's name and its cell."""
    from rich.text import Text

    def text_of(cell: Any) -> Text:
        return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)

    names = [text_of(column.header).plain for column in table.columns]
    wide = max(map(len, names)) + GAP
    if table.title:
        console.print(table.title, style="bold", highlight=False)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for name, cell in zip(names, map(text_of, row), strict=True):
            for number, line in enumerate(cell.wrap(console, max(console.width - wide, 20))):
                if line.plain:
                    label = Text(("" if number else name).ljust(wide), style="bold")
                    console.print(label + line, highlight=False, soft_wrap=True)
        console.print()
