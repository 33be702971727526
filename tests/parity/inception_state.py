"""Seeded weights for the FID InceptionV3, equal on every machine, without a download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unilatent.nets.inception import Network
from unilatent.pretrained import COUNTER


def seeded_state() -> dict[str, Tensor]:
    """Return the official file's 566 tensors, filled from NumPy's frozen Mersenne Twister in sorted order of names.

    Convolutions have Kaiming's scale, so that features differ between images. The four vectors of each batch norm
    differ, so that a mix-up of them, or another eps, changes features.
    """
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Network().state_dict().items()}
    random = np.random.RandomState(0)
    state = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(COUNTER):
            state[name] = torch.zeros((), dtype=torch.long)
            continue
        value = random.standard_normal(shape)
        if len(shape) == 4:
            value *= np.sqrt(2 / np.prod(shape[1:]))
        elif name == "fc.weight":
            value *= 8 / np.sqrt(shape[1])
        elif name.endswith("running_var"):
            value = np.exp(0.3 * value)
        elif name.endswith("bn.weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def images() -> dict[str, Tensor]:
    """Return four images (1, 3, H, W) uint8 by formula: small, not square, larger than the network's input, uniform."""
    found = {}
    for name, (height, width) in {"small": (32, 32), "wide": (64, 96), "large": (320, 310)}.items():
        y, x, c = torch.meshgrid(*(torch.arange(n) for n in (height, width, 3)), indexing="ij")
        found[name] = ((x * (3 + c) + y * y * (2 - c) + 17 * c * (x // 8 + y // 8)) % 256).permute(2, 0, 1)[None]
    found["flat"] = torch.tensor([200, 90, 10]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    return {name: image.to(torch.uint8).contiguous() for name, image in found.items()}
