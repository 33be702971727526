"""The commands of docs/cluster.md with other sizes: two agents on loopback, one agent, Accelerate, restarts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import TORCHRUN, environment, losses, port
from test_training import assert_same, digits, state

from unilatent.batches import micro_batches
from unilatent.training.trainer import Trainer

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
FIFTY = (
    "training.steps=50", "training.batch_size=16", "training.log_every=1", "training.checkpoint_every=20",
    "training.sample_every=0", "training.evaluate_samples=0", "training.threads=1", "training.optimizer.muon=false",
)  # fmt: skip


def printed(start: str) -> str:
    """Return the command on the page that begins with `start`."""
    (found,) = re.findall(rf"^{re.escape(start)}.*$", PAGE.read_text(), flags=re.MULTILINE)
    return found


def command(start: str, out: Path, processes: int, *overrides: str, at: int) -> list[str]:
    """Return that command with another host, sizes, preset and folder."""
    smaller = {
        "HOST:29500": f"127.0.0.1:{at}",
        "imagenet256-unite-b": "digits",
        "runs/b": str(out),
        "8": str(processes),
    }
    words = [smaller.get(word, word) for word in shlex.split(printed(start)) if not word.startswith("data.path")]
    launcher = {"torchrun": TORCHRUN, "accelerate": ACCELERATE}[words[0]]
    options = {  # one machine has one default port, and the tests several runs
        "torchrun": [] if "--rdzv-backend" in words else ["--master-addr", "127.0.0.1", "--master-port", str(at)],
        "accelerate": [],
    }[words[0]]
    rest = words[1:]
    if words[0] == "accelerate":
        rest = ["launch", "--main_process_port", str(at), *words[2:]]
    return [*launcher, *options, *rest, *overrides]


def together(commands: list[list[str]], **extra: str) -> None:
    """Run the commands at the same time, and check that all succeed."""
    started = [
        subprocess.Popen(c, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    Trainer(digits(*FIFTY), out).fit()
    return out


@pytest.mark.parametrize(("world", "micro"), [(2, None), (2, 3), (3, 2), (4, None)])
def test_sample_order_is_that_of_one_process(tmp_path: Path, world: int, micro: int | None) -> None:
    """Every step's samples together, over two epochs and a batch that the number of processes does not divide."""
    data = Trainer(digits("data.held_out=1700"), tmp_path / "run").splits.train
    size, steps = 14, range(2 * len(data) // 14)
    one = [[data.index_at(0, p) for p in positions] for positions in micro_batches(steps, size, None)]
    for step in steps:
        shares = [
            [
                data.index_at(0, p)
                for batch in micro_batches(range(step, step + 1), size, micro, rank, world)
                for p in batch
            ]
            for rank in range(world)
        ]
        dealt = [shares[i % world][i // world] for i in range(size)]
        assert dealt == one[step]


@pytest.mark.faults
def test_two_nodes_are_one_optimisation(tmp_path: Path, alone: Path) -> None:
    line = command("torchrun --nnodes 2", tmp_path / "nodes", 1, *FIFTY, at=port())
    together([line, line])
    assert len(losses(alone)) == 50
    assert losses(tmp_path / "nodes") == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.faults
def test_one_agent_and_accelerate_do_the_same(tmp_path: Path, alone: Path) -> None:
    together([command("torchrun --nproc-per-node 8 -m", tmp_path / "torchrun", 2, *FIFTY, at=port())])
    together([command("accelerate launch", tmp_path / "accelerate", 2, *FIFTY, at=port())])
    assert losses(tmp_path / "torchrun") == pytest.approx(losses(alone), rel=1e-5)
    assert_same(state(tmp_path / "torchrun", 50), state(tmp_path / "accelerate", 50))


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_f29_torchrun_restarts_and_the_run_is_the_unbroken_one(tmp_path: Path, rank: int) -> None:
    start = "torchrun --nproc-per-node 8 --max-restarts"
    together(
        [command(start, tmp_path / "broken", 2, *FIFTY, at=port())],
        UNILATENT_FAULT=f"step.before_optimizer:kill:{rank}:33",
    )
    together([command(start, tmp_path / "whole", 2, *FIFTY, at=port())])
    assert "resumed from" in (tmp_path / "broken" / "log.txt").read_text()
    assert_same(state(tmp_path / "broken", 50), state(tmp_path / "whole", 50))


@pytest.mark.faults
def test_f29_two_nodes_restart_together(tmp_path: Path, alone: Path) -> None:
    """A process of one agent is killed; both agents restart their processes, which form a new group."""
    line = command("torchrun --nnodes 2", tmp_path / "run", 1, *FIFTY, at=port())
    line[line.index("-m", 3) : line.index("-m", 3)] = ["--max-restarts", "3"]
    together([line, line], UNILATENT_FAULT="step.before_optimizer:kill:1:33")
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
