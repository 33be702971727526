"""Library calls in processes of their own: the same results, limits, signals, and processes that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unilatent.modalities._atoms import bounded

PROGRAM = """
import os, sys, time
def answer(request):
    if request == "hang": time.sleep(1000)
    if request == "stuck in a library":
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGALRM])
        while True: pass
    if request == "crash": os._exit(3)
    if request == "error": raise OSError("no such thing")
    if request == "talk": print("hello"); os.system("echo hello"); print("x" * 10**6, file=sys.stderr)
    return {"same": request, "pid": os.getpid()}
"""


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    bounded.stop()
    yield
    bounded.stop()


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    return processes


def test_a_process_that_does_not_start_is_no_slow_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time; time.sleep(60)\ndef answer(request): return request")
    monkeypatch.setattr(bounded, "START_SECONDS", 0.3)
    with pytest.raises(RuntimeError, match=r"slow: its process did not start within 0\.3 s"):
        bounded.ask(str(path), 1, 60)


@pytest.mark.parametrize("at_once", [1, 3])
def test_answers_come_in_the_order_of_requests(
    program: str, at_once: int, started: list[subprocess.Popen[bytes]]
) -> None:
    requests = [0.1 + 0.2, {"a": [1, None]}, "ü", "talk", "x" * 200_000, 1e-320]
    answers = bounded.ask_all(program, requests, 60, at_once)
    assert [answer["same"] for answer in answers] == requests
    assert len(started) == at_once
    assert bounded.ask(program, 7, 60)["same"] == 7 and len(started) == at_once, "one process stays"
    assert [process.poll() is None for process in started].count(True) == 1


@pytest.mark.parametrize("bad", ["hang", "stuck in a library"])
def test_a_call_without_end_is_given_up_and_the_others_are_not(program: str, bad: str) -> None:
    start = time.monotonic()
    done: list[int] = []
    answers = bounded.ask_all(program, [1, bad, 2, bad, 3], 1.0, at_once=2, done=done.append)
    assert [answer and answer["same"] for answer in answers] == [1, None, 2, None, 3]
    assert done == [1] * 5
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("request_", "words"), [("crash", "exit code 3"), ("error", "exit code 1 .*no such thing")])
def test_a_process_that_fails_has_not_given_up(program: str, request_: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"program: its process ended with {words}"):
        bounded.ask_all(program, [1, request_], 60)
    assert bounded.ask(program, 5, 60)["same"] == 5


def test_a_process_that_died_while_it_waited_is_replaced(program: str) -> None:
    pid = bounded.ask(program, 1, 60)["pid"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert bounded.ask(program, 2, 60)["same"] == 2


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_exception_of_a_signal_ends_the_call_and_its_processes(
    program: str, at_once: int, started: list[subprocess.Popen[bytes]]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, stop)
    try:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            bounded.ask_all(program, ["hang"] * 4, 300, at_once)
        assert time.monotonic() - start < 30
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(started) == at_once and all(process.poll() is not None for process in started)


def test_an_exception_of_the_progress_ends_the_call_and_its_processes(
    program: str, started: list[subprocess.Popen[bytes]]
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bounded.ask_all(program, [1, "hang"], 300, 2, stop)
    assert len(started) == 2 and started[1].poll() is not None
    bounded.stop()
    assert all(process.poll() is not None for process in started)


def test_a_fork_starts_a_process_of_its_own(program: str) -> None:
    pid = bounded.ask(program, 1, 60)["pid"]
    child = os.fork()
    if child == 0:
        try:
            other = bounded.ask(program, 2, 60)["pid"]
            bounded.stop()
            os._exit(0 if other != pid else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert bounded.ask(program, 3, 60) == {"same": 3, "pid": pid}


@pytest.mark.parametrize("how", ["end", "kill"])
def test_no_process_outlives_the_one_that_asked(program: str, how: str) -> None:
    code = (
        f"import os, sys; sys.path[:0] = {sys.path!r}; from unilatent.modalities._atoms import bounded; "
        f"print(bounded.ask({program!r}, 1, 60)['pid'], flush=True); "
        + ("" if how == "end" else "os.kill(os.getpid(), 9)")
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    pid = int(ran.stdout)
    assert ran.stderr == ""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("still there")


def _fake(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]]) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **k: popen(change(command), **k))


def test_a_process_imports_from_where_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-S: no site-packages, so that the library is only where the parent says."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "only_here.py").write_text("x = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    (tmp_path / "p.py").write_text("import only_here\nanswer = lambda request: only_here.x\n")
    _fake(monkeypatch, lambda command: [command[0], "-S", *command[1:]])
    assert bounded.ask(str(tmp_path / "p.py"), None, 60) == 5


def test_the_time_limit_begins_when_the_process_is_ready(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1.5)\nanswer = lambda request: request\n")
    assert bounded.ask(str(tmp_path / "slow.py"), 4, 1.0) == 4


def test_an_import_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("import rdkit_of_nobody\n")
    with pytest.raises(RuntimeError, match=r"exit code 1 .*No module named 'rdkit_of_nobody'"):
        bounded.ask(str(tmp_path / "p.py"), None, 60)
