"""The setting that gives a wanted number: short runs, each nearer than the one before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import read_json, write_json
from ..training.config import RunConfig, ScheduleConfig
from .plots import draw_scatter


@dataclass(frozen=True)
class Trial:
    """A setting, the number it gave, and the others that were looked at on the way."""

    setting: float
    value: float
    beside: dict[str, float]


@dataclass(frozen=True)
class Found:
    """The trials in the order in which they were made; best: nearest to the target; within: as near as asked for."""

    trials: list[Trial]
    best: Trial
    within: bool

    @property
    def monotone(self) -> bool:
        """Whether no larger setting gave a smaller number."""
        values = [trial.value for trial in sorted(self.trials, key=lambda trial: trial.setting)]
        return values == sorted(values)


REACH = {True: math.log(256), False: 16.0}
"""How far from its start a dial is turned at most; True: a factor, by its logarithm."""


def search(
    measure: Callable[[float], Trial], start: float, target: float, tolerance: float, *, logarithmic: bool = False,
    most: int = 10,
) -> Found:  # fmt: skip
    """The setting at which a rising function reaches the target, by at most `most` measurements.

    From `start` in steps that double (the first: 1, or a factor of 2) until two settings enclose the target, or the
    dial is further from its start than anybody would turn it; then where a line between these two meets it, kept off
    their ends by a tenth. logarithmic: settings are positive, steps are factors.
    """
    forth, back = (math.log, math.exp) if logarithmic else (float, float)
    if logarithmic and start <= 0:
        raise ValueError(f"start: {start} must be positive to be searched by factors")
    trials: list[Trial] = []
    low: tuple[float, float] | None = None  # (place, value) below the target
    high: tuple[float, float] | None = None
    place, step = forth(start), math.log(2) if logarithmic else 1.0
    while len(trials) < most:
        trial = measure(back(place))
        trials.append(trial)
        if abs(trial.value - target) <= tolerance:
            break
        if trial.value < target:
            low = (place, trial.value)
        else:
            high = (place, trial.value)
        if low is None or high is None:
            place += step if trial.value < target else -step
            step *= 2
            if abs(place - forth(start)) > REACH[logarithmic]:
                break
            continue
        share = (target - low[1]) / (high[1] - low[1])
        place = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
    best = min(trials, key=lambda trial: abs(trial.value - target))
    return Found(trials, best, abs(best.value - target) <= tolerance)


def shortened(run: RunConfig, steps: int | None) -> RunConfig:
    """A run of so many steps, its learning rate's schedule shortened with it; without pictures or evaluation."""
    training = run.training
    quiet: dict[str, Any] = {"sample_every": 0, "evaluate_samples": 0, "evaluate_every": 0, "best": None}
    if steps is not None and steps != training.steps:
        schedule = training.schedule
        if schedule.unit == "steps" and training.steps is not None:
            ratio = steps / training.steps
            decays = tuple(
                d.model_copy(update={"start": d.start * ratio, "end": d.end * ratio}) for d in schedule.decays
            )
            schedule = ScheduleConfig(unit="steps", warmup=schedule.warmup * ratio, decays=decays)
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


def read_trial(folder: Path, setting: float, wanted: str) -> Trial | None:
    """What a trial's analysis says; None if it has none yet. ValueError if the number is not among it."""
    path = folder / "analysis.json"
    if not path.is_file():
        return None
    content = read_json(path, "delete the folder to make the trial again")
    rate = content.get("rate")
    if not rate:
        raise ValueError(f"{folder}: its latents have no rate, so there is nothing to calibrate")
    beside = {**content["errors"], **{name: bits["mean"] for name, bits in rate["bits"].items()}, "use": rate["use"]}
    if wanted not in beside:
        raise ValueError(f"{wanted}: not measured here; there are {', '.join(beside)}")
    return Trial(setting, beside[wanted], beside)
