"""Runs a function in several processes of one group (gloo), forked from one fresh interpreter."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

CONTRACTS = Path(__file__).parents[1] / "contracts"


def run_in_ranks(work: str, world: int, out: Path, *arguments: str, local: int | None = None) -> list[object]:
    """Call `work` ("module:function" of this folder) with arguments in each of `world` processes, and return what each
    returned, by rank. local: processes of one machine; None: all."""
    path = os.pathsep.join([str(Path(__file__).parent), str(CONTRACTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, work, str(world), str(local or world), str(out), *arguments]
    extra = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(world)]


def _main(work: str, world: int, local: int, out: Path, arguments: list[str]) -> int:
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(local),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            from unilatent.processes import Processes

            processes = Processes("cpu", 60)
            torch.save(function(processes, *arguments), out / f"rank{rank}.pt")
            processes.leave()
            sys.exit()
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return 0 if not any(codes) else 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:]))
