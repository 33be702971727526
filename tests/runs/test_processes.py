"""Process groups from the launcher's environment; two processes (gloo) against one at the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import QUICK
from safetensors.torch import load_file

from unilatent.processes import Processes, _create_group

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


TWICE = """
import torch
from unilatent.processes import Processes

torch.set_num_threads(6)
for processes in (Processes("cpu", 60), Processes()):
    total = processes.sum({"rank": torch.tensor(float(processes.rank + 1))})["rank"]
    print(processes.rank, processes.world, processes.is_main, processes.device, float(total), torch.get_num_threads())
processes.leave()
"""


def test_variables_of_any_launcher_make_one_group() -> None:
    """Without torchrun: RANK and the others, a second `Processes` in the same group, and the cores shared."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    started = []
    for rank in "01":
        own = environment(**variables, RANK=rank, LOCAL_RANK=rank)
        del own["OMP_NUM_THREADS"]
        started.append(subprocess.Popen([sys.executable, "-c", TWICE], env=own, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert outputs == [["0 2 True cpu 3.0 3"] * 2, ["1 2 False cpu 3.0 3"] * 2]


def test_one_process_creates_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes = Processes("cpu")
    assert (processes.rank, processes.world, processes.is_main, str(processes.device)) == (0, 1, True, "cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize("local_rank", ["1", "3", None])
def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch, local_rank: str | None) -> None:
    """As far as a machine without GPUs can show it: NCCL, bound to device LOCAL_RANK modulo their number."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    _create_group(cpu=False, timeout=timedelta(seconds=7))
    device = torch.device("cuda", 1)
    assert calls == [device, ("nccl", {"timeout": timedelta(seconds=7), "device_id": device})]


def test_refusals_reach_the_shell(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "training.batch_size=1", processes=2)
    assert done.returncode != 0 and "is less than the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
