"""How far predicted tokens of atoms are from the true ones: means over real atoms, then over samples, in float32.

Weights and units are ADiT's (Joshi et al. 2025), with two departures: every sample counts the same however many atoms
it has, so that cutting a batch changes nothing, and fractional coordinates wrap around (`frac_loss`). What a sample
does not have adds 0 and still counts in the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maths.denoising import masked_mean
from ..maths.geometry import centre, nearest_image
from ..types import Tokens
from .tokens import Format

NANOMETRE = 10.0
"""In Angstrom."""


class Weights(NamedTuple):
    """types: of the cross-entropy in nats; positions: squared nm; fractional: squared fractions; lengths: squared
    Angstrom / N^(1/3); angles: squared radians. wrapped: fractional differences to the nearest image."""

    types: float
    positions: float
    fractional: float
    lengths: float
    angles: float
    wrapped: bool


def terms(prediction: Tokens, truth: Tokens, form: Format, weights: Weights, molecules: bool) -> dict[str, Tensor]:
    """Weighted scalar terms; molecules: whether any sample may be one."""
    mask = truth.layout.mask
    assert mask is not None
    with torch.autocast(prediction.values.device.type, enabled=False):
        values = torch.where(mask[..., None], prediction.values.float(), truth.values)  # padding has no gradient
        own, real = form.split(values[:, form.extra :]), form.split(truth.values[:, form.extra :])
        atoms = mask[:, form.extra :]
        periodic = mask[:, 0] if form.crystals else torch.zeros_like(mask[:, 0])
        surprise = -(F.log_softmax(own.classes, -1) * real.classes).sum(-1)  # (B, N)
        out = {"types": weights.types * masked_mean(surprise, atoms)}
        if molecules:
            free = ~periodic[:, None] & atoms
            error = own.positions - centre(own.positions, atoms) - real.positions + centre(real.positions, atoms)
            out["positions"] = weights.positions * masked_mean((error / NANOMETRE).square(), free)
        if form.crystals:
            error = own.fractional - real.fractional
            error = nearest_image(error) if weights.wrapped else error
            out["fractional"] = weights.fractional * masked_mean(error.square(), periodic[:, None] & atoms)
            squares = torch.where(periodic[:, None], (values[:, 0, -6:] - truth.values[:, 0, -6:]).square(), 0.0)
            out["lengths"] = weights.lengths * squares[:, :3].mean()
            out["angles"] = weights.angles * squares[:, 3:].mean()
    return out
