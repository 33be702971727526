"""EMA weights: exponential moving averages with a constant decay, and with a length that grows with training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..maths.ema_profiles import decay_at, gamma_of
from ..sharding import is_sharded, local


class EMA:
    """EMA weights of the trainable parameters in float32, sharded as these are.

    They start as a copy; after each optimiser step, ema = decay ema + (1 - decay) weight. Frozen parameters are their
    own average.

    frozen: the names of these, which earlier versions stored with the others.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in _trained(model)}
        self.frozen = {name for name, p in model.named_parameters() if not p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take an optimiser step into account."""
        live = [local(p.detach()).float() for _, p in _trained(model)]
        torch._foreach_lerp_([local(average) for average in self.weights.values()], live, 1 - self.decay)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give a model the EMA weights, in evaluation mode, inside the block; each process swaps its own shards."""
        live = {name: _replace(p, self.weights[name]) for name, p in _trained(model)}
        training = model.training
        _forget_gathered(model)
        model.eval()
        try:
            yield
        finally:
            for name, parameter in _trained(model):
                _replace(parameter, live.pop(name))
            _forget_gathered(model)
            model.train(training)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _replace(parameter: nn.Parameter, weights: Tensor) -> Tensor:
    """Give a parameter other weights and return those that it had.

    Those of a shard are copied: FSDP keeps pointers to its memory.
    """
    if not is_sharded(parameter):
        before, parameter.data = parameter.data, weights.to(parameter.dtype)
        return before
    before = parameter.detach().clone()
    local(parameter).copy_(local(weights))
    return before


def _forget_gathered(model: nn.Module) -> None:
    """Let sharded blocks be gathered anew when they are used next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class PowerEMAs:
    """EMA weights under power profiles (`maths.ema_profiles`), from which `unilatent ema` computes other lengths."""

    def __init__(self, model: nn.Module, lengths: Sequence[float]):
        """lengths: sigma_rel of each; empty: none."""
        self.averages = {length: EMA(model, 0.0) for length in lengths}

    def update(self, model: nn.Module, step: int) -> None:
        """Take optimiser step 1, 2, ... into account, also a skipped one, since a profile counts all steps."""
        for length, average in self.averages.items():
            average.decay = decay_at(gamma_of(length), step)
            average.update(model)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All EMA weights, as `LENGTH/NAME`."""
        return {
            f"{length!r}/{name}": tensor
            for length, average in self.averages.items()
            for name, tensor in average.weights.items()
        }

    @property
    def frozen(self) -> set[str]:
        """Names that earlier versions stored: those of parameters that are not trained."""
        return {f"{length!r}/{name}" for length, average in self.averages.items() for name in average.frozen}
