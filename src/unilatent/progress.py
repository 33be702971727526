"""Progress on stderr with the time that is left: bars in a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .terminal import can_redraw

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[[str, int, int], None]
"""Called with the name of some work, how many more of its items are done, and of how many (0: unknown)."""

SECONDS_PER_LINE = 30.0
"""Seconds between two lines about a task, where nothing can be redrawn."""
SPEED_OVER = 300.0
"""Seconds over which the speed of a bar is averaged: some tasks take a minute an item."""


@dataclass
class Task:
    """One task: what is done, of how many (0: unknown), since when."""

    total: int
    done: int = 0
    since: float = field(default_factory=lambda: time.monotonic())
    line_at: float = field(default_factory=lambda: time.monotonic() + SECONDS_PER_LINE)


class Tasks:
    """The tasks of a command: a bar for each, or a line every SECONDS_PER_LINE, or nothing.

    bar: where bars are drawn; None: nothing can be redrawn.
    """

    def __init__(self, bar: Bars | None, quiet: bool = False):
        self.bar, self.quiet = bar, quiet
        self.bars: dict[str, Any] = {}
        self.tasks: dict[str, Task] = {}

    def advance(self, what: str, more: int, total: int) -> None:
        """Note that `more` further items of task `what` are done, of `total` (0: unknown)."""
        if self.quiet:
            return
        if self.bar is not None:
            if what not in self.bars:
                self.bars[what] = self.bar.add_task(what, total=total or None)
            self.bar.update(self.bars[what], advance=more)
            return
        task = self.tasks.setdefault(what, Task(total))
        task.done += more
        if (now := time.monotonic()) >= task.line_at:
            task.line_at = now + SECONDS_PER_LINE
            print(line_of(what, task, now), file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Forget all tasks, and remove their bars."""
        for bar in self.bars.values() if self.bar is not None else ():
            self.bar.remove_task(bar)  # type: ignore[union-attr]
        self.bars, self.tasks = {}, {}


def no_progress(what: str, more: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def progress_of(quiet: bool = False, transient: bool = False) -> Iterator[Progress]:
    """Yield `advance(what, more, total)` of `Tasks`.

    transient: remove the bars at the end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    redraws = can_redraw(console) and not quiet
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(
        *columns, console=console, transient=transient, disable=not redraws, speed_estimate_period=SPEED_OVER
    ) as bar:
        yield Tasks(bar if redraws else None, quiet).advance


def line_of(what: str, task: Task, now: float) -> str:
    """Return a line about a task: how far it is, and how long it will take."""
    elapsed = now - task.since
    if not task.total:
        return f"{what}: {task.done:,}, {clock(elapsed)} elapsed"
    left = f", {clock(elapsed / task.done * (task.total - task.done))} left" if task.done else ""
    return f"{what}: {task.done:,} of {task.total:,}, {clock(elapsed)} elapsed{left}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, or with hours: 3:20, 1:03:20."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
