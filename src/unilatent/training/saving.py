"""Checkpoints written while training goes on: state is copied at once, files are made by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .sharding import whole


class Snapshot:
    """Copies of tensors in this process's memory; the memory is used again for the next ones."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole copies on the CPU, until the next call; all processes call, those that do not `keep` get none."""
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            source = whole(tensor.detach())
            if keep:
                kept[name] = self._room(name, source).copy_(source)
        self._kept = kept
        return dict(kept)

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._kept.get(name)
        if room is not None and room.shape == tensor.shape and room.dtype == tensor.dtype:
            return room
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class Saving:
    """At most one piece of work at a time, in a thread of its own; its error is kept for whoever waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised by `wait`."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Begin once the work before is done; raises its error instead, if it failed."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="saving", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way; raises the error of what was, once."""
        if (error := self.settle()) is not None:
            raise error

    def settle(self) -> Exception | None:
        """Until nothing is under way; the error of what was, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
