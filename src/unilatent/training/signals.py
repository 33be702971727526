"""Asked to stop, training finishes its step, saves and leaves; asked twice, it leaves at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """`with StopRequest() as stop:` ... `if stop.received:`; SIGINT and SIGTERM are listened to inside the block."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
