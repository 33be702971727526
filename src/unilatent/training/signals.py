"""Asked to stop, training finishes its step, saves and leaves; asked twice, it leaves at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

NOTHING, SAVE, STOP, FAILED = 0, 1, 2, 3
"""What may be asked for, or have happened: of several processes' answers the highest counts."""


class StopAsked(Exception):
    """Work that can be given up was, since a stop has been asked for."""


class StopRequest:
    """`with StopRequest() as stop:` listens to SIGINT, SIGTERM and, where there is one, SIGUSR1 inside the block."""

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
        """Progress of work that can be given up: StopAsked if it should be."""
        if self.received is not None:
            raise StopAsked

    def take(self) -> int:
        """What has been asked for; asking to save counts once."""
        if self.received is not None:
            return STOP
        wanted, self.save = self.save, False
        return SAVE if wanted else NOTHING

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.save = True
            return
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
