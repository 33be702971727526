"""Signals during training: after the first SIGINT, SIGTERM or SIGHUP it finishes its step, saves and ends; a second
SIGINT or SIGTERM ends it at once.

A terminal that is closed sends SIGHUP, often more than once and together with SIGTERM; so SIGHUP never ends anything at
once, and where it is ignored (nohup) it stays ignored.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

NOTHING, SAVE, STOP, FAILED = 0, 1, 2, 3
"""Requests or failures of a process; all processes act on the highest of theirs."""
HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Stopped(Exception):
    """Raised in interruptible work after a stop was requested."""


class StopRequest:
    """Handler of SIGINT, SIGTERM and, where they exist, SIGHUP and SIGUSR1 inside `with StopRequest() as stop:`."""

    signals = tuple(getattr(signal, name) for name in HANDLED if hasattr(signal, name))

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals if not _is_ignored(number)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """Exit code of a process that was stopped before its work was done: 128 + the number of the signal.

        0 below torchrun, which takes any other code of a process for a failure: it would kill the other processes, and
        start all of them again with --max-restarts.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return 0
        return 128 + (self.received or signal.SIGTERM)  # another process may have got the signal

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
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.save = True
        elif name == "SIGHUP":
            self.received = self.received or signal.Signals(number)
        else:
            if self.received in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.received = signal.Signals(number)


def _is_ignored(number: signal.Signals) -> bool:
    """Whether this is a SIGHUP that the process was started to ignore."""
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
