"""Signals during training: after the first SIGINT or SIGTERM it finishes its step, saves and ends; a second one ends it
at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

NOTHING, SAVE, STOP, FAILED = 0, 1, 2, 3
"""Requests or failures of a process; all processes act on the highest of theirs."""


class Stopped(Exception):
    """Raised in interruptible work after a stop was requested."""


class StopRequest:
    """Handler of SIGINT, SIGTERM and, if it exists, SIGUSR1 inside `with StopRequest() as stop:`."""

    signals = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def between_batches(self, _: int = 0) -> None:
        """Progress callback of interruptible work: raise Stopped if a stop was requested."""
        if self.received is not None:
            raise Stopped

    def take(self) -> int:
        """Return STOP, SAVE or NOTHING; a request to save is returned once."""
        if self.received is not None:
            return STOP
        requested, self.save = self.save, False
        return SAVE if requested else NOTHING

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.save = True
            return
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
