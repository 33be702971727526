"""Commands of several processes: said once, stopped by any of them, read by one; and plans of several machines."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUICK, Command
from test_plan import planned
from test_processes import TORCHRUN, environment, port

from unilatent.evaluation import evaluate
from unilatent.modalities.image.spaces import Pixels
from unilatent.presets import presets
from unilatent.processes import Processes
from unilatent.stored_latents import HEADER
from unilatent.training.plan import BETWEEN, Machines


def together(*arguments: object, fault: str = "") -> subprocess.CompletedProcess[str]:
    """A command in two processes."""
    launcher = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port())]
    command = [*launcher, "-m", "unilatent", *map(str, arguments)]
    extra = {"UNILATENT_FAULT": fault} if fault else {}
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=240)


def test_a_dry_run_of_two_processes_is_printed_once(tmp_path: Path) -> None:
    done = together("train", "digits", *QUICK, "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters") == 1 and not (tmp_path / "run").exists(), done.stdout


def test_a_signal_to_one_of_two_processes_ends_the_encoding_and_the_same_command_completes_it(
    run_folder: Path, cli: Command, tmp_path: Path
) -> None:
    """The files are then those of one process."""
    command = ("encode", run_folder, "--views", 1, "--shard-size", 200)
    stopped = together(*command, "--out", tmp_path / "z", fault="evaluate.piece:term:1")
    assert stopped.returncode == 0, stopped.stderr[-2000:]
    assert stopped.stderr.count("stopped: the shards that are complete are in") == 1, stopped.stderr
    written = {path.name for path in (tmp_path / "z").glob("rows_*")}
    completed = together(*command, "--out", tmp_path / "z")
    assert completed.returncode == 0 and "already encoded" in completed.stdout, completed.stdout
    assert cli(*command, "--out", tmp_path / "whole").code == 0
    shards = {path.name for path in (tmp_path / "whole").glob("rows_*")}
    assert written < shards and len(shards) == 8
    for name in (HEADER, *shards):
        assert (tmp_path / "z" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_weights_are_prepared_by_the_first_process_before_others() -> None:
    """What is missing is downloaded once: the other processes find it in the cache."""
    order = []

    class Other(Processes):
        def on_main(self, work: object) -> None:
            order.append("first process")

    other = Other.alone()
    other.is_main = False
    space = Pixels()
    space.prepare = lambda device: order.append("this process")  # type: ignore[method-assign]
    evaluate.prepare([space], torch.device("cpu"), other)
    assert order == ["first process", "this process"]


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_a_preset_s_own_settings_alone(cli: Command, tmp_path: Path) -> None:
    name, entry = next((name, entry) for name, entry in presets().items() if entry.published)
    record = entry.published[0]
    assert record.fits(entry(), entry()) and record.fits(entry().override("data.path=elsewhere"), entry())
    for other in ("training.batch_size=96", "training.optimizer.learning_rate=0.5", "sampling.num_inference_steps=3"):
        assert not record.fits(entry().override(other), entry()), other
    file = tmp_path / "mine.yaml"
    settings = entry().override("training.batch_size=96").plain()
    file.write_text(yaml.safe_dump(settings))
    assert "published" in cli("plan", name).out and "published" not in cli("plan", file).out


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_of_some_processes_have_the_timeout_of_the_run(tmp_path: Path) -> None:
    alone = Processes.alone()
    assert alone.timeout == timedelta(seconds=1800)
    source = (
        "import os, torch.distributed as dist\n"
        "from unilatent.processes import Processes\n"
        "from unilatent.presets import preset\n"
        "from unilatent.methods.base import LatentModel\n"
        "from unilatent.sharding import shard\n"
        "processes = Processes('cpu', 77)\n"
        "seen, plain = [], dist.distributed_c10d._set_pg_timeout\n"
        "dist.distributed_c10d._set_pg_timeout = lambda t, g: seen.append((t.total_seconds(), g)) or plain(t, g)\n"
        "model = LatentModel.build(preset('molecules').model())\n"
        "shard(model, processes.device, 'hybrid', 'fp32', processes.timeout)\n"
        "print(sorted({seconds for seconds, _ in seen}), len(seen))\n"
        "processes.leave()\n"
    )
    script = tmp_path / "groups.py"
    script.write_text(source)
    launcher = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port())]
    done = subprocess.run([*launcher, str(script)], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines() == ["[77.0] 2"] * 2, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("gpus", [2, 4])
def test_hybrid_sharding_of_fewer_cards_than_a_machine_has_stays_within_it(gpus: int) -> None:
    one = Machines(gpus=gpus)
    found = planned("digits", "training.shard=hybrid", machines=one)
    whole = planned("digits", "training.shard=true", machines=one)
    assert BETWEEN not in found.sent and sum(found.sent.values()) == pytest.approx(sum(whole.sent.values()))
