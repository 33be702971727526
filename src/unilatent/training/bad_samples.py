"""Samples that could not be used: each is reported and counted once over all processes; too many stop the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..batches import SkippedSample
from ..plain_text import count_of
from ..processes import Processes
from ..runs.journal import Lines
from ..types import Batch

LOGGED = 10
"""How many are named in log.txt; the others only in bad_samples.rank*.jsonl."""
EXAMPLES = 3
"""How many are named in an error message."""
FEWEST = 10_000
"""Smallest length that is assumed for a stream of unknown length."""


class BadSamples:
    """The distinct bad samples of a run's training set, the same in every process.

    More than `share` of the set is too many; one is always allowed, unless the share is 0. The length of a stream of
    unknown length (`samples` infinite) is taken to be what was read of it, at least 10,000.
    """

    def __init__(self, share: float, samples: float, folder: Path, processes: Processes):
        self.share, self.samples, self.folder, self.processes = share, samples, folder, processes
        self.indices: set[int] = set()
        self.examples: list[str] = []
        self.met: list[SkippedSample] = []
        """Met by this process in the current step."""

    def passing(self, batches: Iterable[tuple[Batch, list[SkippedSample]]]) -> Iterator[Batch]:
        """Yield the batches alone; bad samples are stored until `settle`."""
        for batch, bad in batches:
            self.met += bad
            yield batch
            del batch  # not held while the next one is read

    def settle(self, step: int, say: Callable[[str], object], warn: Callable[[str, str], None]) -> None:
        """Share the bad samples of a step with all processes; each process writes those that it met first.

        Called by all processes, after a step in which any of them met some.
        warn: called with the file that cannot be written (a full disk) and the reason.
        """
        lines = Lines(self.folder / f"bad_samples.rank{self.processes.rank}.jsonl", warn)
        met, self.met = self.met, []
        for rank, items in enumerate(self.processes.gather([asdict(bad) for bad in met])):
            for bad in items:
                if bad["index"] in self.indices:
                    continue
                self.indices.add(bad["index"])
                self.examples = [*self.examples, bad["message"]][:EXAMPLES]
                if len(self.indices) <= LOGGED:
                    say(f"step {step}: replaced a bad sample: {bad['message']}")
                elif len(self.indices) == LOGGED + 1:
                    say(f"step {step}: more bad samples are listed in {self.files}")
                if rank == self.processes.rank:
                    lines.write(json.dumps({"step": step, **bad}, ensure_ascii=False))

    def refusal(self, seen: int) -> str | None:
        """Return why the run must stop after `seen` samples, None if it need not."""
        allowed = self.allowed(seen)
        if len(self.indices) <= allowed:
            return None
        examples = "; ".join(self.examples)
        return (
            f"training.bad_samples: {self.share:g} allows {count_of(allowed, 'bad sample')}, but "
            f"{len(self.indices):,} cannot be used, listed in {self.files}: {examples}. Repair or remove "
            "them (`unilatent data verify` finds all), or raise training.bad_samples, then --resume auto (with "
            "--allow-data-change if you removed some; a class must keep a sample)"
        )

    def allowed(self, seen: int) -> int:
        """Return how many bad samples are tolerated after `seen` samples."""
        samples = self.samples if math.isfinite(self.samples) else max(seen, FEWEST)
        return max(1, math.floor(self.share * samples)) if self.share else 0

    @property
    def files(self) -> str:
        return str(self.folder / "bad_samples.rank*.jsonl")

    def summary(self) -> str:
        replaced = count_of(len(self.indices), "bad sample was", "bad samples were")
        return f"{replaced} replaced; they are listed in {self.files}"

    def state(self) -> dict[str, Any]:
        return {"indices": sorted(self.indices), "examples": self.examples}

    def load(self, state: dict[str, Any] | None) -> None:
        """Restore what `state` returned; None, from a checkpoint without it, changes nothing."""
        if state is not None:
            self.indices, self.examples = set(state["indices"]), list(state["examples"])
