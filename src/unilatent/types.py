"""The four records that cross the seams: where tokens sit, what they hold, what they are conditioned on, a batch.

Shape letters used everywhere: B samples, N data tokens, K latents, C channels of a data token, D channels of a latent
or of a network, A axes of a position, L condition tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """Where tokens sit, without what they hold: enough to start generating a sample from nothing.

    positions: (B, N, A), or (1, N, A) when every sample has the same ones; float32, in grid units.
    mask: (B, N) bool, True at real tokens; None when there is no padding at all.
    grid: tokens fill this grid in row-major order, last axis fastest; None: they are a set.
    """

    positions: Tensor
    mask: Tensor | None = None
    grid: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[1]

    def blank(self, values: Tensor) -> Tensor:
        """values (B, N, C) with zeros where there is padding."""
        return values if self.mask is None else torch.where(self.mask[..., None], values, 0.0)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.positions.to(device), None if self.mask is None else self.mask.to(device), self.grid)

    def repeat(self, times: int) -> Layout:
        """The same layouts `times` times over along the batch; a shared one stays shared."""
        positions = self.positions if self.positions.shape[0] == 1 else self.positions.repeat(times, 1, 1)
        return Layout(positions, None if self.mask is None else self.mask.repeat(times, 1), self.grid)


def grid_layout(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Layout:
    """Tokens that fill a grid: positions (1, N, A) are its indices, shared by all samples; no padding."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # (N, A)
    return Layout(positions[None], grid=tuple(grid))


@dataclass(frozen=True)
class Tokens:
    """Values (B, N, C) and the layout they sit in. What padded tokens hold has no meaning."""

    values: Tensor
    layout: Layout


@dataclass(frozen=True)
class Conditioning:
    """Everything a network is told about a sample's condition.

    vector: (B, D), added to the time embedding; zeros for an unconditional model.
    tokens: (B, L, D) or None; mask: (B, L) bool or None when no token is padding.
    """

    vector: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.vector.shape[0]

    def repeat(self, times: int) -> Conditioning:
        """All rows `times` times over."""
        tokens = None if self.tokens is None else self.tokens.repeat(times, 1, 1)
        mask = None if self.mask is None else self.mask.repeat(times, 1)
        return Conditioning(self.vector.repeat(times, 1), tokens, mask)

    def padded(self, length: int) -> Conditioning:
        """With exactly `length` tokens, those added masked out."""
        n, device = len(self), self.vector.device
        tokens = self.vector.new_zeros(n, 0, self.vector.shape[1]) if self.tokens is None else self.tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if self.mask is None else self.mask
        more = length - tokens.shape[1]
        return Conditioning(self.vector, F.pad(tokens, (0, 0, 0, more)), F.pad(mask, (0, more), value=False))

    def trimmed(self) -> Conditioning:
        """Without tokens that are padding in every row, where looking costs nothing: they change no result."""
        if self.tokens is None or self.mask is None or not is_at_hand(self.mask):
            return self
        some = self.mask.any(0)  # (L,)
        return self if some.all() else Conditioning(self.vector, self.tokens[:, some], self.mask[:, some])

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Rows of self where `keep` (B,) is True, rows of `other` elsewhere."""
        a, b = _aligned(self, other)
        vector = torch.where(keep[:, None], a.vector, b.vector)
        if a.tokens is None or b.tokens is None or a.mask is None or b.mask is None:
            return Conditioning(vector)
        tokens = torch.where(keep[:, None, None], a.tokens, b.tokens)
        return Conditioning(vector, tokens, torch.where(keep[:, None], a.mask, b.mask))

    def cat(self, other: Conditioning) -> Conditioning:
        """Both along the batch."""
        a, b = _aligned(self, other)
        vector = torch.cat([a.vector, b.vector])
        if a.tokens is None or b.tokens is None or a.mask is None or b.mask is None:
            return Conditioning(vector)
        return Conditioning(vector, torch.cat([a.tokens, b.tokens]), torch.cat([a.mask, b.mask]))


def _aligned(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both with as many tokens, masked where there were none; unchanged when neither has any."""
    if a.tokens is None and b.tokens is None:
        return a, b
    length = max(0 if c.tokens is None else c.tokens.shape[1] for c in (a, b))
    return a.padded(length), b.padded(length)


def is_at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for a device: real ones, on a CPU."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Texts as condition values: UTF-8 bytes (B, W) uint8 with zeros behind, W the longest's length and at least 1.

    A NUL becomes a space, half of a surrogate pair a question mark; everything else comes back from `decode_texts`.
    """
    rows = [text.replace("\0", " ").encode("utf-8", errors="replace") for text in texts]
    width = max([1, *map(len, rows)])
    padded = bytearray(b"".join(row.ljust(width, b"\0") for row in rows))
    return torch.frombuffer(padded, dtype=torch.uint8).view(len(rows), width)


def decode_texts(values: Tensor) -> list[str]:
    """The inverse of `encode_texts`; a character that was cut in two is left out."""
    rows = values.detach().cpu().contiguous().numpy()
    return [row.tobytes().rstrip(b"\0").decode("utf-8", errors="ignore") for row in rows]


def join_values(parts: Sequence[Tensor]) -> Tensor:
    """Rows of the same value from several batches as one tensor; texts (B, W) of different widths are padded."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def take(data: Any, rows: slice | Tensor) -> Any:
    """Some rows of data: of a tensor, or of every tensor of a dict of them."""
    return {key: take(value, rows) for key, value in data.items()} if isinstance(data, dict) else data[rows]


def count(data: Any) -> int:
    """How many samples data holds."""
    return count(next(iter(data.values()))) if isinstance(data, dict) else len(data)


def join(parts: Sequence[Any]) -> Any:
    """Data of several batches as one."""
    if isinstance(parts[0], dict):
        return {key: join([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts))


def move(data: Any, device: torch.device | str) -> Any:
    """Data on a device."""
    if isinstance(data, dict):
        return {key: move(value, device) for key, value in data.items()}
    return data.to(device, non_blocking=torch.device(device).type != "cpu")


@dataclass(frozen=True)
class Batch:
    """Samples as their modality holds them, and the condition values that came with them.

    data: what the modality's `pack` takes: a tensor with B rows (pictures: (B, C, H, W) in [0, 1]) or a dict of them.
    values: condition argument ("labels", say) -> tensor with B rows; texts as `encode_texts` gives them.
    """

    data: Any
    values: dict[str, Tensor]

    def to(self, device: torch.device | str, staying: Collection[str] = ()) -> Batch:
        """staying: of the values, those that are wanted where they are (`Conditions.on_cpu`)."""
        values = {key: value if key in staying else move(value, device) for key, value in self.values.items()}
        return Batch(move(self.data, device), values)
