"""Search for the hyperparameter value at which a metric reaches a target, by a sequence of short runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import read_json, write_json
from ..training.config import RunConfig
from .plots import draw_scatter


@dataclass(frozen=True)
class Trial:
    """A run with one setting: the metric that is calibrated, and all metrics of its analysis (`beside`)."""

    setting: float
    value: float
    beside: dict[str, float]


@dataclass(frozen=True)
class CalibrationResult:
    """The trials in the order in which they ran.

    best: the one nearest to the target. within: whether it is within the tolerance. wrong_way: whether the search
    stopped because changing the setting brought the metric no nearer to the target.
    """

    trials: list[Trial]
    best: Trial
    within: bool
    wrong_way: bool = False

    @property
    def monotone(self) -> bool:
        """Whether the metric never falls as the setting rises."""
        values = [trial.value for trial in sorted(self.trials, key=lambda trial: trial.setting)]
        return values == sorted(values)


REACH = {True: math.log(256), False: 16.0}
"""The largest distance of a setting from its start, by `logarithmic`; if True, the logarithm of a factor."""
PATIENCE = 2
"""The search stops after this many trials in a row that come no nearer to the target."""


def search(
    measure: Callable[[float], Trial], start: float, target: float, tolerance: float, *, logarithmic: bool = False,
    whole: bool = False, low: float = -math.inf, high: float = math.inf, most: int = 10,
) -> CalibrationResult:  # fmt: skip
    """Find the setting at which an increasing function reaches the target, with at most `most` measurements.

    First brackets the target: steps from `start` that double (the first is 1, or a factor of 2), until two settings
    enclose the target, the setting is out of `REACH`, or `PATIENCE` trials came no nearer. Then interpolates linearly
    between the two, at least a tenth away from both. logarithmic: settings are positive and steps are factors. whole:
    settings are integers. low, high: bounds of the setting. No setting is measured twice.
    """
    to_scale, from_scale = (math.log, math.exp) if logarithmic else (float, float)
    if logarithmic and start <= 0:
        raise ValueError(f"start: {start} must be positive for a logarithmic search")
    trials: list[Trial] = []
    under: tuple[float, float] | None = None  # (setting, value) below the target
    over: tuple[float, float] | None = None
    measured: list[float] = []
    setting, step, misses = start, math.log(2) if logarithmic else 1.0, 0
    while len(trials) < most and misses < PATIENCE:
        trial = measure(setting)
        trials.append(trial)
        measured.append(setting)
        if abs(trial.value - target) <= tolerance:
            break
        if trial.value < target:
            under = (setting, trial.value)
        else:
            over = (setting, trial.value)
        if under is None or over is None:
            nearer = len(trials) < 2 or abs(trial.value - target) < abs(trials[-2].value - target)
            misses = 0 if nearer else misses + 1
            place = to_scale(setting) + (step if trial.value < target else -step)
            step *= 2
            if abs(place - to_scale(start)) > REACH[logarithmic]:
                break
        else:
            share = min(max((target - under[1]) / (over[1] - under[1]), 0.1), 0.9)
            place = to_scale(under[0]) + share * (to_scale(over[0]) - to_scale(under[0]))
        setting = min(max(from_scale(place), low), high)
        if whole:
            free = [n for n in _between(under, over) if n not in measured]
            setting = round(setting) if round(setting) not in measured or not free else _nearest(free, setting)
        if setting in measured:
            break
    best = min(trials, key=lambda trial: abs(trial.value - target))
    return CalibrationResult(trials, best, abs(best.value - target) <= tolerance, wrong_way=misses == PATIENCE)


def _between(a: tuple[float, float] | None, b: tuple[float, float] | None) -> range:
    """Return the integers strictly between two settings."""
    return range(0) if a is None or b is None else range(round(min(a[0], b[0])) + 1, round(max(a[0], b[0])))


def _nearest(settings: list[int], target: float) -> int:
    return min(settings, key=lambda n: abs(n - target))


def shortened(run: RunConfig, steps: int | None) -> RunConfig:
    """Return a run of `steps` steps with its learning rate schedule shortened alike, without samples or evaluation."""
    training = run.training
    quiet: dict[str, Any] = {"sample_every": 0, "evaluate_samples": 0, "evaluate_every": 0, "best": None}
    if steps is not None and steps != training.steps:
        schedule = training.schedule
        if schedule.unit == "steps" and training.steps is not None:
            schedule = schedule.stretched(steps / training.steps)
        quiet |= {"steps": steps, "epochs": None, "schedule": schedule}
    return run.model_copy(update={"training": training.model_copy(update=quiet)})


def calibration_table(result: CalibrationResult, over: str, wanted: str, target: float) -> Table:
    """Return a table of the trials, sorted by setting, with the chosen one marked."""
    keys = [key for key in result.trials[0].beside if key != wanted]
    table = Table(
        over, wanted.replace("_", " "), *[key.replace("_", " ") for key in keys], "", title=f"target: {target:g}"
    )
    for trial in sorted(result.trials, key=lambda trial: trial.setting):
        mark = "chosen" if trial is result.best else ""
        table.add_row(f"{trial.setting:.4g}", f"{trial.value:.4g}", *[f"{trial.beside[key]:.4g}" for key in keys], mark)
    return table


def write_calibration(folder: Path, result: CalibrationResult, about: dict[str, Any]) -> None:
    """Write calibration.json and calibration.png."""
    over, wanted = about["over"], about["wanted"]
    chosen = {"setting": result.best.setting, "value": result.best.value, "within_tolerance": result.within}
    trials = [asdict(trial) for trial in result.trials]
    write_json(folder / "calibration.json", {**about, "chosen": chosen, "monotone": result.monotone, "trials": trials})
    keys = [wanted, *[key for key in result.best.beside if key != wanted]]
    points = [
        ("", trial.setting, {key.replace("_", " "): trial.beside[key] for key in keys if key in trial.beside})
        for trial in result.trials
    ]
    draw_scatter(points, over.replace("_", " "), folder / "calibration.png")


def read_trial(folder: Path, setting: float, wanted: str, measured: dict[str, int]) -> Trial | None:
    """Read a trial from its analysis.json; ValueError if that lacks the wanted metric.

    None if there is no analysis yet, or it used other numbers of samples or draws than `measured`.
    """
    path = folder / "analysis.json"
    if not path.is_file():
        return None
    content = read_json(path, "delete the folder to run the trial again")
    if any(content.get(key) != value for key, value in measured.items()):
        return None
    rate = content.get("rate")
    if not rate:
        raise ValueError(f"{folder}: its latents have no bitrate, so there is nothing to calibrate")
    metrics = {**content["errors"], **{name: bits["mean"] for name, bits in rate["bits"].items()}, "use": rate["use"]}
    if wanted not in metrics:
        raise ValueError(f"{wanted}: not measured here; use one of {', '.join(metrics)}")
    return Trial(setting, metrics[wanted], metrics)
