"""Time features, and positions as rotations or sinusoids, for any number of axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import linear


class TimeEmbedding(nn.Module):
    """A number per sample to (B, dim): sin | cos of 2 pi t W with frozen W ~ N(0, 1), then Linear, SiLU, Linear."""

    frequencies: Tensor

    def __init__(self, dim: int, num_frequencies: int = 256):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(num_frequencies))
        self.hidden = linear(2 * num_frequencies, dim)
        self.out = linear(dim, dim)
        nn.init.normal_(self.hidden.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies  # (B, F)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, 2F)
        return self.out(F.silu(self.hidden(features)))


def frequencies(count: int, like: Tensor) -> Tensor:
    """10000^(-i / count) for i = 0 .. count - 1, float32."""
    return 10_000.0 ** (-torch.arange(count, device=like.device, dtype=torch.float64) / count).float()


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Positions (..., A) to (..., dim): the channels are split over the axes, last axis first, each [sin | cos].

    On a (row, column) grid the first half of the channels holds the column. Channels that A axes cannot share evenly
    are zero.
    """
    axes = positions.shape[-1]
    angles = positions.flip(-1)[..., None] * frequencies(dim // (2 * axes), positions)  # (..., A, F)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return F.pad(waves, (0, dim - waves.shape[-1]))


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, N, head_dim / 2) that `rotate` uses; the pairs of channels are split over the axes.

    Position 0 rotates nothing, nor are pairs rotated that A axes cannot share evenly. head_dim must be even.
    """
    axes = positions.shape[-1]
    if head_dim % 2:
        raise ValueError(f"head width {head_dim} is odd: rotary positions turn pairs of channels")
    angles = positions[..., None] * frequencies(head_dim // (2 * axes), positions)  # (B, N, A, F)
    angles = F.pad(angles.flatten(-2), (0, head_dim // 2 - axes * angles.shape[-1]))[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, heads, N, d) with channel pairs (2k, 2k + 1) rotated. In float32 on a CPU pairs are complex numbers, which
    lie as one in memory: x needs a contiguous last axis, and even strides of the others.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # one pass in place of six
        return torch.view_as_real(pairs * torch.complex(*(part.float() for part in rotation))).flatten(-2)
    cos, sin = (part.to(x.dtype) for part in rotation)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
