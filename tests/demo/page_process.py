"""`unilatent demo` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import unilatent

SERVED = re.compile(r"""(?: is at |"address": ")(http://[^\s"]+/)""")
PATIENCE = 300
"""Seconds that a page may take to be served, on a machine that does other things too."""
WATCHED = """
import sys
NAMES = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "", None}
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        where = arguments[1] if event != "socket.getaddrinfo" else arguments[:1]
        name = where[0] if isinstance(where, tuple) else None
        if (name.decode() if isinstance(name, bytes) else name) not in NAMES:
            print("FOREIGN", event, where, file=sys.stderr, flush=True)
sys.addaudithook(audit)
from unilatent.cli import main
main(sys.argv[1:])
"""
"""`unilatent` in a process that reports every connection to another machine."""


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[str, Callable[[], str]]]:
    """Run `unilatent demo` with these arguments; yields the address and what it has printed so far."""
    if find_spec("gradio") is None:
        pytest.skip("Gradio is not installed: pip install 'unilatent[demo]'")
    source = str(Path(unilatent.__file__).parents[1])
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GRADIO_SHARE": "True",
                   "GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}  # fmt: skip
    command = [sys.executable, "-c", WATCHED, "demo", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    printed = b""

    def output() -> str:
        nonlocal printed
        printed += process.stdout.read() or b""
        return printed.decode(errors="replace")

    try:
        start = time.monotonic()
        while not (found := SERVED.search(output())):
            assert process.poll() is None and time.monotonic() - start < PATIENCE, output()
            time.sleep(0.2)
        yield found[1], output
        assert "FOREIGN" not in output(), output()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, output()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
