"""What training changes, and a checkpoint therefore stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from ..methods.base import LatentModel
from ..processes import Processes
from ..sharding import local
from .config import TrainingConfig
from .ema import EMA, PowerEMAs
from .optimizer import Optimizers
from .restoring import restore


class TrainingState:
    """Weights, EMA weights, optimizer state and counters of a run.

    step: optimiser steps done. skipped: how many of the last ones in a row were not finite and left out.
    """

    def __init__(self, model: LatentModel, config: TrainingConfig):
        self.model = model
        self.optimizers = Optimizers(model, config.optimizer)
        self.ema = EMA(model, config.ema_decay)
        self.power_emas = PowerEMAs(model, config.ema_profiles)
        self.step, self.skipped = 0, 0

    def advance(self) -> None:
        """Count a step, applied or left out. Power-function EMAs average over all of them."""
        self.step += 1
        self.power_emas.update(self.model, self.step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File of a checkpoint -> its tensors, as they are now; sharded where the model is."""
        files = {"model": self.model.state_dict(), "ema": self.ema.weights, "optimizer": self.optimizers.state()}
        if self.power_emas.averages:
            files["ema_profiles"] = self.power_emas.weights
        return files

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint after the first step."""
        files = {**self.tensors(), "optimizer": {}}
        stored = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        return stored + self.optimizers.state_bytes

    def load(self, checkpoint: Path, processes: Processes) -> dict[str, Any]:
        """Restore everything from a checkpoint; collective. No process but the first reads what is not sharded.

        Returns state.json; ValueError names a file that is damaged or of another model.
        """
        restore(checkpoint / "model.safetensors", lambda _: self.model.state_dict(), processes)
        restore(checkpoint / "ema.safetensors", lambda _: self.ema.weights, processes, self.ema.frozen)
        optimizer = checkpoint / "optimizer.safetensors"
        restore(optimizer, lambda stored: self.optimizers.allocate(stored, optimizer), processes)
        if self.power_emas.averages:
            averages, frozen = self.power_emas.weights, self.power_emas.frozen
            restore(checkpoint / "ema_profiles.safetensors", lambda _: averages, processes, frozen)
        facts = processes.from_main(lambda: read_json(checkpoint / "state.json", "use an older checkpoint"))
        self.step, self.skipped = facts["step"], int(facts.get("skipped", 0))
        return facts


def refuse_non_finite(files: dict[str, dict[str, Tensor]], step: int, processes: Processes) -> None:
    """FloatingPointError in all processes if a tensor is not finite in any: later starts resume from what is written.

    The message names the first such tensor.
    """
    flat = {f"{file} {key}": value for file, tensors in files.items() for key, value in tensors.items()}
    if name := next(filter(None, processes.gather(first_non_finite(flat))), None):
        raise FloatingPointError(
            f"step {step}: {name} is not finite, so nothing of it is written; older checkpoints are untouched. "
            "Resume with a lower training.optimizer.learning_rate or training.precision=fp32"
        )


def first_non_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor of which this process's shard holds NaN or infinity."""
    shards = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    flags: dict[torch.device, list[Tensor]] = {}
    for shard in shards.values():
        flags.setdefault(shard.device, []).append(shard.isfinite().all())
    if all(bool(torch.stack(of_device).all()) for of_device in flags.values()):  # one synchronisation per device
        return None
    return next(name for name, shard in shards.items() if not shard.isfinite().all())
