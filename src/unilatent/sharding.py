"""Parameters, gradients and optimizer state sharded over processes (FSDP2), for models that do not fit in one GPU.

Only the repeated blocks of networks are sharded, nearly all of a large model; each is gathered when it is used. All
other parameters are replicated, with gradients summed as without sharding. Parameter names do not change.
"""

from __future__ import annotations

import warnings

import torch
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
