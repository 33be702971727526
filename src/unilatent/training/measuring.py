"""Measurements of the logged steps: the gradient norm of each part of the loss, and the spread of the latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..maths.spread import Spread
from ..methods.base import LatentModel, LossPart
from ..processes import Processes


class Measurement:
    """Measures one optimiser step, over all its micro-batches and processes.

    Hooks on the parameters collect the gradient of each part during its backward pass, so the gradients that the
    optimiser reads are bitwise the same with and without measuring. What lies before a junction is differentiated once
    more for each part. Holds one copy of the gradients per part.
    """

    def __init__(self, model: LatentModel, gradients: bool):
        """gradients: whether to measure gradient norms."""
        self.model, self.wanted = model, gradients
        self.gradients: dict[str, dict[str, Tensor]] = {}
        self.spread = Spread(model.max_latents, model.latent_channels, model.device)
        self.samples = 0  # of this process

    @contextmanager
    def of(self, part: LossPart) -> Iterator[None]:
        """Measure a part of the loss, whose backward pass runs inside the block."""
        if part.latents is not None:
            self.spread.add(part.latents, part.latent_mask)
            self.samples += len(part.latents)
        if not self.wanted:
            yield
            return
        caught = self.gradients.setdefault(part.title, {})
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        hooks = [
            parameter.register_hook(lambda gradient, name=name: _catch(caught, name, gradient))
            for name, parameter in parameters.items()
        ]
        arrived: list[Tensor] = []
        if part.junction is not None and part.junction.leaf.requires_grad:
            hooks.append(part.junction.leaf.register_hook(arrived.append))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if arrived and part.junction is not None:
            before = part.junction.gradients(arrived[0], list(parameters.values()))
            for name, gradient in zip(parameters, before, strict=True):
                if gradient is not None:
                    _catch(caught, name, gradient)

    def numbers(self, processes: Processes) -> dict[str, Tensor]:
        """Return grad_norm/PART for each part, before clipping, and the spread of the latents; a collective call."""
        processes.sum_tensors(self.spread.sums)
        numbers = {f"grad_norm/{name}": self._norm(caught, processes) for name, caught in self.gradients.items()}
        if self.samples > 1 or processes.world > 1:  # every sample has a first latent
            numbers |= self.spread.numbers()
        return numbers

    def _norm(self, caught: dict[str, Tensor], processes: Processes) -> Tensor:
        """Norm of the sum over processes; a part reaches the same parameters in each."""
        tensors = [caught[name] for name, _ in self.model.named_parameters() if name in caught]
        processes.sum_tensors(tensors)
        return torch.nn.utils.get_total_norm(tensors, foreach=True)


def _catch(caught: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    with torch.no_grad():
        if name in caught:
            caught[name] += gradient
        else:
            caught[name] = gradient.detach().clone()
