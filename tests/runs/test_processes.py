"""Two processes on this machine (gloo) are one optimisation: against one process at the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK
from safetensors.torch import load_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def train(out: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable] if processes == 1 else [
        *TORCHRUN, "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port())
    ]  # fmt: skip
    command = [*launcher, "-m", "unilatent", "train", "digits", *QUICK, *overrides, "--out", str(out)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss/total"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.covers("F25")
@pytest.mark.parametrize("overrides", [(), ("training.micro_batch_size=3",)])
def test_two_processes_are_one_optimisation(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Two gloo processes against one, equal global batch: losses within 1e-5 over 12 steps."""
    common = ("training.log_every=1", "training.optimizer.muon=false")
    done = train(tmp_path / "two", *common, *overrides, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(tmp_path / "one", *common).returncode == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    assert two == pytest.approx(one, rel=1e-5)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2


def test_refusals_reach_the_shell(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "training.batch_size=1", processes=2)
    assert done.returncode != 0 and "is less than the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
