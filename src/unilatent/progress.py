"""Progress bars, if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_of(quiet: bool = False, transient: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield `advance(what, more, total)`: `more` further items of task `what` are done, of `total` (0: unknown).

    Each task has its own bar. transient: remove the bars at the end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=transient, disable=quiet or not console.is_terminal) as bar:

        def advance(what: str, more: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], advance=more)

        yield advance
