"""What a run writes down: metrics.jsonl, log.txt, and a line of progress."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import write_text

SECONDS_A_LINE = 10
"""How often progress is a new line where there is no terminal to redraw one."""


class Journal:
    """One a run. Numbers go to metrics.jsonl, words to log.txt and the terminal, progress to the terminal alone."""

    def __init__(self, folder: Path, total: int, done: int, console: Console | None = None, quiet: bool = False):
        """quiet: write nothing anywhere (all processes but the first)."""
        self.total, self.quiet = total, quiet
        self.console = Console(quiet=True) if quiet else console or Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.done, self.started, self.next_line = done, time.monotonic(), 0.0
        names = (os.devnull, os.devnull) if quiet else (folder / "metrics.jsonl", folder / "log.txt")
        self.metrics, self.words = (Path(name).open("a", encoding="utf-8", errors="backslashreplace") for name in names)  # noqa: SIM115
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
        self.metrics.close()
        self.words.close()

    def say(self, text: str) -> None:
        """A line for people."""
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.words, flush=True)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step, for machines, and the terminal's progress line."""
        print(json.dumps({"step": step, **numbers}), file=self.metrics, flush=True)
        shown = "  ".join(f"{key.removeprefix('loss/')} {value:.4g}" for key, value in numbers.items() if _shown(key))
        self.bar.update(self.task, description=shown)
        now = time.monotonic()
        if not self.live and not self.quiet and (now >= self.next_line or step == self.total):
            self.next_line = now + SECONDS_A_LINE
            left = (now - self.started) / (step - self.done) * (self.total - step)
            clock = f"{_clock(now - self.started)} gone, {_clock(left)} left"
            print(f"step {step}/{self.total}  {shown}  {clock}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)


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


def _step(line: str) -> float:
    try:
        content: dict[str, Any] = json.loads(line)
        return float(content["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
