"""`Transformer` with input and output layers, as a backbone and as an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..types import Conditioning, Layout
from .embeddings import sincos
from .fields import ExactLinearInput, TokenField, token_input
from .layers import add_known, linear
from .transformer import Transformer


class ViT(nn.Module):
    """A transformer backbone for any layout, with or without padding: C channels to width D, blocks, back to C.

    Unified Latents' prior (width 1024, depth 8, 16 heads, 32 x 32 tokens of 32 channels) has 155 M parameters, 101 M of
    them in attention and MLPs, and takes 120 G multiply-adds.

    fields: what the channels mean (`nets.fields`); None: all the same.
    exact: without fields, read and return values in float32, inside autocast too.
    context_channels: D' of context tokens (B, N, D'), one per token, added to the input; None: no context.
    out_channels: default in_channels. reads_tokens: see `Transformer`. known_channels: of `Conditioning.known`, which
        is added to the input; None: it is not read. absolute_positions: add sinusoids of positions to the input.
    """

    def __init__(
        self, in_channels: int, width: int, depth: int, heads: int, dropout: float = 0.0,
        context_channels: int | None = None, out_channels: int | None = None,
        fields: Sequence[TokenField] | None = None, reads_tokens: bool = False, exact: bool = False,
        known_channels: int | None = None, absolute_positions: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.absolute_positions = absolute_positions
        assert not (fields and exact), "fields say which of them are exact"
        self.values_in: nn.Module = (
            ExactLinearInput(in_channels, width) if exact else token_input(fields or [TokenField(in_channels)], width)
        )
        self.context_in = None if context_channels is None else linear(context_channels, width)
        self.known_in = None if known_channels is None else linear(known_channels, width)
        out_channels = in_channels if out_channels is None else out_channels
        self.transformer = Transformer(
            width, depth, heads, out_channels, block_norm=False, dropout=dropout, reads_tokens=reads_tokens,
            exact=exact,
        )  # fmt: skip

    def forward(
        self, values: Tensor, layout: Layout, time: Tensor, cond: Conditioning, context: Tensor | None = None
    ) -> Tensor:
        """values (B, N, C), time (B,) as `NoisePath.feature`, context (B, N, D') -> (B, N, C), initially 0."""
        h = self.values_in(values, layout.positions)  # (B, N, D)
        if self.context_in is not None:
            if context is None or context.shape[1] != values.shape[1]:
                got = "none" if context is None else f"{context.shape[1]} tokens"
                raise ValueError(f"context: expected {values.shape[1]} tokens, one per data token, got {got}")
            h = h + self.context_in(context)
        if self.absolute_positions:
            h = h + sincos(layout.varying, h.shape[-1]).to(h.dtype)
        if self.known_in is not None:
            h = add_known(h, self.known_in, cond.known)
        return self.transformer(h, layout, time, cond)


class TokenEncoder(nn.Module):
    """An encoder with one latent per data token: a `ViT` without time or condition, in any layout."""

    def __init__(
        self, in_channels: int, latent_channels: int, width: int, depth: int, heads: int, dropout: float = 0.0,
        fields: Sequence[TokenField] | None = None, absolute_positions: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.vit = ViT(
            in_channels, width, depth, heads, dropout, out_channels=latent_channels, fields=fields,
            absolute_positions=absolute_positions,
        )  # fmt: skip
        self.width = width
        nn.init.xavier_uniform_(self.vit.transformer.out.weight)  # zero latents would give the decoder no gradient

    def latent_layout(self, layout: Layout) -> Layout:
        """Return the latents' layout: one latent at the position of each data token."""
        return layout

    def forward(self, values: Tensor, layout: Layout) -> Tensor:
        """values (B, N, C) -> latents (B, N, D)."""
        zeros = values.new_zeros(len(values), dtype=torch.float32)
        return self.vit(values, layout, zeros, Conditioning(zeros[:, None].expand(-1, self.width)))
