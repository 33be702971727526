"""Seeded weights for FVD's I3D, without a download."""

from __future__ import annotations

import torch
from torch import Tensor

from unilatent.nets.i3d import InflatedInception
from unilatent.pretrained import COUNTER


def seeded_state(seed: int = 0) -> dict[str, Tensor]:
    """Return all tensors of the network by name. Convolutions have Kaiming's scale, so that features differ between
    clips; the four vectors of each norm differ, so that a mix-up of them changes features."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InflatedInception().state_dict().items()}
    stream = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(COUNTER):
            continue
        value = torch.randn(shape, generator=stream)
        if len(shape) == 5:
            value *= (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            value = (0.3 * value).exp()
        elif name.endswith("bn.weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        state[name] = value
    return state
