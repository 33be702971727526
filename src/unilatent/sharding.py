"""Parameters, gradients and optimizer state sharded over processes (FSDP2), for models that do not fit in one GPU.

Only the repeated blocks of networks are sharded, nearly all of a large model; each is gathered when it is used. All
other parameters are replicated, with gradients summed as without sharding. Parameter names do not change.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_leaves

from .config import ConfigError
from .nets.layers import Repeated

Mode = bool | Literal["hybrid"]
"""Over which processes parameters are sharded: false, none; true, all; "hybrid", those of one machine."""


def shards_of(mode: Mode, world: int) -> int:
    """Return how many of `world` processes hold one copy of the sharded parameters together.

    Those of one machine are LOCAL_WORLD_SIZE, which the launcher sets. ConfigError if that is no way to shard.
    """
    if world == 1 or mode != "hybrid":
        return world if mode else 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdigit():
        raise ConfigError(
            "training.shard: hybrid needs LOCAL_WORLD_SIZE, the number of processes on one machine; start with "
            "torchrun, which sets it, or use training.shard=true"
        )
    if int(local) < 2 or world % int(local):
        raise ConfigError(
            f"training.shard: hybrid shards within a machine, but LOCAL_WORLD_SIZE is {local} of {world} processes; "
            "start equally many processes on each machine, at least two, or use training.shard=true"
        )
    return int(local)


def shard(
    model: nn.Module, device: torch.device, mode: Mode, precision: str = "fp32", timeout: timedelta | None = None
) -> None:  # fmt: skip
    """Shard every `Repeated` block over processes (`Mode`); gradients become sums over all processes, not means.

    With "hybrid", each machine holds a copy: blocks are gathered and their gradients reduced within a machine, and
    only the reduced gradients travel between machines. precision "bf16": blocks are gathered in bfloat16, which is
    what they compute in, and half as much to send; gradients are summed in float32, and shards are float32.

    timeout: of the collectives within and between machines; None: torch's own.

    The network around the blocks becomes their FSDP root without parameters of its own, so that its forward pass
    prefetches them in turn.
    """
    world = dist.get_world_size()
    shards = shards_of(mode, world)
    if mode == "hybrid":
        mesh = init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,))
    if timeout is not None:  # a mesh makes groups with torch's default, ten minutes with NCCL
        for dimension in range(mesh.ndim):
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(dimension))
    narrow = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded: set[nn.Parameter] = set()
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, Repeated):
            block = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo supports
            sharded.update(module.parameters())
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is never modified in place
    for network in _around_blocks(model):
        fully_shard(network, mesh=mesh, ignored_params={p for p in network.parameters() if p not in sharded})


class BlockSums:
    """Lets FSDP sum the gradients of sharded blocks once a step, while the last backward pass that reaches them runs.

    FSDP reduces gradients in each backward pass unless told not to, and a step has several (`GradientSums`, which calls
    this). Until then they are collected whole, in float32. Which pass is the last to reach a network is learned from
    the first step, in which all passes of the last micro-batch reduce, and is the same in all processes.
    """

    def __init__(self, model: nn.Module):
        around = [m for m in _around_blocks(model) if isinstance(m, FSDPModule)]
        inner = {id(m) for network in around for m in network.modules() if m is not network}
        self.blocks: list[FSDPModule] = [network for network in around if id(network) not in inner]
        self.last: dict[int, int] = {}  # by network: the last pass that reaches it
        self.open: set[int] = set()  # networks with gradients that have not been reduced
        self.final, self.now = False, -1
        for i, network in enumerate(self.blocks):
            assert isinstance(network, nn.Module)
            network.register_forward_hook(partial(self._watch, i))

    def start(self) -> None:
        """Before the first micro-batch of a step."""
        self.final = False
        self.open.clear()

    def last_micro_batch(self) -> None:
        """Before the last micro-batch of a step."""
        self.final, self.now = True, -1

    def next_backward(self) -> None:
        """Before a backward pass."""
        self.now += 1
        for i, network in enumerate(self.blocks):
            network.set_requires_gradient_sync(self._reduces(i))

    def finish(self) -> None:
        """After the last backward pass. RuntimeError if gradients were left out: a network that the last pass of
        earlier steps reached was not reached."""
        if self.open:
            raise RuntimeError(
                f"training.shard: sharded network {min(self.open)} got no gradient in the backward pass that was its "
                "last one before; resume, which learns the passes anew, or use training.shard=false"
            )

    def _reduces(self, i: int) -> bool:
        return self.final and self.now >= self.last.get(i, 0)

    def _watch(self, i: int, network: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._reached, i))

    def _reached(self, i: int, gradient: Tensor) -> None:
        """A backward pass has come to the output of network i."""
        if self._reduces(i):
            self.open.discard(i)
            self.last[i] = self.now
        else:
            self.open.add(i)


def _around_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have blocks in a ModuleList and are not inside a block."""
    inside = {id(inner) for block in model.modules() if isinstance(block, Repeated) for inner in block.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside
        and any(
            isinstance(child, nn.ModuleList) and any(isinstance(block, Repeated) for block in child)
            for child in module.children()
        )
    ]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process has only a shard of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, which shares memory; an unsharded tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; a collective call. An unsharded tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this process's shard, and where it begins in the full tensor, in each dimension."""
    assert isinstance(tensor, DTensor)
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def sharding_mesh(tensor: Tensor) -> DeviceMesh:
    """Return the one-dimensional mesh of the processes that hold one copy of a sharded tensor, this one among them."""
    assert isinstance(tensor, DTensor)
    (dim,) = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    mesh = tensor.device_mesh
    return mesh if mesh.ndim == 1 else mesh[(mesh.mesh_dim_names or ())[dim]]


def row_counts(tensor: Tensor) -> list[int]:
    """Return how many rows of a sharded tensor each process of its mesh has: the last ones may have fewer, or none."""
    rows, shards = tensor.shape[0], sharding_mesh(tensor).size()
    most = -(-rows // shards)
    return [max(0, min(most, rows - rank * most)) for rank in range(shards)]


class Owners:
    """Matrices of which each process owns some, whole; sharded ones are brought to their owners and back.

    All matrices are on one device. A matrix is named by its position. Sharded matrices take one collective each way,
    however many there are, and replicated ones a broadcast of each process that owns some. Where each machine holds a
    copy (hybrid), an owner gets its matrices from its own machine, and its results go to all.
    """

    def __init__(self, matrices: Sequence[Tensor]):
        alone = not dist.is_initialized()
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self.device = matrices[0].device
        self.shapes = [matrix.shape for matrix in matrices]
        self.rows = {i: row_counts(matrix) for i, matrix in enumerate(matrices) if is_sharded(matrix)}
        self.sharded = list(self.rows)
        self.shards = len(self.rows[self.sharded[0]]) if self.sharded else 1
        """Processes that hold one copy; those of ranks 0 to shards - 1 hold the first, and so on."""
        self.cut: list[list[int]] = []  # by owner, the sharded ones
        self.copied: list[list[int]] = []  # by owner, the replicated ones

    def assign(self, owner: dict[int, int]) -> None:
        """Say which process owns which matrix, alike in all processes."""
        by_owner = [[i for i in range(len(self.shapes)) if owner[i] == rank] for rank in range(self.world)]
        self.cut = [[i for i in own if i in self.rows] for own in by_owner]
        self.copied = [[i for i in own if i not in self.rows] for own in by_owner]

    def collect(self, shards: dict[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """Return this process's own sharded matrices, whole, from all processes' shards (rows, n)."""
        if not self.sharded:
            return {}
        mine, near = self.cut[self.rank], self._near
        pieces = [shards[i].flatten() for rank in near for i in self.cut[rank]]
        sent = torch.cat(pieces).to(dtype) if pieces else torch.empty(0, dtype=dtype, device=self.device)
        to = [self._size(own, self.rank) if rank in near else 0 for rank, own in enumerate(self.cut)]
        of = [self._size(mine, rank) if rank in near else 0 for rank in range(self.world)]
        found = iter(self._swap(sent, to, of).split([self._size([i], rank) for rank in near for i in mine]))
        parts: dict[int, list[Tensor]] = {i: [] for i in mine}
        for _ in near:
            for i in mine:
                parts[i].append(next(found))
        return {i: torch.cat(parts[i]).view(self.shapes[i]) for i in mine}

    def distribute(self, whole: dict[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """Return every matrix, whole where it is replicated, else this process's rows, from the owners' whole ones."""
        parts: dict[int, Tensor] = {}
        if self.sharded:
            mine = self.cut[self.rank]
            rows = {i: whole[i].split(self.rows[i]) for i in mine}
            pieces = [rows[i][rank % self.shards].flatten() for rank in range(self.world) for i in mine]
            sent = torch.cat(pieces).to(dtype) if pieces else torch.empty(0, dtype=dtype, device=self.device)
            to = [self._size(mine, rank) for rank in range(self.world)]
            found = self._swap(sent, to, of=[self._size(own, self.rank) for own in self.cut])
            order = [i for own in self.cut for i in own]
            for i, part in zip(order, found.split([self._size([i], self.rank) for i in order]), strict=True):
                parts[i] = part.view(-1, self.shapes[i][1])
        lengths = [sum(self.shapes[i].numel() for i in own) for own in self.copied]
        everything = torch.empty(sum(lengths), dtype=dtype, device=self.device)
        broadcasts = []
        for rank, (own, flat) in enumerate(zip(self.copied, everything.split(lengths), strict=True)):
            if not own:
                continue  # few of many processes own any
            if rank == self.rank:
                torch.cat([whole[i].flatten().to(dtype) for i in own], out=flat)
            broadcasts.append(dist.broadcast(flat, src=rank, async_op=True))
            for i, part in zip(own, flat.split([self.shapes[i].numel() for i in own]), strict=True):
                parts[i] = part.view(self.shapes[i])
        for broadcast in broadcasts:
            broadcast.wait()
        return parts

    def _swap(self, sent: Tensor, to: list[int], of: list[int]) -> Tensor:
        """Send `to[r]` numbers to each process r, one after the other, and return `of[r]` numbers of each."""
        found = sent.new_empty(sum(of))
        dist.all_to_all_single(found, sent, of, to)
        return found

    @property
    def _near(self) -> range:
        """The processes that hold a copy together with this one."""
        first = self.rank - self.rank % self.shards
        return range(first, first + self.shards)

    def _size(self, which: Sequence[int], rank: int) -> int:
        """Numbers that a process holds of these matrices."""
        return sum(self.rows[i][rank % self.shards] * self.shapes[i][1] for i in which)
