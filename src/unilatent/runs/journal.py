"""The journal of a run: metrics.jsonl, alarms.jsonl, log.txt, and a progress line.

A line that cannot be written (a full disk) never stops the run: it costs a warning, and the next line is tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..files import write_text
from ..progress import SPEED_OVER, Tasks, clock
from ..terminal import can_redraw

SECONDS_PER_LINE = 10
"""Seconds between progress lines where nothing can be redrawn."""
SHOWN = {"latent_std": "latent_std {:.3g}", "memory_gib": "{:.3g} GiB", "samples_per_second": "{:.3g} samples/s"}
"""Numbers that are shown beside the losses -> how."""


class Bar(Progress):
    """Progress bars with lines of numbers above them."""

    numbers: tuple[str, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        """The lines, as far as the terminal is wide, and the bars."""
        yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in self.numbers)
        yield from super().get_renderables()


@dataclass(frozen=True)
class AlarmChange:
    """An alarm that is raised (on) or over, and what it means."""

    step: int
    alarm: str
    on: bool
    message: str

    def line(self) -> str:
        """Return the line of alarms.jsonl."""
        return json.dumps({"step": self.step, "alarm": self.alarm, "on": self.on, "message": self.message})


class Lines:
    """A file to which complete lines are appended: a line that does not fit is removed again."""

    def __init__(self, path: Path, warn: Callable[[str, str], None]):
        """warn: called with the name of a file that cannot be written, and a message."""
        self.path, self.warn = path, warn

    def write(self, line: str) -> bool:
        """Append a line and return True; if that fails, warn and return False."""
        try:
            with self.path.open("ab", buffering=0) as file:
                self._append(file.fileno(), (line + "\n").encode("utf-8", "backslashreplace"))
            return True
        except OSError as error:
            self.warn(self.path.name, f"{self.path.name} cannot be written ({error.strerror}); training continues")
            return False

    def _append(self, file: int, content: bytes) -> None:
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            while content:
                content = content[os.write(file, content) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise


class Journal:
    """The journal of one run: metrics.jsonl for metrics, log.txt and terminal for messages, terminal for progress."""

    def __init__(self, folder: Path, total: int, done: int, console: Console | None = None, quiet: bool = False):
        """total: steps of the run. done: steps so far. quiet: write nothing (in all processes but the first)."""
        self.total, self.quiet = total, quiet
        self.console = Console(quiet=True) if quiet else console or Console(stderr=True)
        self.live = can_redraw(self.console) and not quiet
        self.done, self.started, self.next_line = done, time.monotonic(), 0.0
        names = [folder / name for name in ("metrics.jsonl", "alarms.jsonl", "log.txt")]
        self.metrics, self.alarms, self.words = (Lines(Path(os.devnull) if quiet else n, self.warn) for n in names)
        self.warned: set[str] = set()
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console, disable=not self.live,
            speed_estimate_period=SPEED_OVER,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total, completed=done)
        self.tasks = Tasks(self.bar if self.live else None, quiet)

    def __enter__(self) -> Journal:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Write a message to log.txt and the terminal."""
        self.words.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, what: str, text: str) -> None:
        """Report something that does not stop training, once per `what`."""
        if what not in self.warned:
            self.warned.add(what)
            self.say(f"warning: {text}")

    def alarm(self, change: AlarmChange) -> None:
        """Report an alarm that is raised or over, also in alarms.jsonl."""
        self.alarms.write(change.line())
        self.say(f"{'ALARM' if change.on else 'alarm'} {change.alarm}, step {change.step}: {change.message}")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Write the metrics of a step, and the progress line."""
        self.metrics.write(json.dumps({"step": step, **numbers}))
        losses = [
            f"{key.removeprefix('loss/')} {value:.4g}" for key, value in numbers.items() if key.startswith("loss/")
        ]
        others = [form.format(numbers[key]) for key, form in SHOWN.items() if key in numbers]
        shown = "  ".join([*losses, *others])
        self.bar.numbers = (f"loss: {'  '.join(losses)}", "  ".join(others))
        now = time.monotonic()
        if shown and not self.live and not self.quiet and (now >= self.next_line or step == self.total):
            self.next_line = now + SECONDS_PER_LINE
            clock = f"  {self._time(step, now - self.started)}" if step > self.done else ""
            print(f"step {step}/{self.total}  {shown}{clock}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.bar.update(self.task, completed=step)

    def _time(self, step: int, elapsed: float) -> str:
        """Elapsed and estimated remaining time, after at least one step."""
        left = elapsed / (step - self.done) * (self.total - step)
        return f"{clock(elapsed)} elapsed, {clock(left)} left"


def trim(path: Path, step: int) -> None:
    """Remove the lines of a .jsonl file after `step`, which a resumed run writes again."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step]
    write_text(path, "".join(line + "\n" for line in lines))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a .jsonl file, except one that a killed process left incomplete; none if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "step" in content:
            yield content


def _step(line: str) -> float:
    try:
        content: dict[str, Any] = json.loads(line)
        return float(content["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
