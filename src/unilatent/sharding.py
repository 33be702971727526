"""Parameters, gradients and optimizer state sharded over processes (FSDP2), for models that do not fit in one GPU.

Only the repeated blocks of networks are sharded, nearly all of a large model; each is gathered when it is used. All
other parameters are replicated, with gradients summed as without sharding. Parameter names do not change.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .nets.layers import Repeated


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Shard every `Repeated` block over `world` processes; gradients become sums, not means, over processes.

    The network around the blocks becomes their FSDP root without parameters of its own, so that its forward pass
    prefetches them in turn.
    """
    mesh = init_device_mesh(device.type, (world,))
    sharded: set[nn.Parameter] = set()
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, Repeated):
            block = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo supports
            sharded.update(module.parameters())
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is never modified in place
    for network in _around_blocks(model):
        fully_shard(network, mesh=mesh, ignored_params={p for p in network.parameters() if p not in sharded})


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


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, equal in every process, in the same way as `like`, without communication."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def row_counts(tensor: Tensor) -> list[int]:
    """Return how many rows of a sharded tensor each process has: the last ones may have fewer, or none."""
    assert isinstance(tensor, DTensor)
    rows, world = tensor.shape[0], tensor.device_mesh.size()
    most = -(-rows // world)
    return [max(0, min(most, rows - rank * most)) for rank in range(world)]


class Owners:
    """Matrices of which each process owns some, whole; sharded ones are brought to their owners and back.

    All matrices are on one device. A matrix is named by its position. Each call is at most two collectives, however
    many matrices there are.
    """

    def __init__(self, matrices: Sequence[Tensor]):
        alone = not dist.is_initialized()
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self.device = matrices[0].device
        self.shapes = [matrix.shape for matrix in matrices]
        self.rows = {i: row_counts(matrix) for i, matrix in enumerate(matrices) if is_sharded(matrix)}
        self.sharded = list(self.rows)
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
        mine = self.cut[self.rank]
        sent = torch.cat([shards[i].flatten() for own in self.cut for i in own]).to(dtype)
        found = self._swap(sent, to=[self._size(own, self.rank) for own in self.cut], of=self._sizes(mine))
        pieces = iter(found.split([self._size([i], rank) for rank in range(self.world) for i in mine]))
        parts: dict[int, list[Tensor]] = {i: [] for i in mine}
        for _ in range(self.world):
            for i in mine:
                parts[i].append(next(pieces))
        return {i: torch.cat(parts[i]).view(self.shapes[i]) for i in mine}

    def distribute(self, whole: dict[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """Return every matrix, whole where it is replicated, else this process's rows, from the owners' whole ones."""
        parts: dict[int, Tensor] = {}
        if self.sharded:
            mine = self.cut[self.rank]
            rows = {i: whole[i].split(self.rows[i]) for i in mine}
            pieces = [rows[i][rank].flatten() for rank in range(self.world) for i in mine]
            sent = torch.cat(pieces).to(dtype) if pieces else torch.empty(0, dtype=dtype, device=self.device)
            found = self._swap(sent, to=self._sizes(mine), of=[self._size(own, self.rank) for own in self.cut])
            order = [i for own in self.cut for i in own]
            for i, part in zip(order, found.split([self._size([i], self.rank) for i in order]), strict=True):
                parts[i] = part.view(-1, self.shapes[i][1])
        lengths = [sum(self.shapes[i].numel() for i in own) for own in self.copied]
        if longest := max(lengths):
            own = torch.zeros(longest, dtype=dtype, device=self.device)
            if mine := self.copied[self.rank]:
                torch.cat([whole[i].flatten().to(dtype) for i in mine], out=own[: lengths[self.rank]])
            everything = torch.empty(self.world * longest, dtype=dtype, device=self.device)
            dist.all_gather(list(everything.split(longest)), own)
            for of, flat in zip(self.copied, everything.split(longest), strict=True):
                sizes = [self.shapes[i].numel() for i in of]
                for i, part in zip(of, flat[: sum(sizes)].split(sizes), strict=True):
                    parts[i] = part.view(self.shapes[i])
        return parts

    def _swap(self, sent: Tensor, to: list[int], of: list[int]) -> Tensor:
        """Send `to[r]` numbers to each process r, one after the other, and return `of[r]` numbers of each."""
        found = sent.new_empty(sum(of))
        dist.all_to_all_single(found, sent, of, to)
        return found

    def _size(self, which: Sequence[int], rank: int) -> int:
        return sum(self.rows[i][rank] * self.shapes[i][1] for i in which)

    def _sizes(self, which: Sequence[int]) -> list[int]:
        return [self._size(which, rank) for rank in range(self.world)]
