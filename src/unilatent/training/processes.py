"""The processes of a run, started by torchrun or Accelerate (or the only one): one optimisation, whatever their number.

Every collective is reached by all processes in the same order: none follows a decision that one of them took alone.
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
from accelerate import PartialState
from torch import Tensor, nn

from ..config import ConfigError
from ..devices import pick_device
from .sharding import is_sharded

T = TypeVar("T")

BUCKET = 32 * 2**20
"""Gradients travel in pieces of about so many numbers."""


class Processes:
    """This process among all of them."""

    def __init__(self, device: str | None = None, timeout: float = 1800.0):
        """device: of a single process, None for the best there is; several take the one their launcher gave them.

        timeout: seconds after which waiting for another process is an error that ends the job.
        """
        cpu = device == "cpu" or not torch.cuda.is_available()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
            _meet("gloo" if cpu else "nccl", timedelta(seconds=timeout))
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))
        self.rank, self.world, self.is_main = state.process_index, state.num_processes, state.is_main_process
        self.device = pick_device(device) if self.world == 1 else state.device

    def sum_gradients(self, model: nn.Module) -> None:
        """Each gradient becomes its sum over all processes; what is not finite in one is not finite in all.

        Those of sharded parameters are sums already, made while they were computed.
        """
        self.sum_tensors([p.grad for p in model.parameters() if p.grad is not None and not is_sharded(p.grad)])

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Each of these, alike in shape in every process, becomes its sum over all processes."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def sum(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars under the same names in every process, summed over processes."""
        if self.world == 1 or not numbers:
            return numbers
        total = torch.stack([value.detach().float() for value in numbers.values()])
        dist.all_reduce(total)
        return dict(zip(numbers, total.unbind(), strict=True))

    def highest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, item: Any) -> list[Any]:
        """Every process's plain data, by rank."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def same_weights(self, model: nn.Module) -> None:
        """All processes take the first one's parameters and buffers."""
        if self.world == 1:
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self, code: int = 0) -> None:
        """The end of a command: several processes end together, at once and without C++ destructors, in which gloo's
        threads now and then abort a process whose work is done (one run in eight, measured with torch 2.13)."""
        if self.world > 1:
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def on_main(self, work: Callable[[], object]) -> None:
        """Work that one process does for all, who wait for it; if it fails, all fail, with its message."""

        def silent() -> None:
            work()

        self.from_main(silent)

    def from_main(self, find: Callable[[], T]) -> T:
        """What one process finds out for all: plain data. If it fails, all fail, with its message; what it refuses
        (ConfigError) all refuse."""
        if self.world == 1:
            return find()
        told: list[Any] = [None, None, False]  # what was found, or what went wrong and whether that is a refusal
        error: Exception | None = None
        if self.is_main:
            try:
                told[0] = find()
            except Exception as raised:
                error, refused = raised, isinstance(raised, ConfigError)
                told[1:] = [str(raised) if refused else f"{type(raised).__name__}: {raised}", refused]
        dist.broadcast_object_list(told, src=0, device=self.device)
        found, failure, refused = told
        if error is not None:
            raise error
        if failure is not None:
            raise ConfigError(failure) if refused else RuntimeError(f"the first process failed: {failure}")
        return cast(T, found)


def _meet(backend: str, timeout: timedelta) -> None:
    """The process group, in a corner of torchrun's store that no earlier start of this job has used.

    The store outlives restarts, and with it the addresses of processes that are gone: without this, a restart may wait
    for them for ever (seen with torch 2.13 and gloo). The first process makes the corner's name and tells it to all
    who ask under a name of their own; it goes on once all have answered under the corner's.
    """
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if rank == 0:
        corner, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
        missing = set(range(1, world))
        while missing:
            for other in sorted(missing):
                if store.check([f"ask/{other}"]):
                    store.set(f"told/{store.get(f'ask/{other}').decode()}", corner)
                if store.check([f"{corner}/{other}"]):
                    missing.remove(other)
            if time.monotonic() > until:
                raise TimeoutError(f"processes {sorted(missing)} of {world} did not come within {timeout}")
            time.sleep(0.01)
    else:
        own = uuid.uuid4().hex
        store.set(f"ask/{rank}", own)
        corner = store.get(f"told/{own}").decode()
        store.set(f"{corner}/{rank}", "here")
    dist.init_process_group(
        backend, store=dist.PrefixStore(corner, store), rank=rank, world_size=world, timeout=timeout
    )


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
