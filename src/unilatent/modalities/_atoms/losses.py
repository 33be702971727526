"""Reconstruction losses on tokens of atoms: float32 means over the real atoms, then over the samples.

Weights and units are those of ADiT (Joshi et al. 2025), with two differences. Every sample has the same weight,
whatever its number of atoms, so that the loss does not depend on how a batch is split. Fractional coordinates may be
compared with the nearest periodic image (`frac_loss`). A term that does not apply to a sample is 0 for that sample,
which still counts in the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...maths.denoising import masked_mean
from ...maths.geometry import centre, nearest_image
from ...types import Tokens
from .tokens import TokenFormat

NANOMETRE = 10.0
"""In Angstrom."""


class AtomLossWeights(NamedTuple):
    """Loss weights, and whether fractional differences wrap around.

    types: weight of the cross-entropy in nats; positions: of squared nm; fractional: of squared fractions; lengths: of
    squared Angstrom / N^(1/3); angles: of squared radians. wrapped: take fractional differences to the nearest periodic
    image.
    """

    types: float
    positions: float
    fractional: float
    lengths: float
    angles: float
    wrapped: bool


def loss_terms(
    prediction: Tokens, truth: Tokens, token_format: TokenFormat, weights: AtomLossWeights, has_free: bool
) -> dict[str, Tensor]:
    """Return the weighted scalar loss terms by name. has_free: whether samples may be free, which adds `positions`."""
    mask = truth.layout.mask
    assert mask is not None
    with torch.autocast(prediction.values.device.type, enabled=False):
        values = torch.where(mask[..., None], prediction.values.float(), truth.values)  # padding has no gradient
        lattice_tokens = token_format.lattice_tokens
        predicted = token_format.split(values[:, lattice_tokens:])
        target = token_format.split(truth.values[:, lattice_tokens:])
        atoms = mask[:, lattice_tokens:]
        periodic = mask[:, 0] if token_format.has_periodic else torch.zeros_like(mask[:, 0])
        cross_entropy = -(F.log_softmax(predicted.classes, -1) * target.classes).sum(-1)  # (B, N)
        terms = {"types": weights.types * masked_mean(cross_entropy, atoms)}
        if has_free:
            free_atoms = ~periodic[:, None] & atoms
            error = (
                predicted.positions - centre(predicted.positions, atoms)
                - target.positions + centre(target.positions, atoms)
            )  # fmt: skip
            terms["positions"] = weights.positions * masked_mean((error / NANOMETRE).square(), free_atoms)
        if token_format.has_periodic:
            error = predicted.fractional - target.fractional
            error = nearest_image(error) if weights.wrapped else error
            terms["fractional"] = weights.fractional * masked_mean(error.square(), periodic[:, None] & atoms)
            squares = torch.where(periodic[:, None], (values[:, 0, -6:] - truth.values[:, 0, -6:]).square(), 0.0)
            terms["lengths"] = weights.lengths * squares[:, :3].mean()
            terms["angles"] = weights.angles * squares[:, 3:].mean()
    return terms
