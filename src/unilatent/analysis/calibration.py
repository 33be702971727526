"""The setting that gives a wanted number: short runs, each nearer than the one before."""

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
    """A setting, the number it gave, and the others that were looked at on the way."""

    setting: float
    value: float
    beside: dict[str, float]


@dataclass(frozen=True)
class Found:
    """The trials in the order in which they were made; best: nearest to the target; within: as near as asked for.
    wrong_way: given up, as turning the dial towards the target brought the number no nearer."""

    trials: list[Trial]
    best: Trial
    within: bool
    wrong_way: bool = False

    @property
    def monotone(self) -> bool:
        """Whether no larger setting gave a smaller number."""
        values = [trial.value for trial in sorted(self.trials, key=lambda trial: trial.setting)]
        return values == sorted(values)


REACH = {True: math.log(256), False: 16.0}
"""How far from its start a dial is turned at most; True: a factor, by its logarithm."""
PATIENCE = 2
"""Trials in a row that come no nearer to the target, after which a dial is given up."""


def search(
    measure: Callable[[float], Trial], start: float, target: float, tolerance: float, *, logarithmic: bool = False,
    whole: bool = False, low: float = -math.inf, high: float = math.inf, most: int = 10,
) -> Found:  # fmt: skip
    """The setting at which a rising function reaches the target, by at most `most` measurements.

    From `start` in steps that double (the first: 1, or a factor of 2) until two settings enclose the target, the dial
    is further from its start than anybody would turn it, or the number came no nearer twice in a row; then where a line
    between these two meets it, kept off their ends by a tenth. logarithmic: settings are positive, steps are factors.
    whole: settings are integers. low, high: settings end there. No setting is measured twice.
    """
    forth, back = (math.log, math.exp) if logarithmic else (float, float)
    if logarithmic and start <= 0:
        raise ValueError(f"start: {start} must be positive to be searched by factors")
    trials: list[Trial] = []
    under: tuple[float, float] | None = None  # (setting, value) below the target
    over: tuple[float, float] | None = None
    asked: list[float] = []
    setting, step, misses = start, math.log(2) if logarithmic else 1.0, 0
    while len(trials) < most and misses < PATIENCE:
        trial = measure(setting)
        trials.append(trial)
        asked.append(setting)
        if abs(trial.value - target) <= tolerance:
            break
        if trial.value < target:
            under = (setting, trial.value)
        else:
            over = (setting, trial.value)
        if under is None or over is None:
            nearer = len(trials) < 2 or abs(trial.value - target) < abs(trials[-2].value - target)
            misses = 0 if nearer else misses + 1
            place = forth(setting) + (step if trial.value < target else -step)
            step *= 2
            if abs(place - forth(start)) > REACH[logarithmic]:
                break
        else:
            share = min(max((target - under[1]) / (over[1] - under[1]), 0.1), 0.9)
            place = forth(under[0]) + share * (forth(over[0]) - forth(under[0]))
        setting = min(max(back(place), low), high)
        if whole:
            free = [n for n in _between(under, over) if n not in asked]
            setting = round(setting) if round(setting) not in asked or not free else _nearest(free, setting)
        if setting in asked:
            break
    best = min(trials, key=lambda trial: abs(trial.value - target))
    return Found(trials, best, abs(best.value - target) <= tolerance, wrong_way=misses == PATIENCE)


def _between(a: tuple[float, float] | None, b: tuple[float, float] | None) -> range:
    """Integers between two settings."""
    return range(0) if a is None or b is None else range(round(min(a[0], b[0])) + 1, round(max(a[0], b[0])))


def _nearest(settings: list[int], wanted: float) -> int:
    return min(settings, key=lambda n: abs(n - wanted))


def shortened(run: RunConfig, steps: int | None) -> RunConfig:
    """A run of so many steps, its learning rate's schedule shortened with it; without pictures or evaluation."""
    training = run.training
    quiet: dict[str, Any] = {"sample_every": 0, "evaluate_samples": 0, "evaluate_every": 0, "best": None}
    if steps is not None and steps != training.steps:
        schedule = training.schedule
        if schedule.unit == "steps" and training.steps is not None:
            schedule = schedule.stretched(steps / training.steps)
        quiet |= {"steps": steps, "epochs": None, "schedule": schedule}
    return run.model_copy(update={"training": training.model_copy(update=quiet)})


def calibration_table(found: Found, over: str, wanted: str, target: float) -> Table:
    """The trials by rising setting; the chosen one marked."""
    keys = [key for key in found.trials[0].beside if key != wanted]
    table = Table(
        over, wanted.replace("_", " "), *[key.replace("_", " ") for key in keys], "", title=f"wanted: {target:g}"
    )
    for trial in sorted(found.trials, key=lambda trial: trial.setting):
        mark = "chosen" if trial is found.best else ""
        table.add_row(f"{trial.setting:.4g}", f"{trial.value:.4g}", *[f"{trial.beside[key]:.4g}" for key in keys], mark)
    return table


def write_calibration(folder: Path, found: Found, about: dict[str, Any]) -> None:
    """calibration.json and calibration.png."""
    over, wanted = about["over"], about["wanted"]
    chosen = {"setting": found.best.setting, "value": found.best.value, "within_tolerance": found.within}
    trials = [asdict(trial) for trial in found.trials]
    write_json(folder / "calibration.json", {**about, "chosen": chosen, "monotone": found.monotone, "trials": trials})
    keys = [wanted, *[key for key in found.best.beside if key != wanted]]
    points = [
        ("", trial.setting, {key.replace("_", " "): trial.beside[key] for key in keys if key in trial.beside})
        for trial in found.trials
    ]
    draw_scatter(points, over.replace("_", " "), folder / "calibration.png")


def read_trial(folder: Path, setting: float, wanted: str, measured: dict[str, int]) -> Trial | None:
    """What a trial's analysis says; None if it has none yet, or one measured otherwise than with these numbers of
    samples and draws. ValueError if the number is not among it."""
    path = folder / "analysis.json"
    if not path.is_file():
        return None
    content = read_json(path, "delete the folder to make the trial again")
    if any(content.get(key) != value for key, value in measured.items()):
        return None
    rate = content.get("rate")
    if not rate:
        raise ValueError(f"{folder}: its latents have no rate, so there is nothing to calibrate")
    beside = {**content["errors"], **{name: bits["mean"] for name, bits in rate["bits"].items()}, "use": rate["use"]}
    if wanted not in beside:
        raise ValueError(f"{wanted}: not measured here; there are {', '.join(beside)}")
    return Trial(setting, beside[wanted], beside)
