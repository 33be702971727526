"""Schedules: the learning rate as a factor of its peak, and the weights of parts of the loss."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def factor(schedule: ScheduleConfig, step: float, steps_per_epoch: float) -> float:
    """Return the learning-rate factor at step `step`; the first step is 1, so that no step has factor 0."""
    at = _at(schedule, step, steps_per_epoch)
    if at < schedule.warmup:
        return at / schedule.warmup
    level = 1.0
    for decay in schedule.decays:
        if at < decay.start:
            break
        progress = 1.0 if at >= decay.end else (at - decay.start) / (decay.end - decay.start)
        level += (decay.factor - level) * (1 - math.cos(math.pi * progress)) / 2
    return level


def weight(schedule: ScheduleConfig, part: str, step: float, steps_per_epoch: float) -> float:
    """Return the weight of a part of the loss, after `step` optimiser steps."""
    onset, at = schedule.onsets.get(part), _at(schedule, step, steps_per_epoch)
    if onset is None or at >= onset.end:
        return 1.0
    return 0.0 if at <= onset.start else (at - onset.start) / (onset.end - onset.start)


def _at(schedule: ScheduleConfig, step: float, steps_per_epoch: float) -> float:
    """A step in the schedule's unit."""
    return step / steps_per_epoch if schedule.unit == "epochs" else step


LOW = 0.05
"""Up to this share of its peak, a learning rate is so low that a run learns little more."""


def unreachable(schedule: ScheduleConfig, steps: int, steps_per_epoch: float) -> list[str]:
    """Return a line for each stage of the schedule that the run does not reach, and one if the rate is LOW long before
    the run ends (it was made longer, say)."""
    end = _at(schedule, steps, steps_per_epoch)
    stages = [("warm-up", schedule.warmup), *[(f"decay to {d.factor:g}", d.start) for d in schedule.decays]]
    stages += [(f"onset of {part}", onset.start) for part, onset in schedule.onsets.items()]
    lines = [
        f"training.schedule: the {name} is not reached: it {'ends' if name == 'warm-up' else 'starts'} at "
        f"{mark:g} {schedule.unit}, the run ends at {end:g}"
        for name, mark in stages
        if mark >= end and mark > 0
    ]
    last = schedule.decays[-1] if schedule.decays else None
    if last is not None and last.factor <= LOW and last.end < 0.98 * end:
        lines.append(
            f"training.schedule: the learning rate stays at {last.factor:g} of its peak from {last.end:g} "
            f"{schedule.unit} on, and the run ends at {end:g}; move training.schedule.decays with its length"
        )
    return lines
