"""Progress bars, if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with the name of some work, how many more of its items are done, and of how many (0: unknown)."""


def no_progress(what: str, more: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def progress_of(quiet: bool = False, transient: bool = False) -> Iterator[Progress]:
    """Yield a `Progress`; each kind of work has its own bar. transient: remove the bars at the end."""
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
