"""Alarms: metrics that show, while a run trains, that it no longer learns.

A falling loss proves nothing: joint training can fail in ways that no loss shows. Each alarm is reported once when it
is raised and once when it is over.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path

from ..runs.journal import AlarmChange, read_lines

ZERO_STEPS = 10
"""Steps in a row whose gradients are all zero."""
INFORMATIVE = 0.1
"""Latents are informative when their spread over samples exceeds this share of their size; UNITE's are below it at
initialisation."""
FALL = 0.25
"""Spread and rank may fall to this share of their maximum so far."""
FEW_DIRECTIONS = 2.0
"""A rank below this is too low, where four times as many directions are possible. Latents become informative along one
direction and spread from there, so the alarm can be raised once the rank was twice this, or after GRACE."""
PATIENCE = 3
"""Logged steps in a row that must agree, since a small batch is noisy."""
STUCK_LOGS, STUCK_SPREAD = 20, 1e-6
"""A loss that changes by at most this relative amount over this many logged steps does not depend on its batches."""
GRACE = (1_000, 10_000)
"""Steps that latents may stay collapsed or flat: half the run, but at least the first and at most the second number."""

MEANING = {
    "zero_gradients": "every gradient has been exactly 0 for {steps} steps, so nothing is learned. Usual causes: dead "
    "or saturated layers after too high a learning rate, or a loss that does not reach the weights. Go back to a "
    "checkpoint before step {since} and lower training.optimizer.learning_rate",
    "latents_asleep": "latents are still nearly the same for all samples (latent_std {value:.3g}, {share:.1%} of "
    "their size). This is normal early in a run, but by now they should be informative. The generative loss may keep "
    "them collapsed: lower its weight relative to reconstruction, or raise the learning rate",
    "latents_collapsed": "latent_std is {value:.3g}, down from {most:.3g}: latents differ less and less between "
    "samples, and reconstructions will become the mean sample, however low the losses are. Go back to an earlier "
    "checkpoint with a lower learning rate or more weight on reconstruction",
    "latents_flat": "latent_rank is {value:.3g} (highest so far: {most:.3g}): latents differ along few directions, so "
    "samples lose variety. Put more weight on reconstruction, or use fewer and larger latents",
    "loss_stuck": "{key} has been {value:.6g} for {logs} logged steps, so it does not depend on the batch. Is its "
    "weight 0, or the data a single sample?",
}


class Alarms:
    """The alarms of one run. A resumed run restores their state from metrics.jsonl and alarms.jsonl."""

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
        """Restore the state from what was logged before, without raising an alarm again.

        Most steps are not logged, so whether gradients have been 0 for long is read from alarms.jsonl.
        """
        for line in read_lines(metrics):
            self.after_log(line["step"], line)
        for line in read_lines(metrics.with_name("alarms.jsonl")):
            if line.get("alarm") == "zero_gradients":
                silent = bool(line.get("on"))
                (self.active.add if silent else self.active.discard)("zero_gradients")
                self.last_gradient = line["step"] - ZERO_STEPS if silent else None

    def after_step(self, step: int, grad_norm: float) -> list[AlarmChange]:
        """Check the gradients, after every step."""
        if self.last_gradient is None:
            self.last_gradient = step - 1
        if grad_norm != 0:  # also where it is not a number
            self.last_gradient = step
        silent = step - self.last_gradient
        return self._set(step, "zero_gradients", silent >= ZERO_STEPS, steps=silent, since=self.last_gradient + 1)

    def after_log(self, step: int, numbers: dict[str, float]) -> list[AlarmChange]:
        """Check the spread and rank of the latents and each loss, after every logged step."""
        changes = self._latents(step, numbers) if {"latent_std", "latent_rms", "latent_rank"} <= numbers.keys() else []
        for key, value in numbers.items():
            if key.startswith("loss/"):
                last = self.losses[key]
                last.append(value)
                still = len(last) == STUCK_LOGS and max(last) - min(last) <= STUCK_SPREAD * max(map(abs, last))
                changes += self._set(step, f"loss_stuck:{key}", still, key=key, value=value, logs=STUCK_LOGS)
        return changes

    def _latents(self, step: int, numbers: dict[str, float]) -> list[AlarmChange]:
        std, rms, rank = numbers["latent_std"], numbers["latent_rms"], numbers["latent_rank"]
        informative = std > INFORMATIVE * rms
        changes: list[AlarmChange] = []
        if not self.most_std:  # never informative until now
            collapsed = not informative and step >= self.grace
            changes += self._set(step, "latents_asleep", collapsed, value=std, share=std / max(rms, 1e-30))
        if informative and self._agrees("informative", informative):
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
        """Whether a condition has held for PATIENCE logged steps in a row."""
        self.agreed[name] = self.agreed[name] + 1 if holds else 0
        return self.agreed[name] >= PATIENCE

    def _set(self, step: int, alarm: str, on: bool, **facts: float | str) -> list[AlarmChange]:
        """Raise or end an alarm; the change, if it is one."""
        if on == (alarm in self.active):
            return []
        (self.active.add if on else self.active.remove)(alarm)
        name = alarm.partition(":")[0]
        return [AlarmChange(step, alarm, on, MEANING[name].format(**facts) if on else "over")]
