"""Runs that are killed, starved and poisoned at exact places, and what is left of them.

Ids are those of the fault table in docs/reliability.md. Tests in this process run with every `make test`; those that
need processes of their own carry the marker `faults`; the long ones are in test_soak.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from test_processes import TORCHRUN, environment, port
from test_training import assert_same, digits, state

import unilatent.faults as faults
from unilatent.runs import checkpoint as ckpt
from unilatent.training.trainer import Trainer

SAVE_POINTS = (
    "save.start", "save.after_model", "save.before_manifest", "save.before_rename", "save.after_rename",
    "save.before_prune", "save.in_prune", "step.before_optimizer",
)  # fmt: skip


def start(out: Path, *overrides: str, fault: str = "", processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable] if processes == 1 else [
        *TORCHRUN, "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port())
    ]  # fmt: skip
    command = [*launcher, "-m", "unilatent", "train", "digits", *QUICK, "training.keep_checkpoints=2", *overrides,
               "--out", str(out), "--resume", "auto"]  # fmt: skip
    extra = {"UNILATENT_FAULT": fault} if fault else {}
    return subprocess.Popen(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], within: float = 120) -> tuple[int, str]:
    out, _ = process.communicate(timeout=within)
    return process.returncode, out


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch):
    """Arm a fault in this process."""

    def arm(text: str) -> None:
        monkeypatch.setattr(faults, "ARMED", faults.Fault.parse(text))
        for module in (
            "unilatent.runs.checkpoint",
            "unilatent.training.trainer",
            "unilatent.training.step",
            "unilatent.training.saving",
        ):
            monkeypatch.setattr(f"{module}.reach", faults._act)

    return arm


def test_unset_faults_cost_an_empty_call() -> None:
    assert faults.ARMED is None and faults.reach is faults._nothing


@pytest.mark.parametrize("text", ["save.start", "save.start:explode", "save.start:kill:one", "a:kill:1:2:3"])
def test_a_mistyped_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="UNILATENT_FAULT"):
        faults.Fault.parse(text)


def test_f04_a_full_disk_costs_no_checkpoint(tmp_path: Path, armed) -> None:
    """No space left while saving: older checkpoints stay and load, the message has the free space."""
    armed("save.after_model:full::8")
    with pytest.raises(OSError, match=r"checkpoint of step 8 not written .* GiB free there\); older .* are untouched"):
        Trainer(digits(), tmp_path / "run").fit()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert Trainer(digits(), tmp_path / "run", resume="auto").step == 4


def test_f11_stop_leaves_the_weights_and_names_the_batch(tmp_path: Path, armed) -> None:
    """A gradient element NaN once, `stop`: weights stay, the batch's samples are written down."""
    armed("step.gradients:nan::6")
    trainer = Trainer(digits(), tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step 7: grad_norm is not finite; the weights are those of step 6"):
        trainer.fit()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    (line,) = (tmp_path / "run" / "bad_batches.rank0.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 7 and len(json.loads(line)["samples"]) == 16
    assert ckpt.newest(tmp_path / "run" / "checkpoints")[0].name == "step_00000004"


def test_f11_skip_is_a_step_that_did_nothing(tmp_path: Path, armed, monkeypatch: pytest.MonkeyPatch) -> None:
    """`skip:1`: the later state is that of a run whose step was undone."""
    armed("step.gradients:nan::6")
    Trainer(digits("training.non_finite=skip:1"), tmp_path / "skipped").fit()
    monkeypatch.undo()
    trainer = Trainer(digits(), tmp_path / "noop")
    original = trainer._one_step

    def without(micro: list) -> dict:
        if trainer.step != 6:
            return original(micro)
        weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        optimizer = {k: v.clone() for k, v in trainer.state.optimizers.state().items()}
        average = {k: v.clone() for k, v in trainer.state.ema.weights.items()}
        logs = original(micro)
        trainer.model.load_state_dict(weights)
        live = trainer.state.optimizers.allocate(optimizer, "before the step") | trainer.state.ema.weights
        for name, tensor in (optimizer | average).items():
            live[name].copy_(tensor)
        return logs

    monkeypatch.setattr(trainer, "_one_step", without)
    trainer.fit()
    assert_same(state(tmp_path / "skipped", 12), state(tmp_path / "noop", 12))


def test_f12_too_many_in_a_row_stop(tmp_path: Path, armed) -> None:
    """More NaN steps in a row than allowed: stops, names the steps, weights unchanged."""
    armed("step.gradients:nan")
    trainer = Trainer(digits("training.non_finite=skip:3"), tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"steps 1 to 4: .*; the weights are those of step 0"):
        trainer.fit()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_f14_every_flipped_bit_is_found_and_named(tmp_path: Path, run_folder: Path) -> None:
    """200 random single-bit flips over all files of a checkpoint, the manifest's own among them."""
    source = run_folder / "checkpoints" / "step_00000012"
    copy = tmp_path / "step_00000012"
    shutil.copytree(source, copy)
    files = sorted(copy.iterdir())
    rng = random.Random(0)
    for _ in range(200):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ckpt.CheckpointError, match=path.name.replace(".", r"\.")):
            ckpt.verify(copy)
        shutil.copy(source / path.name, path)
    ckpt.verify(copy)


@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "zero a page"])
def test_f14_f15_damaged_files_are_named(tmp_path: Path, run_folder: Path, harm: str) -> None:
    """Each file of a checkpoint deleted, truncated, emptied, a page zeroed: found and named."""
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "ema.safetensors"):
        copy = tmp_path / name / "step_00000012"
        shutil.copytree(run_folder / "checkpoints" / "step_00000012", copy)
        path, content = copy / name, (copy / name).read_bytes()
        if harm == "delete":
            path.unlink()
        else:
            cut = {"truncate": content[: len(content) // 2], "empty": b"",
                   "zero a page": content[:10] + bytes(min(4096, len(content) - 10)) + content[4106:]}  # fmt: skip
            path.write_bytes(cut[harm])
        with pytest.raises(ckpt.CheckpointError, match=name.replace(".", r"\.")):
            ckpt.verify(copy)


def test_f15_leftovers_and_stale_pointers_do_not_confuse(tmp_path: Path, run_folder: Path) -> None:
    """A stale latest.json, a leftover partial and an empty step folder: the newest sound one is taken."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "latest.json").write_text('{"step": 99, "checkpoint": "checkpoints/step_00000099"}')
    (copy / "checkpoints" / "step_00000016.tmp-1").mkdir()
    (copy / "checkpoints" / "step_00000016").mkdir()
    trainer = Trainer(digits("training.steps=16"), copy, resume="auto")
    assert trainer.step == 12
    trainer.fit()
    assert not list((copy / "checkpoints").glob("*.tmp-*"))
    ckpt.verify(copy / "checkpoints" / "step_00000016")


@pytest.mark.faults
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_f01_f03_kill_at_each_point_of_a_save(tmp_path: Path, run_folder: Path, point: str) -> None:
    """Kill -9 at eight points of saving, pruning, stepping: two sound checkpoints stay, resuming is bitwise."""
    code, _ = finish(start(tmp_path / "run", fault=f"{point}:kill::{11 if point.startswith('step') else 12}"))
    assert code == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    sound = [p for p in ckpt.published(folder) if not _damaged(p)]
    assert len(sound) >= (1 if point.startswith("step") else 2)  # a kill in a step may meet the save of step 8
    code, out = finish(start(tmp_path / "run"))
    assert code == 0 and "resumed from" in out, out
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))
    assert not list(folder.glob("*.tmp-*")) and len(ckpt.published(folder)) >= 2


def _damaged(checkpoint: Path) -> bool:
    try:
        ckpt.verify(checkpoint)
    except ckpt.CheckpointError:
        return True
    return False


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_f07_sigterm_to_the_whole_group_saves_the_current_step(tmp_path: Path, workers: int) -> None:
    """SIGTERM to the whole group, 0 and 2 workers: the current step is saved, no process is left."""
    process = start(tmp_path / "run", "training.steps=100000", f"training.workers={workers}")
    wait_for_step(tmp_path / "run", 8)
    os.killpg(process.pid, signal.SIGTERM)
    code, out = finish(process, within=30)
    assert code == 143 and "SIGTERM: saved step" in out.replace("\n", " "), out
    step = int(out.replace("\n", " ").split("saved step ")[1].split(";")[0])
    ckpt.verify(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert group_is_gone(process.pid)


@pytest.mark.faults
def test_f10_sigterm_to_one_of_two_processes_saves_once_for_both(tmp_path: Path) -> None:
    """SIGTERM to one of two processes: both stop at the same step."""
    process = start(tmp_path / "run", fault="step.start:term:1:6", processes=2)
    code, out = finish(process)
    assert code == 0 and "saved step 7" in out.replace("\n", " "), out[-2000:]
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000007")


@pytest.mark.faults
def test_f11_both_processes_decide_alike_about_a_step_of_one(tmp_path: Path) -> None:
    """A gradient element NaN on rank 1 only, `skip:1`: both processes leave the step out."""
    process = start(tmp_path / "run", "training.non_finite=skip:1", fault="step.gradients:nan:1:6", processes=2)
    code, out = finish(process)
    assert code == 0 and "step 7: grad_norm is not finite; left out" in out.replace("\n", " "), out[-2000:]


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", ["step.before_optimizer:kill:1:6", "step.before_optimizer:raise:1:6", "save.start:raise:0:8"]
)
def test_f27_f28_a_dead_process_ends_the_job_and_a_restart_resumes(tmp_path: Path, fault: str) -> None:
    """One of two killed, raising, or failing to save: the job ends non-zero, a restart resumes."""
    started = time.monotonic()
    code, out = finish(start(tmp_path / "run", fault=fault, processes=2), within=90)
    assert code != 0 and time.monotonic() - started < 75, out[-2000:]
    if "raise" in fault:
        assert "fault injected at" in out
    code, out = finish(start(tmp_path / "run", processes=2))
    assert code == 0 and "resumed from" in out, out[-2000:]


@pytest.mark.faults
def test_f28_a_hung_process_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    """One of two processes hangs: the job ends non-zero within the timeout and torchrun's own."""
    started = time.monotonic()
    process = start(tmp_path / "run", "training.timeout=6", fault="step.before_optimizer:hang:1:6", processes=2)
    code, _ = finish(process, within=90)
    assert code != 0 and time.monotonic() - started < 75


def wait_for_step(run: Path, step: int, within: float = 60) -> None:
    until = time.monotonic() + within
    while time.monotonic() < until:
        file = run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {within} s")


def group_is_gone(group: int) -> bool:
    for _ in range(40):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
