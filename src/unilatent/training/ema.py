"""Moving averages of the weights: the usual one, and those whose length grows with training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..maths.ema_profiles import decay_at, gamma_of
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


class PowerEMAs:
    """Averages under power profiles (`maths.ema_profiles`), from which those of other lengths are made after training.

    lengths: sigma_rel of each; () keeps none.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float]):
        self.averages = {length: EMA(model, 0.0) for length in lengths}

    def update(self, model: nn.Module, step: int) -> None:
        """After step 1, 2, ...; also after one that left the weights as they were, since a profile is of all steps."""
        for length, average in self.averages.items():
            average.decay = decay_at(gamma_of(length), step)
            average.update(model)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All of them under `LENGTH/NAME`."""
        return {
            f"{length!r}/{name}": tensor
            for length, average in self.averages.items()
            for name, tensor in average.weights.items()
        }

    def load(self, weights: dict[str, Tensor], source: Path | str) -> None:
        """What `weights` gave; ValueError naming `source` unless they are this model's under these lengths."""
        check_weights(self.weights, weights, source)
        for length, average in self.averages.items():
            average.load({name: weights[f"{length!r}/{name}"] for name in average.weights}, source)
