"""The terminal is not the run: output that cannot be written, a reader that goes away, signals of a closed terminal."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Command
from rich.console import Console
from rich.progress import Progress
from test_outputs import PRODUCTS, VERBS, line_of, names, whole

from unilatent.batches import _init_worker
from unilatent.presets import preset
from unilatent.runs import checkpoint as ckpt
from unilatent.signals import SAVE, STOP, StopRequest
from unilatent.terminal import LastingStream, lasting_output
from unilatent.training.trainer import Trainer


class Broken(io.StringIO):
    """A stream on which the system refuses to write."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.attempts = number, 0

    def write(self, text: str) -> int:
        self.attempts += 1
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")


ERRORS = [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EBADF]


@pytest.mark.parametrize("number", ERRORS)
def test_no_way_to_print_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """print, both consoles of rich, a table, a progress bar that is drawn, and click."""
    import typer
    from rich.table import Table

    broken = Broken(number)
    broken.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", broken)
    with lasting_output():
        print("x", flush=True)
        print("x", file=sys.stderr)
        typer.echo("x")
        for stderr in (False, True):
            Console(stderr=stderr).print(Table("a"), "x " * 500)
            with Progress(console=Console(stderr=stderr, force_terminal=True)) as bar:
                bar.update(bar.add_task("x", total=2), advance=1)
                print("inside")
        sys.stdout.writelines(["a", "b"])
    assert broken.attempts > 4 and sys.stdout is broken


def test_a_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with lasting_output():
        print("x", flush=True)


def test_a_stream_that_works_again_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under a log is not for ever; the error is kept."""
    stream = Broken(errno.ENOSPC)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("lost")
        monkeypatch.setattr(Broken, "write", io.StringIO.write)
        print("kept")
        assert isinstance(sys.stdout, LastingStream) and sys.stdout.error is not None
    assert stream.getvalue().endswith("kept\n")


def test_what_follows_a_reader_that_went_away_is_discarded_for_libraries_too() -> None:
    """Also what C code and child processes print; the interpreter ends with code 0 and says nothing."""
    code = (
        "import os, subprocess, sys\nfrom unilatent.terminal import lasting_output\n"
        "with lasting_output():\n    print('x' * 100_000, flush=True)\n    print('y')\n"
        "    assert os.write(1, b'z') == 1\n    assert subprocess.run(['echo', 'z']).returncode == 0\n"
        "print('at the end')\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == "", done


def test_streams_are_wrapped_once_and_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with lasting_output():
        outer: Any = sys.stdout
        with lasting_output():
            assert sys.stdout is outer
        print("Ä", sys.stdout.isatty())
    assert sys.stdout is before and capsys.readouterr().out == "Ä False\n"


def test_training_from_python_does_not_need_its_output(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", broken := Broken(errno.EPIPE))
    monkeypatch.setattr(sys, "stdout", broken)
    settings = [*QUICK, "training.steps=2", "training.log_every=1", "training.evaluate_samples=64"]
    Trainer(preset("digits").override(*settings), tmp_path / "run").fit()
    assert broken.attempts > 2
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000002")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_commands_whose_work_is_to_print_say_that_it_is_not_complete() -> None:
    for line, code in (("config show digits", 1), ("--version", 0)):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "unilatent", *line.split()]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == code, done
        assert ("standard output: No space left on device" in done.stderr) == bool(code), done


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_hangups_stop_once_and_never_end_at_once() -> None:
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop.take() == STOP and stop.received is signal.SIGHUP
        signal.raise_signal(signal.SIGTERM)  # the first of those that end at once the second time
        signal.raise_signal(signal.SIGHUP)
        assert stop.received is signal.SIGTERM
        signal.signal(signal.SIGTERM, previous := lambda *_: ended.append(1))
        ended: list[int] = []
        signal.raise_signal(signal.SIGTERM)
        assert ended == [1] and previous is not None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_request_to_save_is_none_to_stop() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.take() == SAVE and stop.received is None


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_data_workers_ignore_a_hangup_which_their_whole_group_gets() -> None:
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        _init_worker(0)
        assert {signal.getsignal(number) for number in handled} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- processes -------------------------------------------------------------------------------------------------------


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash with `unilatent` as this Python's."""
    setup = f'unilatent() {{ {shlex.quote(sys.executable)} -m unilatent "$@"; }}\n'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", "-c", setup + line], env=environment, capture_output=True, text=True, timeout=300)


def written(line: list[object]) -> str:
    return shlex.join(map(str, line))


@pytest.mark.faults
@pytest.mark.parametrize("verb", VERBS)
def test_f45_closed_streams_change_nothing(
    run_folder: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    verb: str,
) -> None:
    """Six verbs with standard output and error output closed at the start: exit code 0, all files whole, and none of
    them has what was printed."""
    line = written(line_of(verb, run_folder, sources, tmp_path / "out"))
    done = shell(f"unilatent {line} >&- 2>&-")
    assert done.returncode == 0 and done.stdout == done.stderr == "", done
    whole(tmp_path / "out")
    assert names(tmp_path / "out") == PRODUCTS.get(verb, names(tmp_path / "out")) != set()
    for path in (tmp_path / "out").rglob("*.json*"):
        assert b"step 12/12" not in path.read_bytes() and b"samples in" not in path.read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("verb", VERBS)
def test_f47_a_reader_that_goes_away_costs_nothing(
    run_folder: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    verb: str,
) -> None:
    """Six verbs whose output is read by `head -1`, or by nobody: exit code 0, all files whole, no traceback."""
    reader = "head -1" if verb in ("train", "evaluate") else "true"
    line = written(line_of(verb, run_folder, sources, tmp_path / "out"))
    done = shell(f"unilatent {line} 2>&1 | {reader}; echo code ${{PIPESTATUS[0]}}")
    assert done.stdout.splitlines()[-1] == "code 0" and "Traceback" not in done.stdout and done.stderr == "", done
    whole(tmp_path / "out")
    assert names(tmp_path / "out") == PRODUCTS.get(verb, names(tmp_path / "out")) != set()
    if verb == "train":
        assert (tmp_path / "out" / "model").is_dir()


@pytest.mark.faults
@pytest.mark.covers("F46")
def test_a_run_whose_terminal_is_closed_is_saved(tmp_path: Path) -> None:
    """The process leads a session of its own with a terminal, which is closed under it while two data workers read."""
    import pty
    import time

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "unilatent", "train", "digits", *QUICK, "training.steps=100000",
               "training.log_every=1", "training.workers=2", "--out", str(tmp_path / "run")]  # fmt: skip
    code = "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.argv[1], sys.argv[1:])\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )  # fmt: skip
    os.close(follower)
    try:
        deadline = time.monotonic() + 120
        os.set_blocking(leader, False)
        while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").is_file():
            try:
                os.read(leader, 65536)
            except BlockingIOError:
                time.sleep(0.1)
        os.close(leader)
        assert process.wait(120) == 129
    finally:
        process.kill()
    log = (tmp_path / "run" / "log.txt").read_text()
    step = re.search(r"SIGHUP: saved step (\d+); resume with --resume auto", log)
    assert step, log
    ckpt.verify(tmp_path / "run" / "checkpoints" / f"step_{int(step[1]):08d}")


def test_names_of_devices_are_checked(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    for device in ("foo", "gpu", "0", "cuda:99", "cuda:-1", "mps", "CPU", "cpu:1", " cpu", ""):
        refused = cli("sample", run_folder, "--device", device, "--out", tmp_path / "out")
        assert refused.code == 2 and refused.err.count("\n") == 1, (device, refused)
        assert refused.err.startswith(f"error: --device: {device!r} is ") and "this machine has cpu" in refused.err
    trained = cli("train", "digits", *QUICK, "training.device=foo", "--out", tmp_path / "run")
    assert trained.code == 2 and "'foo' is unknown" in trained.err and not (tmp_path / "run").exists()
