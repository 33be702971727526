"""Standard output and error output that never end the work: a reader that went away, a closed terminal, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Error numbers of a reader or terminal that will not come back."""


class LastingStream:
    """A text stream whose `write` and `flush` never fail.

    If its reader is gone, everything that this process and its libraries write there afterwards is discarded.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: OSError | None = None
        """The last error that was not a reader that went away."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, as far as that is possible."""
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts, as far as that is possible."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, as far as that is possible."""
        self._attempt(self.stream.flush)

    def close_quietly(self) -> None:
        """Flush for the last time; what could not be written is discarded, so that the interpreter's end does not
        fail."""
        self.flush()
        if self.error is not None:
            self._discard()

    def _attempt(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in GONE:
                self._discard()
            else:
                self.error = error
        except ValueError:  # the stream is closed
            pass

    def _discard(self) -> None:
        """Let the stream's file descriptor lead to nowhere."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` lasting streams inside the block."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {
        name: LastingStream(stream)
        for name, stream in before.items()
        if stream is not None and not isinstance(getattr(stream, "rich_proxied_file", stream), LastingStream)
    }
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in ours.items():
            stream.close_quietly()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def open_closed_descriptors() -> None:
    """Let closed standard descriptors and streams lead to nowhere.

    Otherwise the next file that is opened takes their number, and gets what libraries and child processes print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def can_redraw(console: Any) -> bool:
    """Whether a rich console is a terminal that can move its cursor; TERM=dumb says that it cannot."""
    return bool(console.is_terminal and not console.is_dumb_terminal)


def output_error() -> OSError | None:
    """Return why standard output could not be written, other than that its reader is gone; None if it could."""
    stream = sys.stdout
    if not isinstance(stream, LastingStream):
        return None
    stream.flush()
    return stream.error
