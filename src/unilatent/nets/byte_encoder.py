"""A small transformer over the bytes of texts, grouped into pieces of up to eight bytes.

Pieces are the patches of the Byte Latent Transformer (arXiv 2412.09871), cut by a fixed rule instead of its entropy
model: runs of at most eight bytes of letters and digits, and single punctuation marks. The embedding of a piece is the
sum of one embedding per byte and place, which covers unseen words, and of two rows of a hash table indexed by the
whole piece (Sec. 3.2.1 there), which distinguish frequent words from the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..types import encode_texts
from . import branches
from .embeddings import sincos
from .layers import in_compute_dtype
from .transformer import PlainBlock

PIECE = 8
"""Maximum number of bytes of a piece, so that a piece is one 64-bit number."""
HASH_ROWS = 4096
"""Rows of the hash table."""
KERNEL = 5
"""Width of the convolution over pieces: two neighbours on each side."""
HASH_FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64)
"""Odd factors of multiplicative hashing; the upper bits of the product are the hash."""


def pieces(values: Tensor, most: int | None = None) -> Tensor:
    """Split texts (B, W) uint8, zero-padded, into pieces (B, P, 8) uint8, zero-padded.

    Control characters and spaces end a piece and belong to none. P is the largest number of pieces of a text, at least
    1 and at most `most`; on a GPU it is `most`, which needs no wait. Further pieces are dropped.
    """
    position = torch.arange(values.shape[1], device=values.device)  # (W,)
    letter = (values >= 128) | _between(values, "09") | _between(values, "AZ") | _between(values, "az")
    mark = ~letter & (values > 32) & (values != 127)
    first = letter & ~torch.nn.functional.pad(letter, (1, 0))[:, :-1]
    offset = position - torch.where(first, position, -1).cummax(1).values  # (B, W) within the run of letters
    place = torch.where(letter, offset % PIECE, 0)
    begins = mark | (letter & (place == 0))
    number = begins.cumsum(1) - 1
    if branches.can_read(values):
        longest = max(1, int(begins.sum(1).max()))
        most = longest if most is None else min(most, longest)
    assert most is not None
    used = (letter | mark) & (number < most)
    index = torch.where(used, number * PIECE + place, most * PIECE)  # the last column collects dropped bytes
    out = values.new_zeros(len(values), most * PIECE + 1).scatter_(1, index, torch.where(used, values, 0))
    return out[:, :-1].unflatten(1, (most, PIECE))


def count_pieces(text: str) -> int:
    """Return the number of pieces of a text."""
    return int((pieces(encode_texts([text]))[..., 0] != 0).sum())


def _between(values: Tensor, ends: str) -> Tensor:
    return (values >= ord(ends[0])) & (values <= ord(ends[1]))


class ByteEncoder(nn.Module):
    """Texts to one vector per piece and their mean: embeddings, a depthwise convolution over neighbouring pieces,
    sin-cos positions, `PlainBlock`s, a final LayerNorm.

    Words that belong together are neighbours ("a small red circle"). The convolution binds them from the first step;
    attention without it learns this late.
    """

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.bytes = nn.Embedding(PIECE * 256, width)
        self.hashed = nn.Embedding(HASH_ROWS, width)
        nn.init.normal_(self.bytes.weight, std=PIECE**-0.5 / 2)  # about the scale of the position embedding
        nn.init.normal_(self.hashed.weight, std=0.5)
        self.near = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, 4 * width, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, values: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Texts (B, W) uint8, zero-padded -> vectors (B, L, H), mask (B, L) and mean (B, H), float32; L <= most pieces.

        The first vector of a text without pieces is attended to and averaged, so that no softmax or mean is empty.
        """
        codes = pieces(values, most).long()  # (B, L, 8)
        mask = codes[..., 0] != 0
        attended = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        embedded = self._embed(codes) * mask[..., None]  # (B, L, H)
        positions = torch.arange(codes.shape[1], device=codes.device, dtype=torch.float32)[:, None]
        h = in_compute_dtype(embedded + self.near(embedded.mT).mT + sincos(positions, self.width), self.norm.weight)
        for block in self.blocks:
            h = block(h, attended)
        h = self.norm(h).float()
        weight = attended[..., None].float()
        return h, mask, (h * weight).sum(1) / weight.sum(1)

    def _embed(self, codes: Tensor) -> Tensor:
        place = torch.arange(PIECE, device=codes.device)
        by_byte = (self.bytes(place * 256 + codes) * (codes != 0)[..., None]).sum(2)  # (B, L, H)
        number = (codes << (8 * place)).sum(-1)  # (B, L) int64
        rows = torch.stack([(number * factor >> 40) % HASH_ROWS for factor in HASH_FACTORS], dim=-1)
        return by_byte + self.hashed(rows).sum(2)
