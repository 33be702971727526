"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..methods.base import check_weights
from .sharding import local, spread


class EMA:
    """Starts as a copy, cut over processes as the weights are; after each optimiser step,
    ema = decay ema + (1 - decay) weight, in float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        live = [local(p.detach()).float() for p in model.parameters()]
        torch._foreach_lerp_([local(own) for own in self.weights.values()], live, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """A model that is not sharded, with averaged weights and in evaluation mode, inside the block."""
        live = {name: p.data for name, p in model.named_parameters()}
        training = model.training
        for name, parameter in model.named_parameters():
            parameter.data = self.weights[name].to(parameter.dtype)
        model.eval()
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = live[name]
            model.train(training)

    def load(self, weights: dict[str, Tensor], source: Path | str = "averaged weights") -> None:
        """ValueError naming `source` unless they are this model's."""
        check_weights(self.weights, weights, source)
        for name, own in self.weights.items():
            own.copy_(spread(weights[name], own))
