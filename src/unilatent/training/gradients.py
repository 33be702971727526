"""Sums of gradients over processes, which travel while the backward pass still computes others.

Parameters are divided into buckets. As soon as all gradients of a bucket are complete, one all-reduce of the whole
bucket starts, and backward goes on. Buckets start in one fixed order, so that all processes call the same collectives
in the same order, whatever happens in a single one.

Why not torch's DistributedDataParallel: it takes a parameter for complete in the one backward pass that follows the
module's `forward`. A step here is several backward passes, one for each part of the loss and one for what lies before a
junction, and there is no single `forward`. It would send nothing before the last of these passes begins, and what gets
no gradient there must be found by a search through the graph in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..processes import BUCKET, Processes
from ..sharding import BlockSums, is_sharded


@dataclass
class Bucket:
    """Parameters whose gradients are summed in one all-reduce, by position.

    missing: how many of them have not got their last gradient of the step yet.
    """

    members: tuple[int, ...]
    missing: int = 0


@dataclass
class _Flight:
    """An all-reduce on its way: the gradients of a bucket one after the other, then for each whether there is one."""

    bucket: Bucket
    flat: Tensor
    work: dist.Work


@dataclass
class GradientSums:
    """Replaces each gradient by its sum over all processes, in every optimiser step.

    In a step, call `start`; `last_micro_batch` before the last one; `next_backward` before each of its backward passes;
    `finish` after them; and `complete` once the host knows the sums of `late` and `unknown` over all processes. Single
    processes need none of it, and nothing happens.

    A gradient is complete when its parameter has got as many contributions in the last micro-batch as in earlier
    steps. The first step, which teaches this, sums everything after its backward passes, and so does every step for
    what did not arrive. The order of the buckets is that in which the first process's gradients were complete. A
    contribution that comes after its bucket has left is summed on its own (`complete`), and expected from then on.

    A parameter without gradient in this process counts as zero where another process has one, and stays without
    gradient where none has. Parameters sharded over processes are summed by FSDP, see `BlockSums`.

    bucket: numbers in a bucket, roughly.
    """

    model: nn.Module
    processes: Processes
    bucket: int = BUCKET
    overlapped: bool = field(default=True, kw_only=True)
    """Whether sums may start before `finish`; for comparison."""

    def __post_init__(self) -> None:
        self.sums_blocks = BlockSums(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad and not is_sharded(p)]
        self.group: dist.ProcessGroup | None = None  # that of all processes
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[int, Bucket] = {}
        self.expected = [0] * len(self.parameters)
        self._reset()
        if self.processes.world == 1:
            return
        if self.sums_blocks.blocks:  # FSDP's collectives are ordered among themselves only
            self.group = dist.new_group(timeout=self.processes.timeout)
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, i))

    def _reset(self) -> None:
        self.listening = False
        self.seen = [0] * len(self.parameters)
        self.order: list[int] = []  # of arrival
        self.flights: list[_Flight] = []
        self.late: dict[int, Tensor] = {}
        self.absent: dict[int, Tensor] = {}

    # ---- the course of a step ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Before the first micro-batch of a step."""
        self._reset()
        self.sums_blocks.start()

    def last_micro_batch(self) -> None:
        """Before the last micro-batch of a step, from which on gradients become complete."""
        self.listening = self.processes.world > 1
        self.sums_blocks.last_micro_batch()
        for bucket in self.buckets:
            bucket.missing = sum(self.expected[i] > 0 for i in bucket.members)

    def next_backward(self) -> None:
        """Before a backward pass."""
        self.sums_blocks.next_backward()

    def finish(self) -> None:
        """After the last backward pass: start what has not started, wait for all sums, and put them into `grad`."""
        self.sums_blocks.finish()
        if self.processes.world == 1:
            return
        self.listening = False
        if not self.buckets:
            self._divide(self.processes.from_main(self._completion_order))
        while len(self.flights) < len(self.buckets):
            self._send(self.buckets[len(self.flights)])
        self.expected = list(map(max, self.expected, self.seen))
        self.late = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        for flight in self.flights:
            for i, summed, present in self._landed(flight):
                self.parameters[i].grad = summed
                if i in self.absent:
                    self.absent[i] = present
        self.flights = []

    def complete(self, late: float, present: list[float]) -> bool:
        """Settle what is rare, and return whether gradients have changed since `finish`.

        late: `len(self.late)`, summed over all processes. present: the values of `self.absent`, which say for each
        parameter without gradient here in how many processes it has one.
        """
        nowhere = {i for i, count in zip(self.absent, present, strict=True) if not count}
        if late:
            first = [p.grad for p in self.parameters]
            for i, parameter in enumerate(self.parameters):
                parameter.grad = self.late.get(i)
            for bucket in self.buckets:
                self._send(bucket)
            for flight in self.flights:
                for i, summed, there in self._landed(flight):
                    before = first[i]
                    self.parameters[i].grad = summed if before is None else before.add_(summed)
                    if i in nowhere and there.item():
                        nowhere.remove(i)
            self.flights = []
        for i in nowhere:
            self.parameters[i].grad = None
        return bool(late)

    # ---- its parts ---------------------------------------------------------------------------------------------------

    def _arrived(self, i: int, parameter: Tensor) -> None:
        """A backward pass has added its contribution to the gradient of parameter i."""
        if not self.listening:
            return
        self.seen[i] += 1
        self.order.append(i)
        if not self.buckets or self.seen[i] != self.expected[i]:
            return
        self.bucket_of[i].missing -= 1
        while self.overlapped and len(self.flights) < len(self.buckets) and not self._next.missing:
            self._send(self._next)

    @property
    def _next(self) -> Bucket:
        return self.buckets[len(self.flights)]

    def _completion_order(self) -> list[int]:
        """All parameters, in the order of their last contributions; then those that got none."""
        last = {i: at for at, i in enumerate(self.order)}
        return sorted(range(len(self.parameters)), key=lambda i: last.get(i, len(self.order)))

    def _divide(self, order: list[int]) -> None:
        """Divide the parameters, in this order, into buckets of one type."""
        members: list[int] = []
        size = 0
        for i in order:
            parameter = self.parameters[i]
            if members and (size >= self.bucket or parameter.dtype != self.parameters[members[0]].dtype):
                self.buckets.append(Bucket(tuple(members)))
                members, size = [], 0
            members.append(i)
            size += parameter.numel()
        if members:
            self.buckets.append(Bucket(tuple(members)))
        self.bucket_of = {i: bucket for bucket in self.buckets for i in bucket.members}

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        """Start the all-reduce of a bucket, and take its gradients off the parameters."""
        of = [self.parameters[i] for i in bucket.members]
        present = torch.ones(len(of), dtype=of[0].dtype, device=of[0].device)
        for at, (i, parameter) in enumerate(zip(bucket.members, of, strict=True)):
            if parameter.grad is None:
                present[at].zero_()
                self.absent.setdefault(i, present[at])
        flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in of), present])
        for parameter in of:
            parameter.grad = None
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        self.flights.append(_Flight(bucket, flat, work))

    def _landed(self, flight: _Flight) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Position, summed gradient, and number of processes that have one, for each parameter of a bucket."""
        flight.work.wait()
        of = [self.parameters[i] for i in flight.bucket.members]
        *sums, present = flight.flat.split([*(p.numel() for p in of), len(of)])
        for at, (i, parameter, summed) in enumerate(zip(flight.bucket.members, of, sums, strict=True)):
            summed = summed.view(parameter.shape)
            if not parameter.is_contiguous():  # channels last: optimizers want gradients laid out as weights
                summed = torch.empty_like(parameter, requires_grad=False).copy_(summed)
            yield i, summed, present[at]
