"""Muon and AdamW for different parameters of one model, used as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..nets.layers import muon_parameters
from ..sharding import is_sharded, local, sharding_mesh
from ..tensor_files import StoredTensor
from .config import OptimizerConfig
from .muon import Muon


class Optimizers:
    """The optimisers of a model; one factor scales all their learning rates."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        matrices = list(muon_parameters(model)) if config.muon else []
        chosen = {id(parameter) for parameter in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        rate = config.peak
        self.all: list[Optimizer] = []
        for sharded in (False, True):  # a fused update takes sharded or plain tensors, not both
            if parameters := [p for p in others if is_sharded(p) == sharded]:
                self.all.append(
                    AdamW(
                        parameters, lr=rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
                        fused=True,
                    )
                )  # fmt: skip
        if matrices:
            self.all.append(
                Muon(
                    matrices, lr=config.muon_learning_rate or rate, momentum=config.momentum, eps=config.muon_eps,
                    weight_decay=config.weight_decay, precision=config.muon_precision,
                )
            )  # fmt: skip
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.all]

    def set_factor(self, factor: float) -> None:
        """Set each learning rate to `factor` times its peak."""
        for optimizer, peak in zip(self.all, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: "parameter name|state name" -> tensor, sharded as the parameter is."""
        return {
            f"{self.names[id(parameter)]}|{key}": value
            for optimizer in self.all
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of the state after a step: two moments for AdamW, one for Muon."""
        return self.state_bytes_of(lambda parameter: 1.0)

    def state_bytes_of(self, share: Callable[[Tensor], float]) -> int:
        """Return the bytes of the state if this process holds only that share of each parameter."""
        return sum(
            round(p.nbytes * share(p)) * (1 if isinstance(optimizer, Muon) else 2)
            for optimizer in self.all
            for p in optimizer.param_groups[0]["params"]
        )

    def temporary_bytes(self, world: int, sharded: Callable[[Tensor], bool]) -> int:
        """Return about how many bytes one of `world` processes allocates and frees again in a step.

        sharded: whether a parameter is going to be sharded over them. AdamW, fused, allocates nothing.
        """
        return max([o.temporary_bytes(world, sharded) for o in self.all if isinstance(o, Muon)], default=0)

    def flop(self, world: int) -> int:
        """Return the floating-point operations of a step in the one of `world` processes that has most of them.

        Counted are the matrix products of Muon; AdamW has none.
        """
        return max([o.flop(world) for o in self.all if isinstance(o, Muon)], default=0)

    def allocate(self, stored: Mapping[str, Tensor | StoredTensor], source: Path | str) -> dict[str, Tensor]:
        """Replace the state by empty tensors for what `state` returned, and return these by name, to be filled.

        stored: the tensors of `state`, or their shapes and types. Those of a sharded parameter's shape are sharded like
        it. ValueError names `source` and an entry of another model.
        """
        entries: dict[str, dict[str, Tensor | StoredTensor]] = {}
        for key, value in stored.items():
            name, _, entry = key.rpartition("|")
            entries.setdefault(name, {})[entry] = value
        for optimizer in self.all:
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.state[parameter] = {}
                for key, value in entries.pop(self.names[id(parameter)], {}).items():
                    if not value.is_floating_point() or value.shape not in (parameter.shape, ()):
                        raise ValueError(
                            f"{source}: {key} of {self.names[id(parameter)]} is {value.dtype} {tuple(value.shape)}; "
                            "use an older checkpoint"
                        )
                    optimizer.state[parameter][key] = (
                        torch.empty_like(parameter.detach(), dtype=value.dtype)
                        if value.shape
                        else torch.empty((), dtype=value.dtype, device=parameter.device)
                    )
        if entries:
            raise ValueError(f"{source}: {next(iter(entries))!r:.80} is no trainable parameter of this model")
        return self.state()


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the global norm of the gradients, a scalar that is the same in every process; a collective call."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)], foreach=True)
    if parts := [g for g in gradients if is_sharded(g)]:
        squares = torch.nn.utils.get_total_norm([local(g) for g in parts], foreach=True).square()
        dist.all_reduce(squares, group=sharding_mesh(parts[0]).get_group())
        norm = (squares + norm.to(squares.device).square()).sqrt()
    return norm


def clip_gradients(model: nn.Module, largest: float | None, norm: Tensor | None = None) -> Tensor:
    """Clip gradients to the global norm `largest` (None: no clipping), and return the norm before.

    norm: what `gradient_norm` returned for these gradients, if it is known.
    """
    norm = gradient_norm(model) if norm is None else norm
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if largest is not None and gradients:
        torch._foreach_mul_(gradients, torch.clamp(largest / (norm + 1e-6), max=1.0))
    return norm
