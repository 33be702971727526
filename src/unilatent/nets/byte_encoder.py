"""A small transformer over the bytes of texts, taken a few at a time.

Bytes are cut into pieces as in the Byte Latent Transformer (arXiv 2412.09871), by a fixed rule in place of its entropy
model: runs of letters and digits, at most eight bytes of them, and marks by themselves. A piece is the sum of what its
bytes say at their places, which reads words never seen, and of two rows that its whole content is hashed to (Sec. 3.2.1
there), which knows a common word at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..types import encode_texts, is_at_hand
from .embeddings import sincos
from .layers import in_compute_dtype
from .transformer import PlainBlock

PIECE = 8
"""Bytes that a piece has at most; as a whole they are one 64-bit number."""
ROWS = 4096
NEAR = 5
"""Pieces that are mixed: two to each side."""
FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64)
"""Odd numbers, multiplication by which spreads a number's bits over its upper ones."""


def pieces(values: Tensor, most: int | None = None) -> Tensor:
    """(B, W) uint8 with zeros behind -> (B, P, 8) uint8: every piece of a text, with zeros behind and after the last.

    Control characters and spaces end pieces and are no part of any. P is that of the text with most pieces, and at
    least 1; on a device it is `most`, so as not to wait for it. Pieces after the first `most` are left out.
    """
    position = torch.arange(values.shape[1], device=values.device)  # (W,)
    letter = (values >= 128) | _between(values, "09") | _between(values, "AZ") | _between(values, "az")
    mark = ~letter & (values > 32) & (values != 127)
    first = letter & ~torch.nn.functional.pad(letter, (1, 0))[:, :-1]
    offset = position - torch.where(first, position, -1).cummax(1).values  # (B, W) in its run of letters
    place = torch.where(letter, offset % PIECE, 0)
    begins = mark | (letter & (place == 0))
    number = begins.cumsum(1) - 1
    if is_at_hand(values):
        found = max(1, int(begins.sum(1).max()))
        most = found if most is None else min(most, found)
    assert most is not None
    used = (letter | mark) & (number < most)
    at = torch.where(used, number * PIECE + place, most * PIECE)
    kept = values.new_zeros(len(values), most * PIECE + 1).scatter_(1, at, torch.where(used, values, 0))
    return kept[:, :-1].unflatten(1, (most, PIECE))


def count_pieces(text: str) -> int:
    """How many there are in a text."""
    return int((pieces(encode_texts([text]))[..., 0] != 0).sum())


def _between(values: Tensor, ends: str) -> Tensor:
    return (values >= ord(ends[0])) & (values <= ord(ends[1]))


class ByteEncoder(nn.Module):
    """Bytes to a vector for each piece of them, and their mean: each piece and, by channel, a mix of its neighbours;
    sin-cos positions, `PlainBlock`s, a last LayerNorm.

    What goes together stands together ("a small red circle"): the mix says so from the first step, attention alone
    learns it late.
    """

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.bytes = nn.Embedding(PIECE * 256, width)
        self.hashed = nn.Embedding(ROWS, width)
        nn.init.normal_(self.bytes.weight, std=PIECE**-0.5 / 2)  # about as loud as where they stand
        nn.init.normal_(self.hashed.weight, std=0.5)
        self.near = nn.Conv1d(width, width, NEAR, padding=NEAR // 2, groups=width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, 4 * width, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, values: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, W) uint8, zeros behind -> vectors (B, L, H), mask (B, L) and mean (B, H), float32; L <= most pieces.

        A text without pieces has a vector that means nothing, so that everybody has something to attend to.
        """
        cut = pieces(values, most).long()  # (B, L, 8)
        mask = cut[..., 0] != 0
        seen = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        own = self._embedded(cut) * mask[..., None]  # (B, L, H)
        h = in_compute_dtype(own + self.near(own.mT).mT + sincos(self._positions(cut), self.width))
        for block in self.blocks:
            h = block(h, seen)
        h = self.norm(h).float()
        weight = seen[..., None].float()
        return h, mask, (h * weight).sum(1) / weight.sum(1)

    def _embedded(self, cut: Tensor) -> Tensor:
        place = torch.arange(PIECE, device=cut.device)
        spelled = (self.bytes(place * 256 + cut) * (cut != 0)[..., None]).sum(2)  # (B, L, H)
        number = (cut << (8 * place)).sum(-1)  # (B, L) int64
        rows = torch.stack([(number * factor >> 40) % ROWS for factor in FACTORS], dim=-1)
        return spelled + self.hashed(rows).sum(2)

    def _positions(self, cut: Tensor) -> Tensor:
        return torch.arange(cut.shape[1], device=cut.device, dtype=torch.float32)[:, None]
