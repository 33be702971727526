"""Library calls that may take very long, in processes of their own which can be stopped at any time, unlike the same
calls in this process. Also their program: `python bounded.py FILE` answers requests from stdin on stdout, a line each.

FILE is Python with a function `answer(request)` from plain data to plain data. Neither it nor this file imports
anything of the package, so that a process starts quickly. It stays for further requests.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

START_SECONDS = 120
"""Time limit for the imports of a process."""

_idle: dict[tuple[int, str], list[_Child]] = {}
"""Processes that wait for a request, by the process that started them (a fork inherits this table) and their file."""


def ask(file: str, request: Any, seconds: float) -> Any | None:
    """Return the answer of a file to a request, None if it was given up after so many seconds."""
    return ask_all(file, [request], seconds)[0]


def ask_all(
    file: str, requests: Sequence[Any], seconds: float, at_once: int = 1,
    done: Callable[[int], object] = lambda more: None,
) -> list[Any | None]:  # fmt: skip
    """As `ask`, for several requests, in at most `at_once` processes.

    done: called with how many more requests are answered or given up. The time limit of a request begins when its
    process is ready. An exception here, such as KeyboardInterrupt or one of `done`, ends the processes. RuntimeError if
    one fails.
    """
    answers: list[Any | None] = [None] * len(requests)
    idle, todo = _idle.setdefault((os.getpid(), file), []), list(enumerate(requests))[::-1]
    busy: dict[_Child, int] = {}
    news: queue.SimpleQueue[tuple[_Child, bytes]] = queue.SimpleQueue()
    try:
        while todo or busy:
            while todo and len(busy) < at_once:
                place, request = todo.pop()
                child = _living(idle) or _Child(file)
                busy[child] = place
                child.send(request, seconds, news)
            try:
                child, line = news.get(timeout=max(0.0, min(child.deadline for child in busy) - time.monotonic()))
            except queue.Empty:
                for late in [child for child in busy if child.deadline <= time.monotonic()]:
                    late.check_started()
                    late.stop()
                    del busy[late]
                    done(1)
                continue
            if child not in busy:
                continue
            if not child.ready and line:
                child.ready, child.deadline = True, time.monotonic() + seconds
                continue
            place = busy.pop(child)
            if line:
                answers[place] = json.loads(line)
                idle.append(child)
            else:
                child.check_given_up()
            done(1)
    finally:
        for child in [*busy, *idle[1:]]:
            child.stop()
        del idle[1:]
    return answers


def stop() -> None:
    """End the processes that wait for a request."""
    for child in [child for (owner, _), idle in _idle.items() if owner == os.getpid() for child in idle]:
        child.stop()
    for key in [key for key in _idle if key[0] == os.getpid()]:
        del _idle[key]


atexit.register(stop)


class _Child:
    """A process that answers requests."""

    def __init__(self, file: str):
        self.file, self.ready, self.deadline = file, False, time.monotonic() + START_SECONDS
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        # -I: nothing is imported from the user's folder first; a session of its own: Ctrl-C in a terminal ends only
        # this process
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve()), file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True,
        )  # fmt: skip
        self.inbox: queue.SimpleQueue[tuple[_Child, bytes]] = queue.SimpleQueue()
        self.changing = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()
        self._write({"path": sys.path})

    def send(self, request: Any, seconds: float, inbox: queue.SimpleQueue[tuple[_Child, bytes]]) -> None:
        """Send a request; the answer comes as (self, line), or (self, b"") if the process ends before."""
        with self.changing:
            while inbox is not self.inbox and not self.inbox.empty():
                inbox.put(self.inbox.get())
            self.inbox = inbox
        if self.ready:
            self.deadline = time.monotonic() + seconds
        self._write({"seconds": seconds, "request": request})

    def stop(self) -> None:
        self.process.kill()
        self._close()

    def check_started(self) -> None:
        """RuntimeError if the imports took too long: then it is not the request that did."""
        if not self.ready:
            raise RuntimeError(f"{Path(self.file).stem}: its process did not start within {START_SECONDS} s")

    def check_given_up(self) -> None:
        """RuntimeError unless the process, which has ended, was out of time for a request."""
        code = self.process.wait()
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            self.check_started()
        self.errors.seek(0)
        last = " ".join(self.errors.read().decode("utf-8", "replace").split())[-300:]
        self._close()
        if not hasattr(signal, "SIGALRM") or code != -signal.SIGALRM:
            raise RuntimeError(f"{Path(self.file).stem}: its process ended with exit code {code} ({last})")

    def _close(self) -> None:
        self.process.wait()
        self.errors.close()
        assert self.process.stdin is not None
        with suppress(OSError):  # what the process has not read is lost
            self.process.stdin.close()

    def _write(self, content: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; `check_given_up` says why
            self.process.stdin.write(f"{json.dumps(content)}\n".encode())
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self._hand_over(line)
        self._hand_over(b"")

    def _hand_over(self, line: bytes) -> None:
        with self.changing:
            self.inbox.put((self, line))


def _living(idle: list[_Child]) -> _Child | None:
    """Take a process out of the list that has not ended."""
    while idle:
        child = idle.pop()
        if child.process.poll() is None:
            return child
        child.stop()
    return None


# ---- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    _alarm(START_SECONDS)
    first = json.loads(sys.stdin.readline())
    sys.path += [folder for folder in first["path"] if folder and folder not in sys.path]
    answer = _function(sys.argv[1])
    print("ready", file=answers, flush=True)
    _alarm(0)
    while line := sys.stdin.readline():
        content = json.loads(line)
        _alarm(int(2 * content["seconds"]) + 1)  # ends this process even if nobody is left to stop it
        found = answer(content["request"])
        _alarm(0)
        print(json.dumps(found), file=answers, flush=True)


def _function(file: str) -> Callable[[Any], Any]:
    spec = spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    prepare: Callable[[], None] | None = getattr(module, "prepare", None)
    if prepare is not None:
        prepare()
    answer: Callable[[Any], Any] = module.answer
    return answer


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
