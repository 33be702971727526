"""Parameters, gradients and optimizer state cut over the processes (FSDP2), for models that do not fit in one.

What is cut are the blocks that networks repeat, nearly all of a large model; each is put together when it is used. The
rest stays whole in every process, its gradients summed as without sharding. Nothing changes a parameter's name.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..methods.base import LatentModel, ModelConfig, load_weights
from ..nets.layers import Repeated


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Cut every `Repeated` block over `world` processes; gradients become sums over them, as all of ours are.

    The network around its blocks is made their root, with no parameter of its own: its forward fetches them in turn.
    """
    mesh = init_device_mesh(device.type, (world,))
    cut: set[nn.Parameter] = set()
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, Repeated):
            block = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            cut.update(module.parameters())
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    for network in _around_blocks(model):
        fully_shard(network, mesh=mesh, ignored_params={p for p in network.parameters() if p not in cut})


def _around_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules that hold blocks in a list and are no part of a block themselves."""
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
    """Whether this process holds only a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; a whole tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut and placed as `like` is; no process talks to another."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def twin(config: ModelConfig, weights: dict[str, Tensor], device: torch.device, keep: bool) -> LatentModel | None:
    """An unsharded model with these weights, in evaluation mode, in the processes that `keep` it; all must call."""
    full: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = whole(tensor.detach())
        if keep:
            full[name] = tensor.cpu()
    if not keep:
        return None
    with torch.device("meta"):  # no initialisation that the weights would replace
        model = LatentModel.build(config)
    load_weights(model.to_empty(device=device), full, "the weights in training")
    return model.eval()
