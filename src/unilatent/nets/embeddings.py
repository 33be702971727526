"""Time embeddings, and rotary and sinusoidal position embeddings for any number of axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import branches
from .layers import linear


class TimeEmbedding(nn.Module):
    """Times (B,) to (B, dim): [sin | cos] of 2 pi t W with frozen W ~ N(0, 1), then Linear, SiLU, Linear."""

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
    """Return 10000^(-i / count) for i = 0 .. count - 1, float32, on the device of `like`."""
    return 10_000.0 ** (-torch.arange(count, device=like.device, dtype=torch.float64) / count).float()


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Return sinusoids (..., dim) of positions (..., A): channels are split over the axes, last axis first, each
    [sin | cos].

    On a (row, column) grid the first half of the channels encodes the column. Remaining channels, when A axes do not
    divide them, are zero.
    """
    axes = positions.shape[-1]
    angles = positions.flip(-1)[..., None] * frequencies(dim // (2 * axes), positions)  # (..., A, F)
    sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return F.pad(sinusoids, (0, dim - sinusoids.shape[-1]))


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return cos and sin (B, 1, N, head_dim) for `rotate`; pairs of channels are split over the A axes.

    Both channels of a pair have its cosine; the first has minus its sine, the second its sine. Position 0 rotates
    nothing. Remaining pairs, when A axes do not divide them, are not rotated. ValueError if head_dim is odd.
    """
    axes = positions.shape[-1]
    if head_dim % 2:
        raise ValueError(f"head width {head_dim} is odd, but rotary embeddings rotate pairs of channels; change heads")
    angles = positions[..., None] * frequencies(head_dim // (2 * axes), positions)  # (B, N, A, F)
    angles = F.pad(angles.flatten(-2), (0, head_dim // 2 - axes * angles.shape[-1]))[:, None]
    cos, sin = angles.cos(), angles.sin()
    parts = torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return parts[0].to(dtype), parts[1].to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (2k, 2k + 1) of x (B, heads, N, d) by the angles of `rotary`."""
    if branches.on_eager_cpu(x) and x.dtype == torch.float32:
        return rotate_complex(x, rotation)
    return rotate_real(x, *(part.to(x.dtype) for part in rotation))


def rotate_complex(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` by complex products: one pass over memory instead of three.

    A pair is read as one complex number, so x needs a contiguous last axis and even strides of the others.
    """
    cos, sin = (part.float() for part in rotation)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos[..., ::2], sin[..., 1::2])).flatten(-2)


def rotate_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by real products, in the type of x."""
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, exchanged, sin)


def by_halves(x: Tensor) -> bool:
    """Whether to rotate queries and keys like x in the order of `halves`; this changes no attention weight."""
    return branches.on_eager() and not (branches.on_cpu(x) and x.dtype == torch.float32)


def halves(pairs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return pairs of channels (..., d / 2, 2) as (..., d): the first channels of all pairs, then the second ones."""
    return pairs.transpose(-1, -2).to(dtype=dtype or pairs.dtype, memory_format=torch.contiguous_format).flatten(-2)


def rotate_halves(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` in the order of `halves`, for input and output: no copy of x with exchanged channels."""
    cos, sin = (part[..., None, 1::2].to(x.dtype) for part in rotation)  # (B, 1, N, 1, d / 2)
    return EagerHalfRotation.apply(x, cos, sin)


class EagerHalfRotation(torch.autograd.Function):
    """`rotate_halves`; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate the halves of x (B, heads, N, d), back if sign is -1."""
    parts = x.unflatten(-1, (2, -1))
    out = parts * cos  # (B, heads, N, 2, d / 2)
    out[..., :1, :].addcmul_(parts[..., 1:, :], sin, value=-sign)
    out[..., 1:, :].addcmul_(parts[..., :1, :], sin, value=sign)
    return out.flatten(-2)
