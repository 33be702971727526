"""EMA weights: exponential moving averages with a constant decay, and with a length that grows with training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..maths.ema_profiles import decay_at, gamma_of
from ..model_folder import check_weights
from ..sharding import local, shard_like


class EMA:
    """EMA weights of the trainable parameters in float32, sharded as these are.

    They start as a copy; after each optimiser step, ema = decay ema + (1 - decay) weight. Frozen parameters are their
    own average.
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
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give a model that is not sharded the EMA weights, in evaluation mode, inside the block."""
        live = {name: p.data for name, p in _trained(model)}
        training = model.training
        for name, parameter in _trained(model):
            parameter.data = self.weights[name].to(parameter.dtype)
        model.eval()
        try:
            yield
        finally:
            for name, parameter in _trained(model):
                parameter.data = live[name]
            model.train(training)

    def load(self, weights: dict[str, Tensor], source: Path | str = "EMA weights") -> None:
        """Load EMA weights; ValueError names `source` if they are not this model's.

        Those of frozen parameters, which earlier versions stored, are left out.
        """
        weights = {name: tensor for name, tensor in weights.items() if name not in self.frozen}
        check_weights(self.weights, weights, source)
        for name, average in self.weights.items():
            average.copy_(shard_like(weights[name], average))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


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

    def load(self, weights: dict[str, Tensor], source: Path | str) -> None:
        """Load what `weights` returned; ValueError names `source` if the model or the lengths differ.

        Those of frozen parameters are left out, as in `EMA.load`.
        """
        frozen = {f"{length!r}/{name}" for length, average in self.averages.items() for name in average.frozen}
        weights = {name: tensor for name, tensor in weights.items() if name not in frozen}
        check_weights(self.weights, weights, source)
        for length, average in self.averages.items():
            average.load({name: weights[f"{length!r}/{name}"] for name in average.weights}, source)
