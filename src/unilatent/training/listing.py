"""What runs there are, how far each is, and whether anything is wrong with it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_yaml
from .journal import read_lines
from .lock import LOCK, owner


@dataclass(frozen=True)
class RunState:
    """metrics: the newest value of each key. alarms: those raised and not over. steps: of the whole run, None if not
    known.

    state: "running"; "crashed" (a report says why); "killed" (its process is gone and said nothing); "finished" (it
    took all its steps, and its model is there); "unreadable" (its config.yaml is); "stopped" (it can be resumed).
    """

    folder: Path
    preset: str
    state: str
    step: int
    steps: int | None
    metrics: dict[str, Any]
    alarms: tuple[str, ...]


def find_runs(folder: Path) -> list[RunState]:
    """Every run folder below `folder`, or `folder` itself, by name."""
    configs = sorted(folder.glob("**/config.yaml")) if folder.is_dir() else []
    return [describe(path.parent) for path in configs if (path.parent / "checkpoints").is_dir()]


def describe(run: Path) -> RunState:
    """The state of one run."""
    metrics = newest_metrics(run)
    step = max(_whole(metrics.get("step")), _saved_step(run))
    preset, steps, known = "?", None, False
    with suppress(OSError, ValueError):
        config = read_yaml(run / "config.yaml")
        preset, steps, known = str(config.get("preset", "custom")), _steps(config, metrics), True
    return RunState(run, preset, _state(run, step, steps, known), step, steps, metrics, active_alarms(run))


def _steps(config: dict[str, Any], metrics: dict[str, Any]) -> int | None:
    """Of the whole run; where it counts epochs, from what a line says of samples and epochs."""
    training = config.get("training")
    if not isinstance(training, dict):
        return None
    if training.get("steps") is not None:
        return _whole(training["steps"]) or None
    given = [metrics.get("samples"), metrics.get("epoch"), training.get("epochs"), training.get("batch_size")]
    numbers = [float(value) for value in given if isinstance(value, int | float) and value > 0]
    if len(numbers) < len(given):
        return None
    seen, epoch, epochs, size = numbers
    return max(1, round(epochs * round(seen / epoch) / size))


def _state(run: Path, step: int, steps: int | None, known: bool) -> str:
    if owner(run):
        return "running"
    started = (run / "env.json").stat().st_mtime if (run / "env.json").exists() else 0.0
    if any(report.stat().st_mtime >= started for report in (run / "crash").glob("*.txt")):
        return "crashed"
    if (run / LOCK).exists():
        return "killed"
    if not known:
        return "unreadable"
    return "finished" if steps is not None and step >= steps and (run / "model").is_dir() else "stopped"


def newest_metrics(run: Path) -> dict[str, Any]:
    """The newest value of each key of metrics.jsonl, whose lines do not all have the same; {} without any."""
    newest: dict[str, Any] = {}
    for line in read_lines(run / "metrics.jsonl"):
        newest |= line
    return newest


def _saved_step(run: Path) -> int:
    """Of the newest checkpoint, which a run that could write no metrics still has."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _whole(json.loads((run / "latest.json").read_text(encoding="utf-8"))["step"])
    return 0


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def active_alarms(run: Path) -> tuple[str, ...]:
    """Alarms raised and not over, in the order in which they were."""
    active: dict[str, None] = {}
    for line in read_lines(run / "alarms.jsonl"):
        if line.get("on"):
            active[str(line.get("alarm"))] = None
        else:
            active.pop(str(line.get("alarm")), None)
    return tuple(active)
