"""Regressions of runs: restarted when finished, locked by a dead process, resumed apart, saved while not finite."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Command
from safetensors.torch import load_file
from test_processes import TORCHRUN, environment, port
from test_training import digits

from unilatent.batches import SkippedSample
from unilatent.config import ConfigError
from unilatent.processes import Processes
from unilatent.runs import checkpoint as ckpt
from unilatent.runs import lock
from unilatent.runs.journal import Journal
from unilatent.training.alarms import Alarms
from unilatent.training.bad_samples import BadSamples
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
    """The second of two processes: the first one looked for a checkpoint and the lock, and found nothing."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.rank, self.is_main = 1, False

    def from_main(self, find: Callable[[], Any]) -> Any:
        return None if "find_checkpoint" in find.__qualname__ else find()


def test_only_the_first_process_looks_at_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock.json").write_text('{"pid": 1, "host": "node-a"}')
    with pytest.raises(ConfigError, match="process 1 on node-a"):
        Trainer(digits(), tmp_path)
    monkeypatch.setattr("unilatent.training.trainer.Processes", lambda *_: Second())
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
        return [item, *([ckpt.identity(at.with_name(seen[-1]))] if item == ckpt.identity(at) else [])]

    monkeypatch.setattr(Processes, "gather", gather)
    for name in ("step_00000008", "step_00000099"):
        seen.append(name)
        with pytest.raises(ConfigError, match=r"process 1 finds (step 8|no readable checkpoint).*process step 12"):
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
    assert done.returncode != 0 and "process 1 finds no readable checkpoint" in done.stderr.replace("\n", " ")


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


# What a checkpoint holds, and whether it is written at all.


def poison_after(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Once that step is made, one number of the averages, weights or optimizer state is not finite."""
    original = trainer._one_step

    def poisoned(micro: list) -> dict:
        logs = original(micro)
        if trainer.step + 1 == step:
            tensors_of = {"ema": trainer.state.ema.weights, "model": trainer.model.state_dict()}
            tensors = tensors_of.get(where) or trainer.state.optimizers.state()
            next(t for t in tensors.values() if t.is_floating_point() and t.ndim).view(-1)[0] = float("inf")
        return logs

    monkeypatch.setattr(trainer, "_one_step", poisoned)


@pytest.mark.parametrize("background", ["true", "false"])
def test_f11_a_bad_average_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str) -> None:
    """An infinite number in EMA: nothing of that step is saved, the message names the tensor."""
    trainer = Trainer(digits(f"training.background_saving={background}"), tmp_path / "run")
    poison_after(trainer, 7, monkeypatch, "ema")
    name = next(iter(trainer.state.ema.weights))
    with pytest.raises(FloatingPointError, match=rf"step 8: ema {name} is not finite, so nothing of it is written"):
        trainer.fit()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000004")


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_f11_neither_are_bad_weights_or_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Infinite in weights or optimizer state after the last step: no checkpoint of it, no finished model."""
    trainer = Trainer(digits("training.steps=6"), tmp_path / "run")
    poison_after(trainer, 6, monkeypatch, where)
    with pytest.raises(FloatingPointError, match=f"step 6: {where} .* is not finite"):
        trainer.fit()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_bad_average_is_never_published(tmp_path: Path, run_folder: Path) -> None:
    """Nor from a checkpoint of the last step, of which nothing more is saved."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    before = (copy / "model" / "model.safetensors").read_bytes()
    trainer = Trainer(digits(), copy, resume="auto")
    next(iter(trainer.state.ema.weights.values())).view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 12: ema"):
        trainer.fit()
    assert (copy / "model" / "model.safetensors").read_bytes() == before


FULL = """
import resource, sys
from pathlib import Path
from unilatent.presets import preset
from unilatent.training.trainer import Trainer
trainer = Trainer(preset("digits").override(*sys.argv[2:]), Path(sys.argv[1]))
step = trainer._one_step
def limited(micro):
    if trainer.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return step(micro)
trainer._one_step = limited
trainer.fit()
"""


def test_f04_files_that_really_cannot_grow_cost_no_checkpoint(tmp_path: Path) -> None:
    """Files limited to 200 kB by the system while tensors are written: what is needed and free is said, older
    checkpoints stay."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run"), *QUICK],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    match = re.search(r"checkpoint of step 8 not written to .*: File too large \((.*) MiB needed, (.*) GiB free", last)
    assert done.returncode == 1 and last.startswith("unilatent.files.DiskError") and match, done.stderr[-2000:]
    folder = tmp_path / "run" / "checkpoints"
    files = [load_file(path) for path in (folder / "step_00000004").glob("*.safetensors")]
    whole = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    assert float(match[1]) == pytest.approx(whole / 2**20, abs=0.006) and "ckpt prune" in last
    assert [p.name for p in folder.iterdir()] == ["step_00000004"]
    ckpt.verify(folder / "step_00000004")


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def save(step: int) -> None:
        ckpt.save(folder, step, lambda at: (at / "a").write_bytes(b"whole"), keep=2)  # type: ignore[arg-type]

    save(1)
    save(2)
    (folder / "step_00000002" / "a").write_bytes(b"cut")
    save(3)
    assert [p.name[-1] for p in ckpt.published(folder)] == ["1", "2", "3"]
    save(4)
    assert [p.name[-1] for p in ckpt.published(folder)] == ["2", "3", "4"]


def test_a_checkpoint_that_did_not_arrive_removes_no_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        ckpt.save(folder, step, lambda at: (at / "a").write_bytes(b"whole"), keep=2)  # type: ignore[arg-type]

    def lose(point: str, step: int) -> str:
        if point == "save.after_rename":
            (folder / f"step_{step:08d}" / "a").write_bytes(b"")
        return ""

    monkeypatch.setattr(ckpt, "reach", lose)
    with pytest.raises(OSError, match=r"checkpoint of step 3 is not what was written: .*a: damaged"):
        ckpt.save(folder, 3, lambda at: (at / "a").write_bytes(b"whole"), keep=2)  # type: ignore[arg-type]
    assert ckpt.newest(folder)[0] == folder / "step_00000002" and (folder / "step_00000001").is_dir()
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 2


def test_out_of_memory_names_the_checkpoint_that_is_there(tmp_path: Path, run_folder: Path) -> None:
    """Not the one that was begun."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    trainer = Trainer(digits("training.steps=16"), copy, resume="auto")
    trainer.checkpoints.saved = 16
    assert "the checkpoint of step 12 is intact" in trainer._way_out_of_memory(MemoryError("full"))
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint was written yet" in trainer._way_out_of_memory(MemoryError("full"))


def test_a_checkpoint_holds_the_counts_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples found bad while it is written, and steps left out since, belong to a later one."""
    trainer = Trainer(digits("training.non_finite=skip:5", "training.steps=5"), tmp_path / "run")
    original = trainer.checkpoints._write

    def late(folder: Path, step: int, *rest: Any) -> None:
        if step == 4:
            trainer.bad.indices.add(3)
        original(folder, step, *rest)

    monkeypatch.setattr(trainer.checkpoints, "_write", late)
    poisoned = iter([False, False, True, True, True])
    norm = "unilatent.training.step.gradient_norm"
    monkeypatch.setattr(norm, lambda *_: torch.tensor(float("nan") if next(poisoned) else 1.0))
    trainer.fit()
    states = [
        json.loads((tmp_path / "run" / "checkpoints" / f"step_0000000{step}" / "state.json").read_text())
        for step in (4, 5)
    ]
    assert [(state["bad_samples"]["indices"], state["skipped"]) for state in states] == [([], 2), ([3], 3)]
    resumed = Trainer(digits("training.non_finite=skip:5", "training.steps=8"), tmp_path / "run", resume="auto")
    assert resumed.state.skipped == 3


# What goes on beside training.


def test_a_run_that_trains_is_not_pruned(tmp_path: Path, run_folder: Path, cli: Command) -> None:
    """Nor is the save it has under way; afterwards what is said is what was done."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    under_way = copy / "checkpoints" / "step_00000016.tmp-1"
    under_way.mkdir()
    (copy / "lock.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    refused = cli("ckpt", "prune", copy)
    assert refused.code == 2 and f"process {os.getpid()} on" in refused.err and under_way.is_dir()
    assert len(ckpt.published(copy / "checkpoints")) == 3
    (copy / "lock.json").unlink()
    (copy / "checkpoints" / "step_00000004" / "state.json").unlink()
    done = cli("ckpt", "prune", copy).out.splitlines()
    assert [line.split(":")[0] for line in done] == [
        "deleted step_00000004, damaged", "deleted step_00000016.tmp-1", "kept step_00000008, step_00000012",
    ]  # fmt: skip
    for path in ckpt.published(copy / "checkpoints"):
        (path / "state.json").unlink()
    nothing = cli("ckpt", "prune", copy)
    assert nothing.code == 2 and not nothing.out and len(ckpt.published(copy / "checkpoints")) == 2


def test_bad_samples_that_cannot_be_written_down_cost_a_warning(tmp_path: Path) -> None:
    """They are counted all the same."""
    bad = BadSamples(0.5, 100, tmp_path, Processes("cpu"))
    (tmp_path / "bad_samples.rank0.jsonl").mkdir()
    bad.met = [SkippedSample(index=3, position=5, message="c: not an image")]
    warnings: list[str] = []
    bad.settle(1, lambda _: None, lambda _, why: warnings.append(why))
    assert bad.indices == {3} and "bad_samples.rank0.jsonl cannot be written" in warnings[0]


def test_one_logged_step_without_gradient_is_no_alarm(tmp_path: Path) -> None:
    """Steps between two that are logged are not known to have had none."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 100, "grad_norm": 1.0}\n{"step": 200, "grad_norm": 0.0}\n')
    alarms = Alarms(1000, 16)
    alarms.replay(metrics)
    assert not alarms.active
    raised = [change.step for step in range(201, 221) for change in alarms.after_step(step, 0.0)]
    assert raised == [210]


def test_an_alarm_over_gradients_lasts_until_there_are_some(tmp_path: Path) -> None:
    """Raised before a run was stopped, it is not raised again, and is over with the first gradient."""
    (tmp_path / "alarms.jsonl").write_text('{"step": 150, "alarm": "zero_gradients", "on": true}\n')
    alarms = Alarms(1000, 16)
    alarms.replay(tmp_path / "metrics.jsonl")
    assert not [change for step in range(201, 221) for change in alarms.after_step(step, 0.0)]
    assert [(change.alarm, change.on) for change in alarms.after_step(221, 1.0)] == [("zero_gradients", False)]


def test_what_a_killed_save_set_aside_is_found_on_resuming(tmp_path: Path, run_folder: Path) -> None:
    """Between setting the old one aside and putting the new one in place there is no step_N."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    shutil.rmtree(run / "model")
    newest = run / "checkpoints" / "step_00000012"
    newest.rename(newest.with_name(f"{newest.name}.old-1"))
    trainer = Trainer(digits(), run, resume="auto")
    assert trainer.step == 12
