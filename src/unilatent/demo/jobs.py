"""One computation at a time, in a thread of its own, whose progress can be followed and which can be stopped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..signals import Stopped

PATIENCE = 0.2
"""Seconds after which a consumer that went away is noticed."""


class StopFlag:
    """Whether somebody asked for a stop."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self, *_: Any) -> None:
        """Raise Stopped after `set`; any arguments, so that it can be called back."""
        if self.is_set:
            raise Stopped


class Jobs:
    """Runs jobs in the order in which they were handed in."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="demo")

    def follow(self, job: Callable[[Callable[[Any], None]], None], stop: StopFlag) -> Iterator[Any]:
        """Run `job(tell)` and yield what it tells, until it ends. Exceptions of the job are raised here.

        Closing the iterator sets `stop`, so that the job of somebody who went away ends too. Of what is told faster
        than it is taken, only the newest is yielded.
        """
        told: queue.Queue[Any] = queue.Queue(maxsize=1)

        def tell(news: Any) -> None:
            while True:
                try:
                    told.put_nowait(news)
                    return
                except queue.Full:
                    try:
                        told.get_nowait()
                    except queue.Empty:
                        continue

        future = self._pool.submit(job, tell)
        try:
            while not future.done():
                try:
                    yield told.get(timeout=PATIENCE)
                except queue.Empty:
                    continue
            while not told.empty():
                yield told.get_nowait()
        finally:
            if not future.done():
                stop.set()
                future.cancel()
        future.result()

    def run(self, job: Callable[[], Any]) -> Any:
        """Run a job and return its result."""
        return self._pool.submit(job).result()

    def close(self) -> None:
        """Start no further job."""
        self._pool.shutdown(wait=False, cancel_futures=True)
