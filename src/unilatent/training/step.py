"""One optimiser step, to be read beside a paper's training algorithm.

for each micro-batch of the step:
    augment                              random views, a function of (seed, sample position)
    for each part of the method's loss:
        forward under autocast, backward outside it; its activations are freed before the next part exists
sum gradients over processes (during the last backward passes); check that loss and gradient norm are finite
clip; set the learning rate; step the optimizers; update the EMA
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..config import ConfigError
from ..faults import reach
from ..maths.streams import Streams, seed_of
from ..methods.base import LossPart
from ..processes import Processes
from ..types import Batch, is_encoded
from .config import RunConfig
from .gradients import GradientSums
from .measuring import Measurement
from .optimizer import clip_gradients, gradient_norm
from .parts import loss_parts, weights_cast_once
from .schedule import factor, weight
from .state import TrainingState

MicroBatch = tuple[range, Batch]
"""Global positions of the samples of one process, and the samples."""


class MicroBatches(Protocol):
    """The micro-batches of a step, which may be read only when they are asked for; how many is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True)
class StepResult:
    """logs: scalars, still on the device. grad_norm: before clipping. counts: sums over processes.

    finite: whether loss and gradient norm are; if not, no weight changed.
    """

    logs: dict[str, Tensor]
    grad_norm: float
    counts: dict[str, int]
    finite: bool


class OptimiserStep:
    """Takes optimiser steps of a run.

    steps_per_epoch: what the schedule's epochs are converted with. measure_gradients: log the gradient norm of each
    part of the loss.
    """

    def __init__(
        self, state: TrainingState, config: RunConfig, processes: Processes, steps_per_epoch: float,
        measure_gradients: bool,
    ):  # fmt: skip
        self.state, self.config, self.processes = state, config, processes
        self.training, self.steps_per_epoch = config.training, steps_per_epoch
        self.measure_gradients = measure_gradients
        self.gradients = GradientSums(state.model, processes)
        self.poison = 1.0  # of an armed fault

    def __call__(
        self, micro_batches: MicroBatches, measure: bool = False,
        count: Callable[[], Mapping[str, int]] = dict,
    ) -> StepResult:  # fmt: skip
        """Step once; a step whose loss or gradient norm is not finite changes no weight.

        measure: add latent statistics (and gradient norms) to the logs. count: called after the backward passes for
        numbers of this process, which are summed over all in the same collective as the losses.

        The host waits for the device once, when it reads loss, norm and counts together.
        """
        state, model = self.state, self.state.model
        torch.manual_seed(seed_of("net", self.config.seed, state.step, self.processes.rank))  # dropout
        measurement = Measurement(model, self.measure_gradients) if measure else None
        logs = self.accumulate(micro_batches, measurement)
        sums = self.gradients
        sums.finish()
        own = {**count(), "late_gradients": len(sums.late)}
        counts = {name: torch.full((), float(number), device=model.device) for name, number in own.items()}
        logs = self.processes.sum(logs | counts)
        counts = {name: logs.pop(name) for name in counts}
        if measurement is not None:
            logs |= measurement.numbers(self.processes)
        logs["grad_norm"] = gradient_norm(model)
        # Sums over processes, so all decide alike.
        read = [logs["loss/total"], logs["grad_norm"], *counts.values(), *sums.absent.values()]
        loss, norm, *numbers = torch.stack([number.float() for number in read]).tolist()
        numbers, present = numbers[: len(counts)], numbers[len(counts) :]
        whole = dict(zip(counts, map(int, numbers), strict=True))
        if sums.complete(whole.pop("late_gradients"), present):
            logs["grad_norm"] = gradient_norm(model)
            norm = float(logs["grad_norm"])
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            clip_gradients(model, self.training.gradient_clip, logs["grad_norm"])
            reach("step.before_optimizer", state.step)
            state.optimizers.set_factor(factor(self.training.schedule, state.step + 1, self.steps_per_epoch))
            state.optimizers.step()
        state.optimizers.zero_grad()
        if finite:
            state.ema.update(model)
        return StepResult(logs, norm, whole, finite)

    def accumulate(self, micro_batches: MicroBatches, measurement: Measurement | None = None) -> dict[str, Tensor]:
        """Sum the gradients of all micro-batches in the parameters; return the losses, weighted by their shares."""
        model, logs, titles = self.state.model, dict[str, Tensor](), set[str]()
        self.poison = _poison(reach("step.gradients", self.state.step))
        self.gradients.start()
        for number, (positions, batch) in enumerate(micro_batches, 1):
            if number == len(micro_batches):
                self.gradients.last_micro_batch()
            streams = Streams(("train", self.config.seed), positions, model.device)
            batch = batch.to(model.device, staying=model.conditions.on_cpu)
            if not is_encoded(batch.data):  # stored latents are of augmented samples
                batch = replace(batch, data=model.modality.augment(batch.data, streams))
            share = len(positions) / self.training.batch_size
            with weights_cast_once(model, self.training.precision):
                for part in self.backward(batch, streams, share, measurement):
                    titles.add(part.title)
                    for key, value in part.logs().items():
                        logs[key] = logs.get(key, 0) + share * value
        if unknown := set(self.training.schedule.onsets) - titles:
            raise ConfigError(
                f"training.schedule.onsets.{min(unknown)}: no part of this method's loss; it has "
                f"{', '.join(sorted(titles))}"
            )
        return logs

    def backward(
        self, batch: Batch, streams: Streams, share: float, measurement: Measurement | None = None
    ) -> Iterator[LossPart]:
        """Compute and differentiate each part of the loss, before the next part exists."""
        for part in loss_parts(self.state.model, batch, streams, self.training.precision):
            part_weight = weight(self.training.schedule, part.title, self.state.step, self.steps_per_epoch)
            part = part if part_weight == 1 else replace(part, value=part_weight * part.value)
            self.gradients.next_backward()
            with measurement.of(part) if measurement is not None else nullcontext():
                (share * self.poison * part.value).backward()
            if part.closes:
                self.gradients.next_backward()
                part.close()
            yield part


def _poison(how: str) -> float:
    """What an armed fault multiplies all gradients of this process with: NaN or 0; 1 without one."""
    return {"nan": math.nan, "zero": 0.0}.get(how, 1.0)
