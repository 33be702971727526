"""Two transformers: one modulated by time and condition, one plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Conditioning, Layout
from .attention import Attention, join_masks
from .embeddings import TimeEmbedding, rotary
from .layers import Repeated, RMSNorm, SwiGLU, gate, in_compute_dtype, linear, modulate, zero_init


class Block(Repeated):
    """AdaLN-zero block: attention and SwiGLU on RMS-normalised, modulated tokens, gated residuals.

    block_norm: RMSNorm of the residual stream after every block (UNITE; Table 7 "no block norm" is False).
    dropout: of both branches' outputs, in training; drawn from torch's global generator.
    """

    def __init__(self, dim: int, heads: int, block_norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=True, xavier=True)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))
        self.norm3 = RMSNorm(dim) if block_norm else nn.Identity()
        self.modulation = zero_init(linear(dim, 6 * dim))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, c: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """h (B, N, D), c (B, D), mask (B, N)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)  # (B, D) each
        h = gate(
            h, self.dropout(self.attn(modulate(self.norm1(h), shift1, scale1), rotation, mask)), gate1
        )  # (B, N, D)
        h = gate(h, self.dropout(self.mlp(modulate(self.norm2(h), shift2, scale2))), gate2)
        return self.norm3(h)


class Transformer(nn.Module):
    """(values, layout, time, cond) -> values: a stack of `Block`s over tokens that are already D wide.

    in_context_tokens: that many tokens, the condition vector plus a learned position, join before block
        `in_context_start` and leave after the last one; their rotary position is 0, the others' do not move.
    reads_tokens: condition tokens, D wide, join and leave with them, at position 0 as well (their order is the
        condition's to tell); without it there must be none.
    out_channels: width of the modulated, linear output.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        out_channels: int,
        in_context_tokens: int = 0,
        in_context_start: int = 0,
        block_norm: bool = True,
        dropout: float = 0.0,
        reads_tokens: bool = False,
        time_frequencies: int = 256,
    ):
        super().__init__()
        self.joins = bool(in_context_tokens) or reads_tokens
        if self.joins and not 0 <= in_context_start < depth:
            raise ValueError(f"in_context_start {in_context_start} is not a block; depth is {depth}")
        self.head_dim = dim // heads
        self.in_context_tokens, self.in_context_start = in_context_tokens, in_context_start
        self.reads_tokens = reads_tokens
        self.time = TimeEmbedding(dim, time_frequencies)
        self.blocks = nn.ModuleList([Block(dim, heads, block_norm, dropout) for _ in range(depth)])
        self.out_norm = RMSNorm(dim)
        self.out_modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.out = zero_init(nn.Linear(dim, out_channels))
        if in_context_tokens:
            self.in_context = nn.Parameter(torch.randn(1, in_context_tokens, dim) * 0.02)

    def forward(self, h: Tensor, layout: Layout, time: Tensor, cond: Conditioning) -> Tensor:
        """h (B, N, D), positions (B or 1, N, A), time (B,) as the path's `feature` -> (B, N, out_channels)."""
        assert (cond.tokens is not None) == self.reads_tokens, "built for another kind of condition"
        cond = cond.trimmed()
        h, c = in_compute_dtype(h), in_compute_dtype(self.time(time) + cond.vector)  # (B, N, D), (B, D)
        positions, mask, prefix = layout.positions, layout.mask, 0
        rotation = rotary(positions, self.head_dim)
        for i, block in enumerate(self.blocks):
            if self.joins and i == self.in_context_start:
                first, first_mask = self._first(cond)  # (B, P, D)
                prefix = first.shape[1]
                mask = join_masks(first_mask, mask, prefix, h.shape[1])
                h = torch.cat([first.to(h.dtype), h], dim=1)  # (B, P + N, D)
                rotation = rotary(F.pad(positions, (0, 0, prefix, 0)), self.head_dim)
            h = block(h, c, rotation, mask)
        shift, scale = self.out_modulation(F.silu(c)).chunk(2, dim=-1)
        return self.out(modulate(self.out_norm(h[:, prefix:]), shift, scale))

    def look_ahead(self, offset: int, reach: int) -> None:
        """See `Attention.look_ahead`: in every block."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.look_ahead(offset, reach)

    def _first(self, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """What joins the sequence, and its mask: condition tokens, then copies of the vector."""
        own = cond.vector[:, None] + self.in_context if self.in_context_tokens else None  # (B, P, D)
        if cond.tokens is None:
            assert own is not None
            return own, None
        if own is None:
            return cond.tokens, cond.mask
        mask = join_masks(cond.mask, None, cond.tokens.shape[1], self.in_context_tokens)
        return torch.cat([cond.tokens, own], dim=1), mask


class PlainBlock(Repeated):
    """Pre-LayerNorm block: attention and a GELU MLP (ViT)."""

    def __init__(self, dim: int, heads: int, mlp_width: int, eps: float = 1e-12):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qk_norm=False, xavier=False)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.up = linear(dim, mlp_width, xavier=False)
        self.down = linear(mlp_width, dim, xavier=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainTransformer(nn.Module):
    """A stack of `PlainBlock`s behind a learned class token, with a final LayerNorm; no time, no condition."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_width: int, eps: float = 1e-12):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList([PlainBlock(dim, heads, mlp_width, eps) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), positions already added -> (B, N, D)."""
        x = in_compute_dtype(x)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, 1:]
