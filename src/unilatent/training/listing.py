"""What runs there are, and how far each is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_yaml
from .lock import owner


@dataclass(frozen=True)
class RunState:
    """state: "running", "finished" or "stopped"; metrics: the last line logged."""

    folder: Path
    preset: str
    state: str
    step: int
    metrics: dict[str, Any]


def find_runs(folder: Path) -> list[RunState]:
    """Every run folder below `folder`, or `folder` itself, by name."""
    configs = sorted(folder.glob("**/config.yaml")) if folder.is_dir() else []
    return [describe(path.parent) for path in configs if (path.parent / "checkpoints").is_dir()]


def describe(run: Path) -> RunState:
    """The state of one run."""
    metrics = last_metrics(run)
    finished = (run / "model").is_dir()
    state = "running" if owner(run) else "finished" if finished else "stopped"
    preset = str(read_yaml(run / "config.yaml").get("preset", "custom"))
    return RunState(run, preset, state, int(metrics.get("step", 0)), metrics)


def last_metrics(run: Path) -> dict[str, Any]:
    """The newest whole line of metrics.jsonl; {} without any."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
    return {}
