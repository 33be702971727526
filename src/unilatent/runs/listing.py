"""The runs in a folder: how far each is, and whether anything is wrong with it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_yaml
from .journal import read_lines
from .lock import LOCK, owner

FINETUNED = "finetune.yaml"
"""The settings of a run of `finetune-decoder`, which hold the number of its steps."""


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it."""

    folder: Path
    preset: str
    state: str
    """"running"; "crashed" (there is a crash report); "killed" (the process ended without one); "finished" (all steps
    are done and the model is there); "unreadable" (config.yaml is damaged); "stopped" (it can be resumed)."""
    step: int
    steps: int | None
    """Steps of the whole run; None if unknown."""
    metrics: dict[str, Any]
    """The newest value of each metric."""
    alarms: tuple[str, ...]
    """Alarms that are raised and not over."""


def find_runs(folder: Path) -> list[RunState]:
    """Return the runs below `folder`, or `folder` itself, sorted by path; decoders that are being sharpened too."""
    names = ("config.yaml", FINETUNED) if folder.is_dir() else ()
    found = sorted({path.parent for name in names for path in folder.glob(f"**/{name}")})
    return [describe(run) for run in found if (run / "checkpoints").is_dir()]


def describe(run: Path) -> RunState:
    """Return the state of one run."""
    metrics = newest_metrics(run)
    step = max(_whole(metrics.get("step")), _saved_step(run))
    preset, steps, readable = "?", None, False
    with suppress(OSError, ValueError):
        sharpened = (run / FINETUNED).is_file()
        if not sharpened or (run / "config.yaml").is_file():  # that of the run whose decoder is sharpened
            config = read_yaml(run / "config.yaml")
            preset, steps, readable = str(config.get("preset", "custom")), _steps(config, metrics), True
        if sharpened:
            steps, readable = _whole(read_yaml(run / FINETUNED).get("steps")) or None, True
    return RunState(run, preset, _state(run, step, steps, readable), step, steps, metrics, active_alarms(run))


def _steps(config: dict[str, Any], metrics: dict[str, Any]) -> int | None:
    """Steps of the whole run; if it counts epochs, computed from the logged samples and epochs."""
    training = config.get("training")
    if not isinstance(training, dict):
        return None
    if training.get("steps") is not None:
        return _whole(training["steps"]) or None
    values = [metrics.get("samples"), metrics.get("epoch"), training.get("epochs"), training.get("batch_size")]
    numbers = [float(value) for value in values if isinstance(value, int | float) and value > 0]
    if len(numbers) < len(values):
        return None
    samples, epoch, epochs, batch_size = numbers
    return max(1, round(epochs * round(samples / epoch) / batch_size))


def _state(run: Path, step: int, steps: int | None, readable: bool) -> str:
    if owner(run):
        return "running"
    started = (run / "env.json").stat().st_mtime if (run / "env.json").exists() else 0.0
    if any(report.stat().st_mtime >= started for report in (run / "crash").glob("*.txt")):
        return "crashed"
    if (run / LOCK).exists():
        return "killed"
    if not readable:
        return "unreadable"
    return "finished" if steps is not None and step >= steps and (run / "model").is_dir() else "stopped"


def newest_metrics(run: Path) -> dict[str, Any]:
    """Return the newest value of each key of metrics.jsonl, whose lines may have different keys."""
    newest: dict[str, Any] = {}
    for line in read_lines(run / "metrics.jsonl"):
        newest |= line
    return newest


def _saved_step(run: Path) -> int:
    """Step of the newest checkpoint; a run that could not write metrics has it too."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _whole(json.loads((run / "latest.json").read_text(encoding="utf-8"))["step"])
    return 0


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def active_alarms(run: Path) -> tuple[str, ...]:
    """Return the alarms that are raised and not over, in the order in which they were raised."""
    active: dict[str, None] = {}
    for line in read_lines(run / "alarms.jsonl"):
        if line.get("on"):
            active[str(line.get("alarm"))] = None
        else:
            active.pop(str(line.get("alarm")), None)
    return tuple(active)
