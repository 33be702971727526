"""EMA snapshots: the EMA weights of power profiles at several steps of a run, from which other lengths are computed.

RUN/ema/step_00001000.safetensors   float32, `LENGTH/NAME`, for each profile in training.ema_profiles

They are float32, since they are combined with coefficients of either sign, which amplify rounding errors.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import readable
from ..maths.ema_profiles import PowerProfile, Profile, coefficients, gamma_of
from ..methods.base import LatentModel

FOLDER = "ema"
NAME = re.compile(r"step_(\d+)\.safetensors(\.tmp-\d+)?")


def write_snapshot(run: Path, step: int, weights: dict[str, Tensor]) -> Path:
    """Write a snapshot atomically and return its path; OSError if the disk is full."""
    path = snapshot_path(run, step)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(weights, temporary)
        readable(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def snapshot_path(run: Path, step: int) -> Path:
    """Return where the snapshot of a step is."""
    return run / FOLDER / f"step_{step:08d}.safetensors"


def trim_snapshots(run: Path, step: int) -> None:
    """Remove leftovers and the snapshots after `step`, which a run that resumes there writes again."""
    for path in (run / FOLDER).glob("step_*"):
        match = NAME.fullmatch(path.name)
        if match and (match[2] or int(match[1]) > step):
            path.unlink()


@dataclass(frozen=True)
class EMASnapshot:
    """The EMA weights of one profile at one step."""

    path: Path
    length: str
    """sigma_rel, as in the names of the tensors."""
    profile: PowerProfile


class EMASnapshots:
    """The EMA snapshots of a run, and the EMA weights of other lengths computed from them."""

    def __init__(self, run: Path, step: int | None = None):
        """step: step of a snapshot at which computed EMA weights end; None: the last. ValueError without snapshots."""
        self.run = run
        paths = sorted(path for path in (run / FOLDER).glob("step_*.safetensors") if NAME.fullmatch(path.name))
        if not paths:
            raise ValueError(
                f"{run}: no snapshots in {FOLDER}/; train with training.ema_profiles=[0.05,0.1], which stores them"
            )
        steps = [_step(path) for path in paths]
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise ValueError(f"--step: {self.step} has no snapshot; there are {', '.join(map(str, steps))}")
        self.stored = [
            EMASnapshot(path, length, PowerProfile(gamma_of(float(length)), at))
            for path, at in zip(paths, steps, strict=True)
            for length in _lengths(path)
            if at <= self.step
        ]

    def make(self, target: Profile) -> tuple[dict[str, Tensor], float]:
        """Return the EMA weights of a profile in float32, and the error of their profile (`coefficients`).

        Sums in float64 and reads one file at a time.
        """
        factors, error = coefficients([stored.profile for stored in self.stored], target)
        shares = {(stored.path, stored.length): float(c) for c, stored in zip(factors, self.stored, strict=True)}
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
        """Give the run's model the EMA weights of a relative length; return the error of their profile.

        Frozen parameters, which snapshots of earlier versions hold too, stay as they are.
        """
        weights, error = self.make(PowerProfile(gamma_of(sigma_rel), self.step))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        if parameters.keys() != weights.keys() - frozen:
            raise ValueError(f"{self.run / FOLDER}: holds EMA weights of another model; train into a new folder")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        return error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _lengths(path: Path) -> list[str]:
    """The EMA lengths in a snapshot file; ValueError names a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted({name.partition("/")[0] for name in list(file.keys())})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, the other snapshots suffice") from None
