"""Input layers of token networks: what spans of a token's channels mean, and how each is projected to the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .embeddings import sincos
from .layers import CastLinear, ExactLinear, linear

WAVES = 4
"""Number of frequencies (1, 2, ...) of a periodic number."""


@dataclass(frozen=True)
class TokenField:
    """A span of neighbouring channels, and how it is projected.

    linear: Linear (for one-hot values: a table). smooth: for numbers whose small differences matter (coordinates);
    Linear without bias, SiLU, Linear. periodic: for numbers of period 1; sin and cos of 2 pi k x, k = 1 .. 4, then as
    smooth.

    Smooth and periodic fields are exact: a network reads and returns them in float32, inside autocast too.
    """

    channels: int
    kind: Literal["linear", "smooth", "periodic"] = "linear"

    @property
    def exact(self) -> bool:
        return self.kind != "linear"


class LinearInput(CastLinear):
    """One Linear, for tokens whose channels all mean the same."""

    def forward(self, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """values (B, N, C) -> (B, N, D). positions: unused; attention rotates by them."""
        return super().forward(values)


class ExactLinearInput(ExactLinear):
    """One Linear in float32, for tokens with exact channels that are not projected by meaning, such as noised data."""

    def forward(self, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """values (B, N, C) -> (B, N, D), float32. positions: unused, as in `LinearInput`."""
        return super().forward(values)


class FieldInput(nn.Module):
    """The sum of the projected fields and of sinusoids of the token's position.

    The sinusoids distinguish tokens with equal values, and let latents find the tokens at their position, from the
    first step.
    """

    def __init__(self, fields: Sequence[TokenField], width: int):
        super().__init__()
        self.spans, self.width = [field.channels for field in fields], width
        self.fields = nn.ModuleList([_projection(field, width) for field in fields])

    def forward(self, values: Tensor, positions: Tensor) -> Tensor:
        """values (B, N, C), positions (B or 1, N, A) -> (B, N, D)."""
        h = sincos(positions, self.width)
        for field, span in zip(self.fields, values.split(self.spans, dim=-1), strict=True):
            h = h + field(span)
        return h


class _Waves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., 2 WAVES c)."""
        angles = 2 * math.pi * x.float()[..., None] * torch.arange(1, WAVES + 1, device=x.device)  # (..., c, WAVES)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class _Smooth(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.hidden = ExactLinear(channels, width, bias=False)
        self.out = linear(width, width, exact=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(x)))


def _projection(field: TokenField, width: int) -> nn.Module:
    if field.kind == "linear":
        return CastLinear(field.channels, width)
    if field.kind == "smooth":
        return _Smooth(field.channels, width)
    return nn.Sequential(_Waves(), _Smooth(2 * WAVES * field.channels, width))


def any_exact(fields: Sequence[TokenField]) -> bool:
    """Return whether tokens of these fields have channels that enter and leave a network in float32."""
    return any(field.exact for field in fields)


def token_input(fields: Sequence[TokenField], width: int) -> LinearInput | FieldInput:
    """Build the input layer from tokens (B, N, C) of these fields to width D; for a single linear field, one Linear."""
    if len(fields) == 1 and fields[0].kind == "linear":
        return LinearInput(fields[0].channels, width)
    return FieldInput(fields, width)
