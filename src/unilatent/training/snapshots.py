"""Averages under power profiles as they were at several steps of a run, and averages of any length made from them.

RUN/ema/step_00001000.safetensors   float32, `LENGTH/NAME`, of every profile in training.ema_profiles

Float32, since coefficients of either sign are applied to them, which multiply what rounding has cost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..maths.ema_profiles import PowerProfile, Profile, coefficients, gamma_of
from ..methods.base import LatentModel

FOLDER = "ema"


def write_snapshot(run: Path, step: int, weights: dict[str, Tensor]) -> Path:
    """Whole or not at all; OSError if there is no room."""
    path = snapshot_path(run, step)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(weights, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def snapshot_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}.safetensors"


def trim_snapshots(run: Path, step: int) -> None:
    """Before training goes on from `step`: those of later steps, which it makes again, and leftovers are removed."""
    for path in (run / FOLDER).glob("step_*"):
        if path.suffix != ".safetensors" or _step(path) > step:
            path.unlink()


@dataclass(frozen=True)
class Stored:
    """A profile in a file."""

    path: Path
    length: str
    profile: PowerProfile


class Snapshots:
    """The snapshots of a run, and what can be made of them."""

    def __init__(self, run: Path, step: int | None = None):
        """step: the end of the averages to be made, a snapshot's; None for the last. ValueError if there are none."""
        self.run = run
        paths = sorted((run / FOLDER).glob("step_*.safetensors"))
        if not paths:
            raise ValueError(
                f"{run}: no snapshots in {FOLDER}/; train with training.ema_profiles=[0.05,0.1], which stores them"
            )
        steps = [_step(path) for path in paths]
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise ValueError(f"--step: {self.step} has no snapshot; there are {', '.join(map(str, steps))}")
        self.stored = [
            Stored(path, length, PowerProfile(gamma_of(float(length)), at))
            for path, at in zip(paths, steps, strict=True)
            for length in _lengths(path)
            if at <= self.step
        ]

    def make(self, wanted: Profile) -> tuple[dict[str, Tensor], float]:
        """Averaged parameters in float32, and how far their profile is from the wanted one (`coefficients`).

        Sums in float64 and holds one file at a time.
        """
        found, error = coefficients([stored.profile for stored in self.stored], wanted)
        shares = {(stored.path, stored.length): float(c) for c, stored in zip(found, self.stored, strict=True)}
        total: dict[str, Tensor] = {}
        for path in dict.fromkeys(stored.path for stored in self.stored):
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    length, _, parameter = name.partition("/")
                    if share := shares[path, length]:
                        tensor = file.get_tensor(name).double() * share
                        total[parameter] = total[parameter].add_(tensor) if parameter in total else tensor
        return {name: tensor.float() for name, tensor in total.items()}, error

    def apply(self, model: LatentModel, sigma_rel: float) -> float:
        """Gives the run's model the average of that relative length; how far it is from what was asked for."""
        weights, error = self.make(PowerProfile(gamma_of(sigma_rel), self.step))
        own = dict(model.named_parameters())
        if own.keys() != weights.keys():
            raise ValueError(f"{self.run / FOLDER}: holds averages of another model; train into a new folder")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        return error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _lengths(path: Path) -> list[str]:
    """Of a snapshot; ValueError names a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted({name.partition("/")[0] for name in list(file.keys())})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, the others can do without") from None
