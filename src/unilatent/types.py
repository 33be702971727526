"""The records that packages exchange: `Layout`, `Tokens`, `Conditioning` and `Batch`.

Shape letters used everywhere: B samples, N data tokens, K latents, C channels of a data token, D channels of a latent
or of a network, A axes of a position, L condition tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """Positions and padding of tokens, without their values: enough to generate a sample from noise.

    positions: (B, N, A), or (1, N, A) when all samples share them; float32, in grid units.
    mask: (B, N) bool, True at real tokens; None if there is no padding.
    grid: the tokens fill this grid in row-major order, last axis fastest; None: they are a set.
    """

    positions: Tensor
    mask: Tensor | None = None
    grid: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[1]

    @property
    def real_tokens(self) -> int | Tensor:
        """How many tokens of each sample are real: (B,) int64; without padding N."""
        return self.num_tokens if self.mask is None else self.mask.sum(1)

    @property
    def varying(self) -> Tensor:
        """Positions (B or 1, N, A') without the axes of a grid that have one cell, where all tokens are alike; a grid
        of one token keeps all."""
        axes = [axis for axis, size in enumerate(self.grid or ()) if size > 1]
        if len(axes) in (0, self.positions.shape[-1]):
            return self.positions
        return torch.cat([self.positions[..., axis, None] for axis in axes], -1)  # an index would wait for the device

    def blank(self, values: Tensor) -> Tensor:
        """Return values (B, N, C) with zeros at padding."""
        return values if self.mask is None else torch.where(self.mask[..., None], values, 0.0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values (B, N, C) over the real tokens of each sample, (B, C)."""
        return values.mean(1) if self.mask is None else self.blank(values).sum(1) / self.mask.sum(1, keepdim=True)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.positions.to(device), None if self.mask is None else self.mask.to(device), self.grid)

    def rows(self, rows: slice) -> Layout:
        """Return the layout of some of the samples; shared positions stay shared."""
        positions = self.positions if self.positions.shape[0] == 1 else self.positions[rows]
        return Layout(positions, None if self.mask is None else self.mask[rows], self.grid)

    def repeat(self, times: int) -> Layout:
        """Repeat the batch `times` times; shared positions stay shared."""
        positions = self.positions if self.positions.shape[0] == 1 else self.positions.repeat(times, 1, 1)
        return Layout(positions, None if self.mask is None else self.mask.repeat(times, 1), self.grid)


def grid_layout(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Layout:
    """Return the layout of tokens that fill a grid: positions (1, N, A) are its indices; no padding."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # (N, A)
    return Layout(positions[None], grid=tuple(grid))


@dataclass(frozen=True)
class Tokens:
    """Values (B, N, C) and their layout. Values at padding have no meaning."""

    values: Tensor
    layout: Layout


@dataclass(frozen=True)
class Conditioning:
    """The condition of each sample, as networks read it.

    vector: (B, D), added to the time embedding; zeros for an unconditional model.
    tokens: (B, L, D) or None. mask: (B, L) bool, True at real tokens; None if there is no padding.
    known: what is given of each sample, per token that the network computes: (B, N, C + M), values and how much of them
        is known, zeros where nothing is; None: nothing is given.
    """

    vector: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None

    def __len__(self) -> int:
        return self.vector.shape[0]

    def repeat(self, times: int) -> Conditioning:
        """Repeat the batch `times` times."""
        tokens = None if self.tokens is None else self.tokens.repeat(times, 1, 1)
        mask = None if self.mask is None else self.mask.repeat(times, 1)
        known = None if self.known is None else self.known.repeat(times, 1, 1)
        return Conditioning(self.vector.repeat(times, 1), tokens, mask, known)

    def given(self, known: Tensor | None) -> Conditioning:
        """Return the same condition of samples of which this is known."""
        return replace(self, known=known)

    def known_of(self, tokens: int, channels: int) -> Tensor:
        """Return what is known, (B, tokens, channels); zeros if nothing is given."""
        if self.known is None:
            return self.vector.new_zeros(len(self), tokens, channels)
        assert self.known.shape[1:] == (tokens, channels), (self.known.shape, tokens, channels)
        return self.known

    def padded(self, length: int) -> Conditioning:
        """Pad to exactly `length` tokens; the new ones are masked."""
        n, device = len(self), self.vector.device
        tokens = self.vector.new_zeros(n, 0, self.vector.shape[1]) if self.tokens is None else self.tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if self.mask is None else self.mask
        more = length - tokens.shape[1]
        tokens, mask = F.pad(tokens, (0, 0, 0, more)), F.pad(mask, (0, more), value=False)
        return Conditioning(self.vector, tokens, mask, self.known)

    def trimmed(self) -> Conditioning:
        """Drop tokens that are padding in every row. Reads the mask, which waits for its device."""
        if self.tokens is None or self.mask is None:
            return self
        used = self.mask.any(0)  # (L,)
        return self if used.all() else replace(self, tokens=self.tokens[:, used], mask=self.mask[:, used])

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Take rows of self where `keep` (B,) is True, rows of `other` elsewhere."""
        a, b = _aligned(self, other)
        assert a.known is None and b.known is None, "parts are given to a condition after dropout"
        vector = torch.where(keep[:, None], a.vector, b.vector)
        if a.tokens is None or b.tokens is None or a.mask is None or b.mask is None:
            return Conditioning(vector)
        tokens = torch.where(keep[:, None, None], a.tokens, b.tokens)
        return Conditioning(vector, tokens, torch.where(keep[:, None], a.mask, b.mask))

    def cat(self, other: Conditioning) -> Conditioning:
        """Concatenate along the batch."""
        a, b = _aligned(self, other)
        vector, known = torch.cat([a.vector, b.vector]), _joined_known(a, b)
        if a.tokens is None or b.tokens is None or a.mask is None or b.mask is None:
            return Conditioning(vector, known=known)
        return Conditioning(vector, torch.cat([a.tokens, b.tokens]), torch.cat([a.mask, b.mask]), known)


def _aligned(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Pad both to the same number of tokens; unchanged if neither has tokens."""
    if a.tokens is None and b.tokens is None:
        return a, b
    length = max(0 if c.tokens is None else c.tokens.shape[1] for c in (a, b))
    return a.padded(length), b.padded(length)


def _joined_known(a: Conditioning, b: Conditioning) -> Tensor | None:
    """Concatenate what is known of the samples of both; zeros where nothing is given."""
    if a.known is None and b.known is None:
        return None
    shape = (a.known if a.known is not None else b.known).shape[1:]  # type: ignore[union-attr]
    return torch.cat([c.vector.new_zeros(len(c), *shape) if c.known is None else c.known for c in (a, b)])


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Encode texts as condition values: UTF-8 bytes (B, W) uint8, zero-padded; W is the longest's length, at least 1.

    A NUL becomes a space, half of a surrogate pair a question mark; `decode_texts` restores everything else.
    """
    rows = [text.replace("\0", " ").encode("utf-8", errors="replace") for text in texts]
    width = max([1, *map(len, rows)])
    padded = bytearray(b"".join(row.ljust(width, b"\0") for row in rows))
    return torch.frombuffer(padded, dtype=torch.uint8).view(len(rows), width)


def decode_texts(values: Tensor) -> list[str]:
    """Invert `encode_texts`; incomplete characters are dropped."""
    rows = values.detach().cpu().contiguous().numpy()
    return [row.tobytes().rstrip(b"\0").decode("utf-8", errors="ignore") for row in rows]


def join_values(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the same condition value of several batches; texts (B, W) of different widths are padded."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def refuse_unused(argument: str, given: int, num: int) -> None:
    """ValueError if more values are given for an argument than samples are requested."""
    if given > num:
        raise ValueError(
            f"{argument}: {given:,} values are given, but num is {num:,}, so {given - num:,} would not be used; "
            f"give num={given} (--num {given}), or fewer values"
        )


def take(data: Any, rows: slice | Tensor) -> Any:
    """Return some rows of data: of a tensor, or of every tensor of a (nested) dict."""
    return {key: take(value, rows) for key, value in data.items()} if isinstance(data, dict) else data[rows]


def count(data: Any) -> int:
    """Return the number of samples in data."""
    return count(next(iter(data.values()))) if isinstance(data, dict) else len(data)


def join(parts: Sequence[Any]) -> Any:
    """Concatenate the data of several batches."""
    if isinstance(parts[0], dict):
        return {key: join([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts))


def move(data: Any, device: torch.device | str) -> Any:
    """Copy data to a device, to a GPU without waiting for it."""
    if isinstance(data, dict):
        return {key: move(value, device) for key, value in data.items()}
    return data.to(device, non_blocking=torch.device(device).type != "cpu")


@dataclass(frozen=True)
class Given:
    """Parts of samples that are given, from which a model completes them.

    data: of whole samples; what is not given has no meaning. mask: bool, True where data are given, in the shape of
    data with one channel (images: (B, 1, H, W)). complete: whether data that are not given are the true ones, so that
    they can be shown beside what a model makes.
    """

    data: Any
    mask: Tensor
    complete: bool = False

    def __len__(self) -> int:
        return len(self.mask)

    def to(self, device: torch.device | str) -> Given:
        return replace(self, data=move(self.data, device), mask=self.mask.to(device))

    def rows(self, rows: slice | Tensor) -> Given:
        """Return some of the samples."""
        return replace(self, data=take(self.data, rows), mask=self.mask[rows])


LATENTS = "latents"
"""Key of clean latents in data; no modality's data have it."""


def is_encoded(data: Any) -> bool:
    """Return whether data are clean latents that were stored: {"latents": (B, K, D)}, with "mask" (B, K) and
    "positions" (B, K, A) where samples differ in them."""
    return isinstance(data, dict) and LATENTS in data


@dataclass(frozen=True)
class Batch:
    """Samples and their condition values.

    data: the input of the modality's `pack`: a tensor with B rows (images: (B, C, H, W) in [0, 1]) or a dict of such;
        or clean latents in their place (`is_encoded`).
    values: condition argument (for example "labels") -> tensor with B rows; texts are encoded by `encode_texts`.
    """

    data: Any
    values: dict[str, Tensor]

    def to(self, device: torch.device | str, staying: Collection[str] = ()) -> Batch:
        """Copy to a device. staying: keys of condition values that are not copied (`Conditions.on_cpu`)."""
        values = {key: value if key in staying else move(value, device) for key, value in self.values.items()}
        return Batch(move(self.data, device), values)
