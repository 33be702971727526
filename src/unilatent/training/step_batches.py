"""The micro-batches of one step, read one after the other: a step never holds them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from ..types import Batch
from .step import MicroBatch


class StepBatches:
    """The next `count` micro-batches of a run, each read when it is asked for; to be iterated once."""

    def __init__(self, micro_batches: Iterator[MicroBatch], count: int):
        self.micro_batches, self.count = micro_batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(self.micro_batches, self.count)


def paired(positions: Iterable[range], batches: Iterator[Batch]) -> Iterator[MicroBatch]:
    """Yield each micro-batch with the positions of its samples. Unlike `zip`, it does not hold the last one."""
    for own in positions:
        yield own, next(batches)
