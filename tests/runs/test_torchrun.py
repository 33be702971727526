"""The fault of torch that `processes._rendezvous` mends, reproduced without it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_processes import TORCHRUN, environment, port

WORKER = """
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from unilatent.processes import Processes

again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1", os.environ["RANK"]
if again and rank == "1":
    time.sleep(2)  # the address of its first start is still in the store
try:
    if sys.argv[1] == "ours":
        Processes("cpu", 20)
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(f"START {int(again)} RANK {rank} FAILED {str(error)[:300]!r}", flush=True)
    os._exit(0)
print(f"START {int(again)} RANK {rank} FORMED", flush=True)
os._exit(0 if again else 1)
"""


def starts(tmp_path: Path, how: str) -> list[str]:
    """What the processes of a second start print, by rank."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "--master-addr", "127.0.0.1",
               "--master-port", str(port()), str(tmp_path / "worker.py"), how]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stdout.splitlines() if line.startswith("START")]
    assert any(line.startswith("START 0") and line.endswith("FORMED") for line in lines), done.stderr[-3000:]
    return sorted(line for line in lines if line.startswith("START 1"))


@pytest.mark.faults
def test_restarted_processes_find_each_other(tmp_path: Path) -> None:
    assert starts(tmp_path, "ours") == ["START 1 RANK 0 FORMED", "START 1 RANK 1 FORMED"]


@pytest.mark.faults
def test_torch_alone_still_connects_to_the_dead(tmp_path: Path) -> None:
    """If this fails, torch is mended: delete `_rendezvous` and this file."""
    first, _ = starts(tmp_path, "torch")
    assert first.startswith("START 1 RANK 0 FAILED") and "onnect" in first
