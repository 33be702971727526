"""Waiting for other processes for as long as they work, beside the collectives.

A collective ends the job when one process comes later than the group's timeout, whether it works or is dead. Here a
process that works says so through the group's store, which needs no connection of its own: a thread adds to a counter.
Those that have arrived wait until all have, and give up only when the counter has stood still for the timeout.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

BEATS_PER_TIMEOUT, SLOWEST = 6, 10.0
"""Signs of life of a working process: so many in the timeout, and at least one in so many seconds."""
SHORTEST_NAP, LONGEST_NAP = 0.001, 0.5
"""Seconds between two looks at the store: they grow with the time that a process has waited, so that short waits end
at once and hundreds of processes do not wear out the store in long ones."""

Counter = Callable[[int], int]
"""Adds a number to a count, and returns the sum."""

_number = itertools.count()  # of the heartbeats of this process: all processes create as many, in the same order


class Heartbeat:
    """What a process says to the others, and waits for, through the store of their group."""

    def __init__(self, store: dist.Store, world: int, timeout: float):
        """timeout: seconds without any sign of life after which the processes that are missing count as dead."""
        self.store, self.world, self.timeout = dist.PrefixStore(f"heartbeat/{next(_number)}", store), world, timeout
        self.meetings, self.counters = itertools.count(), itertools.count()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Give signs of life inside this block, also while it computes or writes."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def counter(self) -> Counter:
        """Return a counter that all processes share; all of them call this in the same order."""
        key = f"counter/{next(self.counters)}"
        return lambda number: int(self.store.add(key, number))

    def meet(self) -> None:
        """Wait until every process has called this as often; RuntimeError if those that are missing seem dead."""
        meeting = next(self.meetings)
        arrived, all_here = f"{meeting}/arrived", f"{meeting}/all"
        if self.store.add(arrived, 1) == self.world:
            if meeting:  # which all have left
                self.store.delete_key(f"{meeting - 1}/arrived")
                self.store.delete_key(f"{meeting - 1}/all")
            self.store.set(all_here, "")
        begun = heard = looked = time.monotonic()
        beats = -1
        while not self.store.check([all_here]):
            now = time.monotonic()
            if now - looked >= self._pause or beats < 0:
                looked, latest = now, self.store.add("beats", 0)
                if latest != beats:
                    beats, heard = latest, now
            if now - heard > self.timeout:
                missing = self.world - self.store.add(arrived, 0)
                raise RuntimeError(
                    f"{missing} of {self.world} processes did not come, and none of them gave a sign of life for "
                    f"{self.timeout:g} seconds: they died or hang"
                )
            time.sleep(min(LONGEST_NAP, self._pause, max(SHORTEST_NAP, (now - begun) / 10)))

    @property
    def _pause(self) -> float:
        """Seconds between two signs of life."""
        return min(SLOWEST, self.timeout / BEATS_PER_TIMEOUT)

    def _beat(self, ended: threading.Event) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it those that would hear
            while not ended.wait(self._pause):
                self.store.add("beats", 1)


def local_counter() -> Counter:
    """Return a counter of this process alone."""
    total = 0

    def add(number: int) -> int:
        nonlocal total
        total += number
        return total

    return add
