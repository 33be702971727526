"""Runs that went wrong once: started again when finished, locked by the dead, resumed apart, saved while poisoned."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import QUICK, Command
from test_processes import TORCHRUN, environment, port
from test_training import digits

from unilatent.config import ConfigError
from unilatent.training import checkpoint as ckpt
from unilatent.training import lock
from unilatent.training.journal import Journal
from unilatent.training.processes import Processes
from unilatent.training.trainer import Trainer

EVALUATED = ("training.evaluate_samples=20", "training.steps=4")


def test_a_finished_run_started_again_trains_and_evaluates_nothing(tmp_path: Path, cli: Command) -> None:
    run = tmp_path / "run"
    Trainer(digits(*EVALUATED), run).fit()
    before = (run / "metrics.jsonl").read_text()
    assert '"eval/' in before
    again = cli("train", "digits", *QUICK, *EVALUATED, "--out", run, "--resume", "auto")
    assert again.code == 0 and "nothing is left to train" in again.err and "evaluated before" in again.err
    assert (run / "metrics.jsonl").read_text() == before


def test_an_evaluation_of_an_abandoned_continuation_is_made_again(tmp_path: Path) -> None:
    """Resumed before it, the run has not been evaluated, whatever files say."""
    run = tmp_path / "run"
    settings = ("training.evaluate_samples=20", "training.steps=8")
    Trainer(digits(*settings), run).fit()
    numbers = run / "eval" / "step_00000008.json"
    numbers.write_text("stale")
    Trainer(digits(*settings), run, resume=str(run / "checkpoints" / "step_00000004")).fit()
    assert json.loads(numbers.read_text())


def test_numbers_of_the_step_a_run_started_from_have_no_clock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with Journal(tmp_path, total=8, done=8) as journal:
        journal.log(8, {"loss/total": 1.0})
    assert capsys.readouterr().err == "step 8/8  total 1\n"


# Who holds a run folder.


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose lock a process on another machine, node-a, left behind."""
    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of-tonight")
    lock.take(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-b")
    return tmp_path


def test_f34_a_job_started_again_on_another_machine_holds_its_own_lock(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of the same torchrun job from another machine is no obstacle; of another job, or an unnamed one, it is."""
    assert lock.owner(elsewhere) is None
    lock.take(elsewhere)
    assert json.loads((elsewhere / "lock.json").read_text())["host"] == "node-b"
    for other in ("of-last-night", "none", None):
        monkeypatch.setattr(socket, "gethostname", lambda: "node-c")
        monkeypatch.delenv("TORCHELASTIC_RUN_ID") if other is None else monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        with pytest.raises(ConfigError, match=r"process \d+ on node-b is training there"):
            lock.take(elsewhere)


def test_a_lock_of_an_unnamed_torchrun_is_nobodys_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (tmp_path / "lock.json").write_text('{"pid": 1, "host": "node-a", "launch": "none"}')
    with pytest.raises(ConfigError, match="process 1 on node-a"):
        lock.refuse_second(tmp_path)


class Second(Processes):
    """The second of two processes, as it sees the first one's answers."""

    def __init__(self, *told: object) -> None:
        super().__init__("cpu")
        self.rank, self.is_main, self.told = 1, False, list(told)

    def from_main(self, find: object) -> object:  # type: ignore[override]
        return self.told.pop(0)


def test_only_the_first_process_looks_at_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock.json").write_text('{"pid": 1, "host": "node-a"}')
    with pytest.raises(ConfigError, match="process 1 on node-a"):
        Trainer(digits(), tmp_path)
    monkeypatch.setattr("unilatent.training.trainer.Processes", lambda *_: Second(None))
    assert Trainer(digits(), tmp_path).step == 0


def test_a_pid_that_was_given_out_again_holds_nothing(tmp_path: Path) -> None:
    lock.take(tmp_path)
    held = json.loads((tmp_path / "lock.json").read_text())
    if held["started"] is None:
        pytest.skip("no /proc here")
    parent = {**held, "pid": os.getppid(), "started": lock._started(os.getppid())}
    (tmp_path / "lock.json").write_text(json.dumps(parent))
    assert lock.owner(tmp_path) == {"pid": os.getppid(), "host": socket.gethostname()}
    (tmp_path / "lock.json").write_text(json.dumps({**parent, "started": parent["started"] - 1}))
    assert lock.owner(tmp_path) is None


def test_a_lock_is_taken_once_and_released_by_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a process that looked before another took it."""
    mine = tmp_path / "lock.json"
    other = json.dumps({"pid": os.getppid(), "host": socket.gethostname()})
    looked = iter([True])
    look = lock.refuse_second

    def late(run: Path) -> None:
        look(run)
        if next(looked, False):
            mine.write_text(other)  # taken between looking and taking

    monkeypatch.setattr(lock, "refuse_second", late)
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on"):
        lock.take(tmp_path)
    lock.release(tmp_path)
    assert mine.read_text() == other and [p.name for p in tmp_path.iterdir()] == ["lock.json"]
    mine.write_text("{")
    lock.take(tmp_path)
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


# What a run goes on from.


def test_processes_that_see_different_checkpoints_are_refused(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rank that differs, whatever is wrong there."""
    at = run_folder / "checkpoints" / "step_00000012"
    seen: list[str] = []

    def gather(self: Processes, item: str) -> list[str]:
        return [item, ckpt.identity(at.with_name(seen[-1]))]

    monkeypatch.setattr(Processes, "gather", gather)
    for name in ("step_00000008", "step_00000099"):
        seen.append(name)
        with pytest.raises(ConfigError, match=r"process 1 sees (step 8|none that can be read).*first process step 12"):
            Trainer(digits(), tmp_path / "run", resume=str(at))
    seen.append(at.name)
    assert Trainer(digits(), tmp_path / "run", resume=str(at)).step == 12


@pytest.mark.faults
def test_nodes_that_do_not_share_the_run_folder_are_refused(tmp_path: Path, run_folder: Path) -> None:
    """Two processes, each with a run folder of its own, in which one lacks the newest checkpoint."""
    for node in ("node0", "node1"):
        shutil.copytree(run_folder, tmp_path / node / "run")
    shutil.rmtree(tmp_path / "node1" / "run" / "checkpoints" / "step_00000012")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r} + '/node' + os.environ['RANK'])\n"
        "from unilatent.cli import main\n"
        f"main(['train', 'digits', *{list(QUICK)!r}, '--out', 'run', '--resume', 'auto'])\n"
    )
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", "--master-port", str(port()), str(script)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and "process 1 sees none that can be read" in done.stderr.replace("\n", " ")


def test_a_path_resumed_into_another_run_is_refused(tmp_path: Path, run_folder: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    path = run_folder / "checkpoints" / "step_00000004"
    with pytest.raises(ConfigError, match="holds another run; choose another --out"):
        Trainer(digits(), other, resume=str(path))
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert Trainer(digits(), other, resume=str(other / "checkpoints" / "step_00000004")).step == 4
    assert Trainer(digits(), tmp_path / "new", resume=str(path)).step == 4
