"""How many bytes the weights of a model take by the entropy of their values (UNITE, Sec. 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..maths.coding import description_bits
from ..maths.streams import generator, seed_of
from ..methods.base import LatentModel
from ..sharding import full

GROUPS = ("attention and MLP", "normalisation", "rest")
MATRICES = re.compile(r"\.blocks\.\d+\.(attn|mlp|up|down)\.")
NORMS = re.compile(r"(norm|modulation|film)")


@dataclass(frozen=True)
class Compression:
    """The description length of weights: each tensor's number of values times the entropy of its histogram
    (`maths.coding.description_bits`, 4,096 bins), in MB (10^6 bytes), by network and group.

    trained, initial: of this model, and of the same model as initialised from a seed. gaussian: of as many normal
    numbers, tensor by tensor: tensors that begin as zeros (AdaLN's modulations) take no bits as initialised, and the
    paper's random initialisation is not of zeros. parameters: number of values.
    """

    trained: dict[str, dict[str, float]]
    initial: dict[str, dict[str, float]]
    gaussian: dict[str, dict[str, float]]
    parameters: dict[str, dict[str, int]]

    def total(self, of: dict[str, dict[str, float]]) -> float:
        """Return the MB of all networks and groups."""
        return sum(sum(groups.values()) for groups in of.values())


def compression(model: LatentModel, seed: int = 0) -> Compression:
    """Measure a model's trainable weights; the initial ones are of `seed`, with which no run need have begun."""
    before = torch.get_rng_state()
    try:
        torch.manual_seed(seed_of("init", seed))
        fresh = LatentModel.build(model.config)
    finally:
        torch.set_rng_state(before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Compression(
        _lengths(model, trainable),
        _lengths(fresh, trainable),
        _lengths(fresh, trainable, random=generator("gaussian weights", seed)),
        {network: {group: sum(sizes) for group, sizes in groups.items()} for network, groups in _sizes(model).items()},
    )


def group_of(name: str) -> str:
    """Return the group of a parameter by its name: matrices of attention and MLPs; everything that scales or shifts
    activations; the rest (inputs, outputs, embeddings)."""
    if NORMS.search(name):
        return GROUPS[1]
    return GROUPS[0] if MATRICES.search(f".{name}") else GROUPS[2]


def _lengths(
    model: LatentModel, names: set[str], random: torch.Generator | None = None
) -> dict[str, dict[str, float]]:  # fmt: skip
    """MB of these parameters; with `random`, of normal numbers in their place."""
    found: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        if name in names:
            groups = found.setdefault(name.partition(".")[0], dict.fromkeys(GROUPS, 0.0))
            if random is None:
                values = full(parameter.detach()).cpu()
            else:
                values = torch.randn(parameter.shape, generator=random)
            groups[group_of(name)] += description_bits(values) / 8e6
    return found


def _sizes(model: LatentModel) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups = found.setdefault(name.partition(".")[0], {group: [] for group in GROUPS})
            groups[group_of(name)].append(parameter.numel())
    return found
