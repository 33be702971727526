"""What a run writes down: metrics.jsonl, alarms.jsonl, log.txt, and a line of progress.

None of it is worth a run: what cannot be written (a full disk) costs a warning, and is tried again with the next line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import write_text

if TYPE_CHECKING:
    from .alarms import Change

SECONDS_A_LINE = 10
"""How often progress is a new line where there is no terminal to redraw one."""


class Lines:
    """A file that grows by whole lines: one that does not fit is taken back, so that none is ever half written."""

    def __init__(self, path: Path, warn: Callable[[str, str], None]):
        self.path, self.warn = path, warn

    def write(self, line: str) -> bool:
        """Append it, or warn (what, why) and return False."""
        try:
            with self.path.open("ab", buffering=0) as file:
                self._append(file.fileno(), (line + "\n").encode("utf-8", "backslashreplace"))
            return True
        except OSError as error:
            self.warn(self.path.name, f"{self.path.name} cannot be written ({error.strerror}); training goes on")
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
    """One a run. Numbers go to metrics.jsonl, words to log.txt and the terminal, progress to the terminal alone."""

    def __init__(self, folder: Path, total: int, done: int, console: Console | None = None, quiet: bool = False):
        """quiet: write nothing anywhere (all processes but the first)."""
        self.total, self.quiet = total, quiet
        self.console = Console(quiet=True) if quiet else console or Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.done, self.started, self.next_line = done, time.monotonic(), 0.0
        names = [folder / name for name in ("metrics.jsonl", "alarms.jsonl", "log.txt")]
        self.metrics, self.alarms, self.words = (Lines(Path(os.devnull) if quiet else n, self.warn) for n in names)
        self.warned: set[str] = set()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console, disable=not self.live,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total, completed=done)

    def __enter__(self) -> Journal:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """A line for people."""
        self.words.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, what: str, text: str) -> None:
        """Something that training does without; said once for each `what`."""
        if what not in self.warned:
            self.warned.add(what)
            self.say(f"warning: {text}")

    def alarm(self, change: Change) -> None:
        """An alarm raised or over, for people and in alarms.jsonl."""
        self.alarms.write(change.line())
        self.say(f"{'ALARM' if change.on else 'alarm'} {change.alarm}, step {change.step}: {change.message}")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step, for machines, and the terminal's progress line."""
        self.metrics.write(json.dumps({"step": step, **numbers}))
        shown = "  ".join(f"{key.removeprefix('loss/')} {value:.4g}" for key, value in numbers.items() if _shown(key))
        self.bar.update(self.task, description=shown)
        now = time.monotonic()
        if not self.live and not self.quiet and (now >= self.next_line or step == self.total):
            self.next_line = now + SECONDS_A_LINE
            clock = f"  {self._time(step, now - self.started)}" if step > self.done else ""
            print(f"step {step}/{self.total}  {shown}{clock}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def _time(self, step: int, gone: float) -> str:
        """Time since the start, and what is left at that speed; for a step after the one it started from."""
        left = gone / (step - self.done) * (self.total - step)
        return f"{_clock(gone)} gone, {_clock(left)} left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _shown(key: str) -> bool:
    return key.startswith("loss/") or key in ("samples_per_second", "latent_std")


def trim(path: Path, step: int) -> None:
    """Drop lines of metrics.jsonl beyond `step`: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects, without what a killed process half wrote; none if it is not there."""
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
