"""More of what a run survives: second signals, torchrun's agent, epochs, changed processes, kills within a save.

Ids are those of the fault table in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK
from test_faults import finish, group_is_gone, start, wait_for_step
from test_processes import TORCHRUN, environment, losses, port
from test_training import assert_same, digits, state

from unilatent.runs import checkpoint as ckpt
from unilatent.training.trainer import Trainer

FOREVER = ("training.steps=100000", "training.checkpoint_every=0")
FORTY = ("data.held_out=1757", "training.keep_checkpoints=12", "training.checkpoint_every=1")
"""Forty training samples, so that steps 3, 5, 8, 10 of sixteen cross epochs; step 5 ends one."""


def until(there: Callable[[], object], within: float = 60) -> None:
    end = time.monotonic() + within
    while not there():
        assert time.monotonic() < end, f"not within {within} s"
        time.sleep(0.05)


def working_in(out: Path) -> dict[int, str]:
    """Processes whose command line names the folder, and their rank ("" for an agent)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        found[int(folder.name)] = variables.get("RANK", "")
    return found


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_f07_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The save after the first SIGTERM hangs; the second one does not wait for it, and what it left harms nobody."""
    process = start(tmp_path / "run", *FOREVER, fault="save.start:hang")
    wait_for_step(tmp_path / "run", 8)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: list((tmp_path / "run" / "checkpoints").glob("*.tmp-*")))
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    code, _ = finish(process, within=10)
    assert code == -signal.SIGTERM and group_is_gone(process.pid)
    assert Trainer(digits(), tmp_path / "run", resume="auto").step == 0


@pytest.mark.faults
def test_f10_sigusr1_to_one_process_and_sigterm_to_the_agent(tmp_path: Path) -> None:
    """SIGUSR1 to the second of two processes saves and goes on; SIGTERM to torchrun's agent saves; nothing is left."""
    out = tmp_path / "run"
    process = start(out, *FOREVER, processes=2)
    wait_for_step(out, 8)
    (second,) = [pid for pid, rank in working_in(out).items() if rank == "1"]
    os.kill(second, signal.SIGUSR1)
    until(lambda: ckpt.published(out / "checkpoints"))
    (first,) = ckpt.published(out / "checkpoints")
    ckpt.verify(first)
    saved = int(first.name[5:])
    wait_for_step(out, saved + 8)
    assert len(working_in(out)) == 3
    os.kill(process.pid, signal.SIGTERM)
    _, said = finish(process, within=25)  # unlike steps would wait for each other until the agent's 30 s are over
    said = " ".join(said.split())
    assert "SIGTERM: saved step" in said, said[-2000:]
    last = int(said.split("SIGTERM: saved step ")[1].split(";")[0])
    assert last > saved and ckpt.published(out / "checkpoints")[-1].name == f"step_{last:08d}"
    ckpt.verify(out / "checkpoints" / f"step_{last:08d}")
    until(lambda: not working_in(out), within=5)


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps over nearly five epochs, judged after step 6."""
    out = tmp_path_factory.mktemp("forty") / "run"
    Trainer(digits(*FORTY, "training.evaluate_samples=8", "training.evaluate_every=6"), out).fit()
    return out


@pytest.mark.parametrize(
    ("step", "changed"),
    [(4, ()), (5, ()), (6, ()), (5, ("training.workers=2",)), (6, ("training.log_every=5",))],
)
def test_f24_resuming_about_the_end_of_an_epoch_is_bitwise(
    tmp_path: Path, forty: Path, step: int, changed: tuple[str, ...]
) -> None:
    """One step before, at and after an epoch's end; as it was, with two workers, and with other log intervals."""
    trainer = Trainer(
        digits(*FORTY, *changed), tmp_path / "run", resume=str(forty / "checkpoints" / f"step_{step:08d}")
    )
    assert trainer.step == step and trainer.samples == 40
    trainer.fit()
    assert_same(state(tmp_path / "run", 12), state(forty, 12))


def test_f24_resuming_just_after_an_evaluation_is_bitwise(tmp_path: Path, forty: Path) -> None:
    """Step 6 is saved and judged, nothing later is there."""
    copy = tmp_path / "run"
    shutil.copytree(forty, copy)
    for step in range(7, 13):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}")
    judged = (copy / "eval" / "step_00000006.json").stat().st_mtime_ns
    settings = (*FORTY, "training.evaluate_samples=8", "training.evaluate_every=6")
    trainer = Trainer(digits(*settings), copy, resume="auto")
    assert trainer.step == 6
    trainer.fit()
    assert (copy / "eval" / "step_00000006.json").stat().st_mtime_ns == judged, "it is not judged twice"
    assert_same(state(copy, 12), state(forty, 12))


@pytest.mark.faults
def test_f25_one_two_and_one_process_are_one_run(tmp_path: Path) -> None:
    """Stopped after step 4 and after step 8, resumed by two processes and by one again: losses within 1e-5."""
    out, common = tmp_path / "run", ("training.log_every=1", "training.optimizer.muon=false")
    for processes, fault in ((1, "step.start:term:0:3"), (2, "step.start:term:1:7"), (1, "")):
        code, said = finish(start(out, *common, fault=fault, processes=processes))
        assert code == (128 + signal.SIGTERM if fault and processes == 1 else 0), said[-2000:]
        assert not fault or "saved step" in " ".join(said.split())
    Trainer(digits(*common), tmp_path / "one").fit()
    assert len(losses(out)) == 12 and losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    code, said = finish(start(out, processes=2))
    assert code == 0, said[-2000:]
    return out


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["step.before_optimizer:kill:1:6", "save.start:raise:0:8"])
def test_f27_f28_after_a_restart_two_processes_end_where_unbroken_ones_do(
    tmp_path: Path, two: Path, fault: str
) -> None:
    """One of two killed, or failing to save; started again by hand: final weights, average, optimizer bit for bit."""
    code, _ = finish(start(tmp_path / "run", fault=fault, processes=2), within=90)
    assert code != 0
    code, said = finish(start(tmp_path / "run", processes=2))
    assert code == 0 and "resumed from" in said, said[-2000:]
    assert_same(state(tmp_path / "run", 12), state(two, 12))


AVERAGES = """
import hashlib, sys
from pathlib import Path
import torch.distributed as dist
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

trainer = Trainer(preset("digits").override(*sys.argv[2:]), Path(sys.argv[1]))
trainer.fit()
weights = trainer.state.ema.weights
own = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
found = [None] * dist.get_world_size()
dist.all_gather_object(found, own)
if dist.get_rank() == 0:
    print("averages:", *found)
"""


@pytest.mark.faults
def test_f25_averages_are_equal_in_every_process(tmp_path: Path) -> None:
    """Averaged weights after twelve steps, hashed in each of two processes and gathered."""
    (tmp_path / "averages.py").write_text(AVERAGES)
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port()),
               str(tmp_path / "averages.py"), str(tmp_path / "run"), *QUICK]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("averages:")]
    one, other = line.split()[1:]
    assert one == other and len(one) == 64


# ---- kills within a save -------------------------------------------------------------------------------------------

AGAIN = """
import sys
from pathlib import Path
from unilatent.runs import checkpoint

for step, word in ((4, "a"), (8, "b"), (8, "c")):
    checkpoint.save(Path(sys.argv[1]), step, lambda at: (at / "state.json").write_text(word), keep=2)
"""


@pytest.mark.faults
def test_f01_kill_while_a_step_is_saved_again(tmp_path: Path) -> None:
    """Kill -9 between setting the old one aside and putting the new one there: the old one comes back, sound."""
    folder = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(folder)], env=environment(UNILATENT_FAULT="save.set_aside:kill"), timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    ckpt.verify(folder / "step_00000004")
    ckpt.clean(folder, 8)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000008"]
    ckpt.verify(folder / "step_00000008")
    assert (folder / "step_00000008" / "state.json").read_text() == "b"


POINTER = """
import os, signal, sys
from pathlib import Path
from unilatent.cli import main

replace = Path.replace

def killed(self, target):
    if Path(target).name == "latest.json" and Path(target).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
main(sys.argv[1:])
"""


@pytest.mark.faults
def test_f01_kill_before_the_pointer_to_the_newest_is_in_place(tmp_path: Path, run_folder: Path) -> None:
    """Kill -9 between the second checkpoint and latest.json, which names the first: resuming takes the second."""
    out = tmp_path / "run"
    command = ["train", "digits", *QUICK, "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", POINTER, *command], env=environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((out / "latest.json").read_text())["step"] == 4
    assert Trainer(digits(), out, resume="auto").step == 8
    code, said = finish(start(out))
    assert code == 0 and "resumed from" in said, said
    assert_same(state(out, 12), state(run_folder, 12))
    assert json.loads((out / "latest.json").read_text())["step"] == 12
