"""The processes of a run: those that torchrun or `accelerate launch` started, or a single one.

All processes call every collective in the same order: whether to call one never depends on what a single process
decided.
"""

from __future__ import annotations

import copy
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError
from .devices import pick_device
from .heartbeat import Counter, Heartbeat, local_counter

T = TypeVar("T")

BUCKET = 8 * 2**20
"""Numbers in an all-reduce, roughly: small tensors are concatenated up to this size."""

SMALL, TOGETHER = 2**20, 2**24
"""Bytes below which a tensor is broadcast together with others, and bytes of those, about."""


class SharedItems(Generic[T]):
    """Items of work of which this process does some, those that it gets by iterating (`Processes.shared`)."""

    def __init__(self, items: Sequence[T], taken: Counter, done: Counter):
        """taken: counts the items that were taken. done: what `add` counts."""
        self.items, self._taken, self._done = items, taken, done

    def __iter__(self) -> Iterator[T]:
        while (number := self._taken(1) - 1) < len(self.items):
            yield self.items[number]

    def add(self, done: int) -> int:
        """Count what this process has done, in any unit; return what all have done so far."""
        return self._done(done)

    def stop(self) -> None:
        """Leave out the items that no process has taken yet."""
        self._taken(len(self.items))


class Processes:
    """This process among all processes of the run, and the collectives that the library uses.

    The launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Several processes use NCCL, each on GPU
    LOCAL_RANK, or gloo on the CPU. A process group that exists is reused; a single process creates none.
    """

    def __init__(self, device: str | None = None, timeout: float = 1800.0):
        """device: of a single process, None for the default (`pick_device`). Of several, "cpu" selects gloo, and
            anything else NCCL where there are GPUs.
        timeout: seconds after which waiting for another process is an error that ends the job; while it works
            (`working`), seconds without a sign of life.
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
        self.timeout = timedelta(seconds=timeout)
        """Of every collective, in groups of some processes too."""
        self.heartbeat: Heartbeat | None = None
        if self.world > 1 and dist.get_backend() != "fake":  # of a fake group's processes there is only this one
            self.heartbeat = Heartbeat(dist.distributed_c10d._get_default_store(), self.world, timeout)

    @classmethod
    def alone(cls, device: torch.device | None = None) -> Processes:
        """Return this process by itself, whatever other processes its launcher has started."""
        alone = cls.__new__(cls)
        alone.rank, alone.world, alone.is_main, alone.heartbeat = 0, 1, True, None
        alone.device = device or torch.device("cpu")
        alone.timeout = timedelta(seconds=1800)
        return alone

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
        self.broadcast(list(model.state_dict().values()))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors, of the same shapes and types in every process, with those of rank 0.

        Each is one collective; those of less than SMALL bytes are sent together, up to TOGETHER bytes.
        """
        if self.world > 1:
            for group in together(tensors):
                _broadcast(group)

    def gather_on_main(self, item: Any) -> list[Any] | None:
        """Return every process's plain data, by rank, in rank 0; None in all others."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.is_main else None
        dist.gather_object(item, items, dst=0)
        return items

    def working(self) -> AbstractContextManager[None]:
        """The context of long work that other processes wait for in `meet`: it tells them that this one is alive."""
        return nullcontext() if self.heartbeat is None else self.heartbeat.working()

    def meet(self) -> None:
        """Wait until every process has called this, for as long as the others work (`working`): there is no timeout.

        RuntimeError if those that are missing gave no sign of life for the timeout of a collective.
        """
        if self.heartbeat is not None:
            self.heartbeat.meet()

    def shared(self, items: Sequence[T], fixed: bool = False) -> SharedItems[T]:
        """Return items of work, the same list in all processes, each of which is then done by one of them. Collective.

        A process gets the next item when it asks for it, so that a slow one does fewer, and the others wait at the end
        for no more than its last one. fixed: it gets every n-th item instead, whichever process is fast.
        """
        own = items[self.rank :: self.world]
        if self.heartbeat is None:  # a single process, or one of a fake group
            return SharedItems(own, local_counter(), local_counter())
        taken, done = self.heartbeat.counter(), self.heartbeat.counter()
        return SharedItems(own, local_counter(), done) if fixed else SharedItems(items, taken, done)

    def take_turns(
        self, turns: Iterator[object], count: int, stop: Callable[[], bool], company: Callable[[], object] | None = None
    ) -> bool:  # fmt: skip
        """Do this process's `count` turns (batches, say) of work that all share; returns once all have done theirs.

        company: None if the turns of one process do not need the others; then nobody waits for anybody before the end,
            and for as long as it takes. If each turn has collectives, as the forward passes of a sharded model do, all
            processes do their turns side by side, and one that has none left does `company`, with the same
            collectives, and drops its result.
        stop: called after each turn; once it returns True in one process, the work ends.
        Returns whether it did not end so, the same in all processes.
        """
        stopped = False
        if company is None or self.world == 1:
            with self.working():
                for _ in turns:
                    if stopped := stop():
                        break
            self.meet()
            return not self.highest(stopped)
        for turn in range(self.highest(count)):
            if turn < count:
                next(turns)
            else:
                company()
            if self.highest(stop()):
                return False
        return True

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group at the end of a command: all processes wait for each other, then close their
        connections before the interpreter ends."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` in rank 0 while all processes wait. If it fails, all fail with its message."""

        def without_result() -> None:
            work()

        self.from_main(without_result)

    def from_main(self, find: Callable[[], T]) -> T:
        """Run `find` in rank 0 and return its result, plain data, in all processes, which wait however long it takes.

        If it fails, all fail with its message; if it raises ValueError, all others raise ConfigError.
        """
        if self.world == 1:
            return find()
        message: list[Any] = [None, None, False]  # the result, or else the failure and whether it is a ValueError
        error: Exception | None = None
        if self.is_main:
            try:
                with self.working():
                    message[0] = find()
            except Exception as raised:
                error, refused = raised, isinstance(raised, ValueError)
                message[1:] = [str(raised) if refused else f"{type(raised).__name__}: {raised}", refused]
        self.meet()
        dist.broadcast_object_list(message, src=0, device=self.device)
        result, failure, refused = message
        if error is not None:
            raise error
        if failure is not None:
            raise ConfigError(failure) if refused else RuntimeError(f"the first process failed: {failure}")
        return cast(T, result)

    @torch.no_grad()
    def share(self, find: Callable[[], T]) -> T:
        """`from_main` for a network, or a dict that holds some: rank 0 reads their weights, the others receive them.

        Parameters and buffers are broadcast as by `broadcast`, and come to the CPU. Rank 0 gets its own result.
        """
        if self.world == 1:
            return find()
        found: list[T] = []

        def without_weights() -> T:
            found.append(find())
            return copy.deepcopy(found[0], {id(tensor): _hollow(tensor) for tensor in _tensors_of(found[0])})

        result = self.from_main(without_weights)
        result = found[0] if self.is_main else _allocated(result)
        tensors = [tensor for tensor in _tensors_of(result) if tensor.numel()]
        hollow = {id(outline): (outline, tensor) for tensor in tensors for outline in [_hollow(tensor)]}
        for group in together([outline for outline, _ in hollow.values()]):  # alike, whatever device rank 0 has used
            own = [hollow[id(outline)][1] for outline in group]
            sent = [tensor.to(self.device) for tensor in own]
            _broadcast(sent)
            if not self.is_main and self.device.type != "cpu":
                for tensor, received in zip(own, sent, strict=True):
                    tensor.copy_(received)
        return result


def _networks_of(found: Any) -> Iterator[nn.Module]:
    values = found.values() if isinstance(found, dict) else [found]
    return (value for value in values if isinstance(value, nn.Module))


def _tables_of(found: Any) -> Iterator[dict[str, Any]]:
    """Parameters and buffers by name, of each module of the networks in a result of `Processes.share`."""
    for network in _networks_of(found):
        for module in network.modules():
            yield module._parameters
            yield module._buffers


def _tensors_of(found: Any) -> list[Tensor]:
    """Return these parameters and buffers; those that have several names once."""
    tensors = (tensor for table in _tables_of(found) for tensor in table.values() if tensor is not None)
    return list({id(tensor): tensor for tensor in tensors}.values())


def _hollow(tensor: Tensor, device: str = "meta") -> Tensor:
    """Return a tensor or parameter of the same shape, type and attributes, on the meta device without storage."""
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(empty).update(vars(tensor))
    return empty


def _allocated(found: T) -> T:
    """Allocate the weights of networks without storage, on the CPU."""
    made = {id(tensor): (tensor, _hollow(tensor, "cpu")) for tensor in _tensors_of(found)}
    for table in _tables_of(found):
        table.update({name: made[id(tensor)][1] for name, tensor in table.items() if tensor is not None})
    return found


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

    The fault of torch 2.13 that this mends: `init_process_group` takes the store for a new one in every start, but with
    restarts it is the same. It still holds the addresses of processes that no longer exist, and a process that reads
    one before its new owner has written fails to connect, or waits until the timeout (a test reproduces it, and fails
    once torch is mended). TORCHELASTIC_RESTART_COUNT is no prefix, since the agents of several machines count
    differently: only the one whose process died counts.

    Rank 0 generates the prefix. Every other process asks for it with a random token, so that it never reads the answer
    to an earlier start, and then confirms under the prefix; rank 0 returns once all have confirmed.
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


def together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups that are broadcast in one collective: large ones alone, small ones of one type."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if tensor.nbytes >= SMALL:
            yield [tensor]
            continue
        groups.setdefault(kind, []).append(tensor)
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        if sizes[kind] >= TOGETHER:
            yield groups.pop(kind)
            sizes[kind] = 0
    yield from groups.values()


@torch.no_grad()
def _broadcast(group: list[Tensor]) -> None:
    if len(group) == 1 and group[0].is_contiguous():
        dist.broadcast(group[0], src=0)
        return
    flat = torch.cat([tensor.flatten() for tensor in group])
    dist.broadcast(flat, src=0)
    for tensor, sent in zip(group, flat.split([t.numel() for t in group]), strict=True):
        tensor.copy_(sent.view_as(tensor))
