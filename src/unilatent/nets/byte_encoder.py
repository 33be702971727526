"""A small transformer over the bytes of texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..types import is_at_hand
from .embeddings import sincos
from .layers import in_compute_dtype
from .transformer import PlainBlock


class ByteEncoder(nn.Module):
    """Bytes to as many vectors, and their mean: a table, sin-cos positions, `PlainBlock`s and a last LayerNorm."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.table = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, 4 * width, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, W) uint8, zeros behind -> vectors (B, L, H), mask (B, L) and mean (B, H), float32.

        L is W, or where that costs nothing the longest text's length. A text without bytes has a vector that means
        nothing, so that everybody has something to attend to.
        """
        mask = values != 0  # (B, W); a text has no NUL
        if is_at_hand(values):
            length = max(1, int(mask.sum(1).max()))
            values, mask = values[:, :length], mask[:, :length]
        seen = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        positions = torch.arange(values.shape[1], device=values.device, dtype=torch.float32)[:, None]
        h = in_compute_dtype(self.table(values.long()) + sincos(positions, self.width))  # (B, L, H)
        for block in self.blocks:
            h = block(h, seen)
        h = self.norm(h).float()
        weight = seen[..., None].float()
        return h, mask, (h * weight).sum(1) / weight.sum(1)
