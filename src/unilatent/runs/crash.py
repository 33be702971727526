"""Crash reports: one file per process of a failed run, with everything that a bug report needs."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any


def write_report(run: Path, rank: int, error: BaseException, config: str, env: dict[str, Any]) -> str:
    """Write traceback, configuration, environment and last metrics to crash/TIME.rankN.txt; return its path.

    If it cannot be written (a full disk), the reason is returned instead, so that the original error is still raised.
    """
    trace = "".join(traceback.format_exception(error))
    parts = {"traceback": trace, "environment": json.dumps(env, indent=2), "last metrics": _tail(run), "config": config}
    folder, stamp, number = run / "crash", time.strftime("%Y%m%d-%H%M%S"), 1
    path = folder / f"{stamp}.rank{rank}.txt"
    while path.exists():  # two reports within a second, or a clock that was set back
        number += 1
        path = folder / f"{stamp}-{number}.rank{rank}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(f"== {title}\n{text.rstrip()}\n" for title, text in parts.items())
        path.write_text(text, "utf-8", "backslashreplace")
    except OSError as failure:
        return f"none ({path}: {failure.strerror})"
    return str(path)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tail(run: Path, lines: int = 5) -> str:
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return ""
    return "\n".join(metrics.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
