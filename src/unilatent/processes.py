"""The processes of a run: those that torchrun or `accelerate launch` started, or a single one.

All processes call every collective in the same order: whether to call one never depends on what a single process
decided.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError
from .devices import pick_device
from .sharding import is_sharded

T = TypeVar("T")

BUCKET = 32 * 2**20
"""Elements of an all-reduce, roughly: small gradients are concatenated up to this size."""


class Processes:
    """This process among all processes of the run, and the collectives that the library uses.

    The launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Several processes use NCCL, each on GPU
    LOCAL_RANK, or gloo on the CPU. A process group that exists is reused; a single process creates none.
    """

    def __init__(self, device: str | None = None, timeout: float = 1800.0):
        """device: of a single process, None for the default (`pick_device`). Of several, "cpu" selects gloo, and
            anything else NCCL where there are GPUs.
        timeout: seconds after which waiting for another process is an error that ends the job.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            _create_group(device == "cpu" or not torch.cuda.is_available(), timedelta(seconds=timeout))
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.is_main = self.rank == 0
        if self.world == 1:
            self.device = pick_device(device)
        elif dist.get_backend() == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            self.device = torch.device("cpu")

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its sum over all processes. NaN or infinity in one process reaches all of them.

        FSDP has already summed the gradients of sharded parameters during the backward pass.
        """
        self.sum_tensors([p.grad for p in model.parameters() if p.grad is not None and not is_sharded(p.grad)])

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, of the same shape in every process, by its sum over all processes."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def sum(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scalars, which have the same names in every process, summed over all processes."""
        if self.world == 1 or not numbers:
            return numbers
        total = torch.stack([value.detach().float() for value in numbers.values()])
        dist.all_reduce(total)
        return dict(zip(numbers, total.unbind(), strict=True))

    def highest(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, item: Any) -> list[Any]:
        """Return every process's plain data, by rank."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def same_weights(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to all processes."""
        if self.world == 1:
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.world > 1:
            dist.barrier()

    def leave(self, code: int = 0) -> None:
        """End a command. Several processes wait for each other, then exit without running C++ destructors: in these,
        gloo's threads sometimes abort a process that has finished (one run in eight, measured with torch 2.13)."""
        if self.world > 1:
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` in rank 0 while all processes wait. If it fails, all fail with its message."""

        def without_result() -> None:
            work()

        self.from_main(without_result)

    def from_main(self, find: Callable[[], T]) -> T:
        """Run `find` in rank 0 and return its result, plain data, in all processes.

        If it fails, all fail with its message; if it raises ConfigError, all raise ConfigError.
        """
        if self.world == 1:
            return find()
        message: list[Any] = [None, None, False]  # the result, or else the failure and whether it is a ConfigError
        error: Exception | None = None
        if self.is_main:
            try:
                message[0] = find()
            except Exception as raised:
                error, refused = raised, isinstance(raised, ConfigError)
                message[1:] = [str(raised) if refused else f"{type(raised).__name__}: {raised}", refused]
        dist.broadcast_object_list(message, src=0, device=self.device)
        result, failure, refused = message
        if error is not None:
            raise error
        if failure is not None:
            raise ConfigError(failure) if refused else RuntimeError(f"the first process failed: {failure}")
        return cast(T, result)


def _create_group(cpu: bool, timeout: timedelta) -> None:
    """Create the default process group from the launcher's environment, and choose this process's device."""
    rank = int(os.environ.get("RANK", "0"))
    device = None
    if cpu:
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it; otherwise every process would use all cores
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, torch.get_num_threads() // local_world))
    else:  # modulo: a scheduler may make only one GPU visible to each process
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "gloo" if cpu else "nccl"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world = _rendezvous(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device)


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return torchrun's store under a key prefix that no earlier start of this job has used, the rank and the world.

    The store outlives restarts, and with it the addresses of processes that no longer exist: without a new prefix, a
    restarted process may wait for them for ever (seen with torch 2.13 and gloo). Rank 0 generates the prefix. Every
    other process asks for it with a random token, so that it never reads the answer to an earlier start, and then
    confirms under the prefix; rank 0 returns once all have confirmed.
    """
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if rank == 0:
        prefix, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
        missing = set(range(1, world))
        while missing:
            for other in sorted(missing):
                if store.check([f"request/{other}"]):
                    store.set(f"reply/{store.get(f'request/{other}').decode()}", prefix)
                if store.check([f"{prefix}/{other}"]):
                    missing.remove(other)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {sorted(missing)} of {world} did not join within {timeout}")
            time.sleep(0.01)
    else:
        token = uuid.uuid4().hex
        store.set(f"request/{rank}", token)
        prefix = store.get(f"reply/{token}").decode()
        store.set(f"{prefix}/{rank}", "joined")
    return dist.PrefixStore(prefix, store), rank, world


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
