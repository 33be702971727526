"""Two transformers: one with adaptive normalisation by time and condition, one plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Conditioning, Layout
from .attention import Attention, join_masks, trim
from .embeddings import TimeEmbedding, rotary
from .layers import (
    ExactLinear,
    LayerNorm,
    Repeated,
    RMSNorm,
    SwiGLU,
    add_gated,
    in_compute_dtype,
    linear,
    modulate,
    zero_init,
)


class Block(Repeated):
    """AdaLN-zero block: attention and SwiGLU on RMS-normalised, modulated tokens, with gated residuals.

    block_norm: apply RMSNorm to the residual stream after the block (UNITE; False is "no block norm" of its Table 7).
    dropout: on the outputs of attention and MLP, in training; drawn from torch's global generator.
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
        """h (B, N, D), c (B, D) the condition after SiLU, mask (B, N)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)  # (B, D) each
        attended = self.attn(modulate(self.norm1(h), shift1, scale1), rotation, mask)  # (B, N, D)
        h = add_gated(h, self.dropout(attended), gate1)
        h = add_gated(h, self.dropout(self.mlp(modulate(self.norm2(h), shift2, scale2))), gate2)
        return self.norm3(h)


class Transformer(nn.Module):
    """(values, layout, time, cond) -> values: a stack of `Block`s over tokens that are already D wide.

    in_context_tokens: number of tokens (the condition vector plus a learned position) that are prepended before block
        `in_context_start` and removed after the last one. Their rotary position is 0; other positions do not change.
    reads_tokens: condition tokens, D wide, are prepended and removed in the same way, at position 0 too (the condition
        encodes their order); otherwise a condition must have no tokens.
    out_channels: width of the modulated, linear output. exact: compute that layer in float32, inside autocast too.
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
        exact: bool = False,
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
        self.out = zero_init((ExactLinear if exact else nn.Linear)(dim, out_channels))
        if in_context_tokens:
            self.in_context = nn.Parameter(torch.randn(1, in_context_tokens, dim) * 0.02)

    def forward(self, h: Tensor, layout: Layout, time: Tensor, cond: Conditioning) -> Tensor:
        """h (B, N, D), positions (B or 1, N, A), time (B,) as `NoisePath.feature` -> (B, N, out_channels)."""
        assert (cond.tokens is not None) == self.reads_tokens, "reads_tokens must match the condition"
        cond = trim(cond)
        weight = self.out.weight
        h, c = (in_compute_dtype(x, weight) for x in (h, self.time(time) + cond.vector))  # (B, N, D), (B, D)
        c = F.silu(c)  # once for all modulations
        positions, mask, prefix = layout.varying, layout.mask, 0
        rotation = rotary(positions, self.head_dim, h.dtype)
        for i, block in enumerate(self.blocks):
            if self.joins and i == self.in_context_start:
                prepended, prepended_mask = self._prepended(cond)  # (B, P, D)
                prefix = prepended.shape[1]
                mask = join_masks(prepended_mask, mask, prefix, h.shape[1])
                h = torch.cat([prepended.to(h.dtype), h], dim=1)  # (B, P + N, D)
                rotation = rotary(F.pad(positions, (0, 0, prefix, 0)), self.head_dim, h.dtype)
            h = block(h, c, rotation, mask)
        shift, scale = self.out_modulation(c).chunk(2, dim=-1)
        return self.out(modulate(self.out_norm(h[:, prefix:]), shift, scale))

    def look_ahead(self, offset: int, reach: int) -> None:
        """Call `Attention.look_ahead` in every block."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.look_ahead(offset, reach)

    def _prepended(self, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Return the prepended tokens and their mask: condition tokens, then in-context tokens."""
        in_context = cond.vector[:, None] + self.in_context if self.in_context_tokens else None  # (B, P, D)
        if cond.tokens is None:
            assert in_context is not None
            return in_context, None
        if in_context is None:
            return cond.tokens, cond.mask
        mask = join_masks(cond.mask, None, cond.tokens.shape[1], self.in_context_tokens)
        return torch.cat([cond.tokens, in_context], dim=1), mask


class PlainBlock(Repeated):
    """Pre-LayerNorm block: attention and a GELU MLP (ViT)."""

    def __init__(self, dim: int, heads: int, mlp_width: int, eps: float = 1e-12):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qk_norm=False, xavier=False)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.up = linear(dim, mlp_width, xavier=False)
        self.down = linear(mlp_width, dim, xavier=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainTransformer(nn.Module):
    """A stack of `PlainBlock`s with a learned class token and a final LayerNorm; no time, no condition."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_width: int, eps: float = 1e-12):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList([PlainBlock(dim, heads, mlp_width, eps) for _ in range(depth)])
        self.norm = LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), positions already added -> (B, N, D)."""
        x = in_compute_dtype(x, self.class_token)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, 1:]
