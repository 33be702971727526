"""Samples that could not be used: named, counted once each over all processes, and too many of them stop the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..types import Batch
from .batches import Bad
from .journal import Lines
from .processes import Processes

SAID = 10
"""How many are named in log.txt; the rest only in the files."""
EXAMPLES = 3
FEWEST = 10_000
"""What a stream whose length nobody knows counts as at least."""


class BadSamples:
    """The distinct bad samples of a run's training set, the same in every process.

    More than `share` of the set is too many; one is always allowed, unless the share is 0. A stream of unknown length
    (`samples` infinite) counts as what was read of it, or 10,000.
    """

    def __init__(self, share: float, samples: float, folder: Path, processes: Processes):
        self.share, self.samples, self.folder, self.processes = share, samples, folder, processes
        self.indices: set[int] = set()
        self.examples: list[str] = []
        self.met: list[Bad] = []
        """By this process, in the step at hand."""

    def passing(self, batches: Iterable[tuple[Batch, list[Bad]]]) -> Iterator[Batch]:
        """The batches alone; what they miss is kept until the step is settled."""
        for batch, bad in batches:
            self.met += bad
            yield batch

    def settle(self, step: int, say: Callable[[str], object], warn: Callable[[str, str], None]) -> None:
        """Once a step in which any process met some: everybody learns of all, each writes down what it met first.

        warn: what it is that cannot be written (a full disk), and why.
        """
        lines = Lines(self.folder / f"bad_samples.rank{self.processes.rank}.jsonl", warn)
        met, self.met = self.met, []
        for rank, items in enumerate(self.processes.gather([asdict(bad) for bad in met])):
            for bad in items:
                if bad["index"] in self.indices:
                    continue
                self.indices.add(bad["index"])
                self.examples = [*self.examples, bad["message"]][:EXAMPLES]
                if len(self.indices) <= SAID:
                    say(f"step {step}: replaced a bad sample: {bad['message']}")
                elif len(self.indices) == SAID + 1:
                    say(f"step {step}: more bad samples are named in {self.files}")
                if rank == self.processes.rank:
                    lines.write(json.dumps({"step": step, **bad}, ensure_ascii=False))

    def refusal(self, seen: int) -> str | None:
        """Why the run must not go on, after so many samples."""
        allowed = self.allowed(seen)
        if len(self.indices) <= allowed:
            return None
        shown = "; ".join(self.examples)
        return (
            f"training.bad_samples: {self.share:g} allows {allowed:,} bad samples, but {len(self.indices):,} cannot be "
            f"used, named in {self.files}: {shown}. Repair or remove them (`unilatent data verify` finds all), or "
            "raise training.bad_samples, then --resume auto"
        )

    def allowed(self, seen: int) -> int:
        samples = self.samples if math.isfinite(self.samples) else max(seen, FEWEST)
        return max(1, math.floor(self.share * samples)) if self.share else 0

    @property
    def files(self) -> str:
        return str(self.folder / "bad_samples.rank*.jsonl")

    def summary(self) -> str:
        return f"{len(self.indices):,} bad samples were replaced; they are named in {self.files}"

    def state(self) -> dict[str, Any]:
        return {"indices": sorted(self.indices), "examples": self.examples}

    def load(self, state: dict[str, Any] | None) -> None:
        """None: a checkpoint from before they were counted."""
        if state is not None:
            self.indices, self.examples = set(state["indices"]), list(state["examples"])
