"""What runs there are, how far each is, and whether anything is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_yaml
from .journal import read_lines
from .lock import LOCK, owner


@dataclass(frozen=True)
class RunState:
    """metrics: the last line logged. alarms: those raised and not over. steps: of the whole run, None if not known.

    state: "running"; "killed" (its process is gone and said nothing); "crashed" (a report says why); "finished";
    "stopped" (it can be resumed).
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
    config = read_yaml(run / "config.yaml")
    training = config.get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    metrics = last_metrics(run)
    step = int(metrics.get("step", 0))
    return RunState(run, str(config.get("preset", "custom")), _state(run), step, steps, metrics, active_alarms(run))


def _state(run: Path) -> str:
    if owner(run):
        return "running"
    if (run / LOCK).exists():
        return "killed"
    started = (run / "env.json").stat().st_mtime if (run / "env.json").exists() else 0.0
    if any(report.stat().st_mtime >= started for report in (run / "crash").glob("*.txt")):
        return "crashed"
    return "finished" if (run / "model").is_dir() else "stopped"


def last_metrics(run: Path) -> dict[str, Any]:
    """The newest whole line of metrics.jsonl; {} without any."""
    last: dict[str, Any] = {}
    for last in read_lines(run / "metrics.jsonl"):  # noqa: B007
        pass
    return last


def active_alarms(run: Path) -> tuple[str, ...]:
    """Alarms raised and not over, in the order in which they were."""
    active: dict[str, None] = {}
    for line in read_lines(run / "alarms.jsonl"):
        if line.get("on"):
            active[str(line.get("alarm"))] = None
        else:
            active.pop(str(line.get("alarm")), None)
    return tuple(active)
