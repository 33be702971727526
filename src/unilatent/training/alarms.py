"""Alarms: numbers that say a run is no longer learning, noticed while it runs.

A falling loss proves nothing, and a joint run can die in ways that no loss shows. Each alarm is raised once, and once
more said to be over when it clears.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

from .journal import read_lines

ZERO_STEPS = 10
"""Steps in a row without any gradient."""
AWAKE = 0.1
"""Latents tell samples apart when their spread over samples is this share of their size (UNITE's start below)."""
FALL = 0.25
"""Spread and rank may fall to this share of the most there was."""
FEW_DIRECTIONS = 2.0
"""A rank below this is no latent space, where four times as many directions could be. Latents wake up along one of them
and spread from there, so it counts once the rank was twice this, or after the grace below."""
PATIENCE = 3
"""Logged steps in a row that must agree: a small batch is noisy."""
STUCK_LOGS, STUCK_SPREAD = 20, 1e-6
"""A loss that moves less than that, relatively, over so many logged steps does not depend on its batches."""
GRACE = (1_000, 10_000)
"""Steps that latents may sleep or be flat: half the run, but no less than the first and no more than the second."""

MEANING = {
    "zero_gradients": "every gradient has been exactly 0 for {steps} steps, nothing is learned any more. Usual causes: "
    "dead or saturated layers after too high a learning rate, or a loss cut off from the weights. Go back to a "
    "checkpoint before step {since} and lower training.optimizer.learning_rate",
    "latents_asleep": "latents are still nearly the same for all samples (latent_std {value:.3g}, {share:.1%} of "
    "their size). Early in a run that is normal, by now they should have woken up. The generative loss may be crushing "
    "them: give it less weight against reconstruction, or raise the learning rate",
    "latents_collapsed": "latent_std is {value:.3g}, down from {most:.3g}: latents tell samples apart less and less, "
    "and reconstructions will turn into one mean sample however low the losses are. Go back to an earlier checkpoint "
    "with a lower learning rate or more weight on reconstruction",
    "latents_flat": "latent_rank is {value:.3g} (the most so far: {most:.3g}): latents differ along few directions. "
    "Samples lose variety. More weight on reconstruction, or fewer and larger latents, help",
    "loss_stuck": "{key} has been {value:.6g} for {logs} logged steps, so it does not depend on the batch. Is its "
    "weight 0, or the data a single sample?",
}


@dataclass(frozen=True)
class Change:
    """An alarm raised (on) or over, and what it means."""

    step: int
    alarm: str
    on: bool
    message: str

    def line(self) -> str:
        return json.dumps({"step": self.step, "alarm": self.alarm, "on": self.on, "message": self.message})


class Alarms:
    """Of one run. What it has seen is a function of the lines of metrics.jsonl and alarms.jsonl, so a resumed run knows
    it too."""

    def __init__(self, steps: int, directions: int):
        """steps: of the whole run. directions: the highest rank that latents of one batch could have."""
        self.directions = directions
        self.grace = max(GRACE[0], min(GRACE[1], steps // 2))
        self.active: set[str] = set()
        self.last_gradient: int | None = None
        self.most_std = self.most_rank = 0.0
        self.agreed: dict[str, int] = defaultdict(int)
        self.losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STUCK_LOGS))

    def replay(self, metrics: Path) -> None:
        """What was logged before, without raising anything again.

        Most steps are not logged, so only the alarms beside the numbers tell whether gradients had been 0 for long.
        """
        for line in read_lines(metrics):
            self.after_log(line["step"], line)
        for line in read_lines(metrics.with_name("alarms.jsonl")):
            if line.get("alarm") == "zero_gradients":
                silent = bool(line.get("on"))
                (self.active.add if silent else self.active.discard)("zero_gradients")
                self.last_gradient = line["step"] - ZERO_STEPS if silent else None

    def after_step(self, step: int, grad_norm: float) -> list[Change]:
        """Every step: gradients that are exactly zero."""
        if self.last_gradient is None:
            self.last_gradient = step - 1
        if grad_norm != 0:  # also where it is not a number
            self.last_gradient = step
        silent = step - self.last_gradient
        return self._set(step, "zero_gradients", silent >= ZERO_STEPS, steps=silent, since=self.last_gradient + 1)

    def after_log(self, step: int, numbers: dict[str, float]) -> list[Change]:
        """Every logged step: the latents' spread and rank, and losses that no longer move."""
        changes = self._latents(step, numbers) if {"latent_std", "latent_rms", "latent_rank"} <= numbers.keys() else []
        for key, value in numbers.items():
            if key.startswith("loss/"):
                last = self.losses[key]
                last.append(value)
                still = len(last) == STUCK_LOGS and max(last) - min(last) <= STUCK_SPREAD * max(map(abs, last))
                changes += self._set(step, f"loss_stuck:{key}", still, key=key, value=value, logs=STUCK_LOGS)
        return changes

    def _latents(self, step: int, numbers: dict[str, float]) -> list[Change]:
        std, rms, rank = numbers["latent_std"], numbers["latent_rms"], numbers["latent_rank"]
        awake = std > AWAKE * rms
        changes: list[Change] = []
        if not self.most_std:  # never awake until now
            asleep = not awake and step >= self.grace
            changes += self._set(step, "latents_asleep", asleep, value=std, share=std / max(rms, 1e-30))
        if awake and self._agrees("awake", awake):
            self.most_std, self.most_rank = max(self.most_std, std), max(self.most_rank, rank)
        if self.most_std:
            fell = self._agrees("fell", std < FALL * self.most_std)
            changes += self._set(step, "latents_collapsed", fell, value=std, most=self.most_std)
            late = step >= self.grace or self.most_rank >= 2 * FEW_DIRECTIONS
            few = late and self.directions >= 4 * FEW_DIRECTIONS and rank < FEW_DIRECTIONS
            flat = self._agrees("flat", few or rank < FALL * self.most_rank)
            changes += self._set(step, "latents_flat", flat, value=rank, most=self.most_rank)
        return changes

    def _agrees(self, name: str, holds: bool) -> bool:
        """Whether it has held for PATIENCE logged steps in a row."""
        self.agreed[name] = self.agreed[name] + 1 if holds else 0
        return self.agreed[name] >= PATIENCE

    def _set(self, step: int, alarm: str, on: bool, **facts: float | str) -> list[Change]:
        if on == (alarm in self.active):
            return []
        (self.active.add if on else self.active.remove)(alarm)
        name = alarm.partition(":")[0]
        return [Change(step, alarm, on, MEANING[name].format(**facts) if on else "over")]
