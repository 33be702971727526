"""What is measured on the steps that are logged: each part's gradient norm, and how far latents spread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..maths.spread import Spread
from ..methods.base import LatentModel, LossPart
from .processes import Processes


class Measurement:
    """Of one optimiser step, over all its micro-batches and processes.

    A part's gradient is what its backward pass hands to each parameter, caught on the way: the gradients that the
    optimizer sees are the same bits, whether measured or not. One copy of the gradients is kept for each part.
    """

    def __init__(self, model: LatentModel, gradients: bool):
        self.model, self.wanted = model, gradients
        self.gradients: dict[str, dict[str, Tensor]] = {}
        self.spread = Spread(model.max_latents, model.latent_channels, model.device)

    @contextmanager
    def of(self, part: LossPart) -> Iterator[None]:
        """Around the backward pass of a part."""
        if part.latents is not None:
            self.spread.add(part.latents, part.latent_mask)
        if not self.wanted:
            yield
            return
        caught = self.gradients.setdefault(part.title, {})
        hooks = [
            parameter.register_hook(lambda gradient, name=name: _catch(caught, name, gradient))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def numbers(self, processes: Processes) -> dict[str, Tensor]:
        """grad_norm/PART for every part, before clipping, and the spread of the latents. Called by all processes."""
        processes.sum_tensors(self.spread.sums)
        found = {f"grad_norm/{name}": self._norm(caught, processes) for name, caught in self.gradients.items()}
        if bool(self.spread.count.max() > 1):
            found |= self.spread.numbers()
        return found

    def _norm(self, caught: dict[str, Tensor], processes: Processes) -> Tensor:
        """Of the sum over processes, whose parts reach the same parameters."""
        tensors = [caught[name] for name, _ in self.model.named_parameters() if name in caught]
        processes.sum_tensors(tensors)
        return torch.nn.utils.get_total_norm(tensors, foreach=True)


def _catch(caught: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    with torch.no_grad():
        if name in caught:
            caught[name] += gradient
        else:
            caught[name] = gradient.detach().clone()
