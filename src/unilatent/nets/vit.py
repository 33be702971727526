"""A transformer over plain values, with the signature of every backbone."""

from __future__ import annotations

from torch import Tensor, nn

from ..types import Conditioning, Layout
from .layers import linear
from .transformer import Transformer


class ViT(nn.Module):
    """One level, any layout, padded or not: tokens of C channels to D wide, blocks, and back.

    Unified Latents' prior (width 1024, depth 8, 16 heads, 32 x 32 tokens of 32 channels) has 155 M parameters, 101 M of
    them in attention and MLPs, and takes 120 G multiply-adds.

    context_channels: D' of context tokens (B, N, D') that are added to the input, one to each; None: no context.
    """

    def __init__(
        self, in_channels: int, width: int, depth: int, heads: int, dropout: float = 0.0,
        context_channels: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.values_in = nn.Linear(in_channels, width)
        self.context_in = None if context_channels is None else linear(context_channels, width)
        self.transformer = Transformer(width, depth, heads, in_channels, block_norm=False, dropout=dropout)

    def forward(
        self, values: Tensor, layout: Layout, time: Tensor, cond: Conditioning, context: Tensor | None = None
    ) -> Tensor:
        """values (B, N, C), time (B,) as the path's `feature`, context (B, N, D') -> (B, N, C), zero at first."""
        h = self.values_in(values)  # (B, N, D)
        if self.context_in is not None:
            if context is None or context.shape[1] != values.shape[1]:
                found = "none" if context is None else f"{context.shape[1]} tokens"
                raise ValueError(f"context: expected {values.shape[1]} tokens, one per token, got {found}")
            h = h + self.context_in(context)
        return self.transformer(h, layout, time, cond)
