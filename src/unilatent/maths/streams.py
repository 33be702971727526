"""Random numbers that are a function of a key and a counter: no draw depends on batch, rank, gradient accumulation or
device.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer
operations on whole tensors: a draw for a batch is one call, whatever the number of samples. On CUDA it is compiled to
one kernel where Triton is installed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..types import move
from .times import stratified


def seed_of(*key: int | str) -> int:
    """Hash a key such as ("noise", seed, step, index) to a 63-bit seed; different keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator of torch's, seeded by a key: for draws that do not belong to single samples."""
    return torch.Generator(device).manual_seed(seed_of(*key))


GENERATOR = "philox4x32-10"
"""Where the numbers come from. Stored in checkpoints: a run that goes on with another generator draws other noise."""

Numbers = Callable[[tuple[Tensor, ...]], Tensor]
"""Four words of 32 bits (n,) to four random numbers (n, 4)."""


class Streams:
    """A batch of random number streams, one per sample: stream i belongs to (*key, rows[i]).

    key: names what the numbers are for, such as ("train", seed). rows: the samples' numbers, non-negative.

    Number j of draw d of a stream is a function of (*key, row, d, j) alone. So a sample gets the same numbers in any
    batch, and a shorter draw is the beginning of a longer one: `normal(k, c)` equals `normal(n, c)[:, :k]`. Draws are
    float32. They are the same on every device, up to a rare difference in the last bit of a normal number.
    """

    def __init__(self, key: tuple[int | str, ...], rows: Iterable[int], device: torch.device | str = "cpu"):
        self.key, self.device = key, torch.device(device)
        numbers = list(rows)
        assert min(numbers, default=0) >= 0
        self.rows = move(torch.tensor(numbers, dtype=torch.int64, device="cpu"), self.device)
        self.keys = move(torch.tensor(round_keys(seed_of(*key)), device="cpu"), self.device)
        self.draws = 0
        self.stratified_draws = 0

    def __len__(self) -> int:
        return len(self.rows)

    def normal(self, *shape: int) -> Tensor:
        """Draw N(0, 1) of shape (B, *shape)."""
        return self._draw(normals, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw U[0, 1) of shape (B, *shape), in multiples of 2^-24."""
        return self._draw(uniforms, shape)

    def stratified(self) -> Tensor:
        """Draw U[0, 1) times (B,) that cover [0, 1) evenly, to reduce the variance of a loss.

        A time is a function of key, row and the number of earlier calls (`times.stratified`, with a shift shared by all
        rows). The times of a batch are spread evenly because its rows differ; none depends on the rest of the batch.
        """
        shift = 2 * seed_of("stratified", *self.key, self.stratified_draws)
        self.stratified_draws += 1
        return stratified(self.rows, shift, self.stratified_draws - 1)

    def _draw(self, numbers: Numbers, shape: tuple[int, ...]) -> Tensor:
        amount = math.prod(shape)
        self.draws += 1
        if not len(self) * amount:
            return torch.empty(len(self), *shape, device=self.device)
        blocks = -(-amount // 4)
        out = self._blocks(numbers, blocks)
        return out.view(len(self), 4 * blocks)[:, :amount].reshape(len(self), *shape)

    def _blocks(self, numbers: Numbers, blocks: int) -> Tensor:
        """The next draw of every row, (B blocks, 4)."""
        return all_numbers(numbers, self.rows, blocks, self.draws, self.keys)


MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85

CHUNK = 16384
"""Blocks of four numbers computed at once on a CPU, so that intermediate results stay in its cache."""
UNIT = 64
"""Blocks are computed in multiples of this. Torch computes the last elements of a tensor without vector instructions,
whose logarithms differ in the last bit, so that a number would depend on the size of the batch."""


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The two 32-bit words of the key in each of the ten rounds."""
    low, high = seed & MASK, seed >> 32
    return [((low + i * WEYL[0]) & MASK, (high + i * WEYL[1]) & MASK) for i in range(10)]


def philox(counter: tuple[Tensor, ...], keys: Tensor) -> tuple[Tensor, ...]:
    """Encrypt a counter of four 32-bit words, in int64 tensors of one shape, to four random 32-bit words.

    keys: `round_keys` (10, 2), int64.
    """
    a, b, c, d = counter
    for k, m in keys:
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, which wrap around as they should
        a = (q >> 32).bitwise_xor_(b).bitwise_xor_(k).bitwise_and_(MASK)
        c = (p >> 32).bitwise_xor_(d).bitwise_xor_(m).bitwise_and_(MASK)
        b, d = q, p  # their upper halves are cut when they reach a and c
    return a, b & MASK, c, d & MASK


def uniforms(words: tuple[Tensor, ...]) -> Tensor:
    """Four words (n,) to U[0, 1) (n, 4): their upper 24 bits, as many as float32 holds."""
    return torch.stack([(word >> 8).float() * 2.0**-24 for word in words], dim=-1)


def normals(words: tuple[Tensor, ...]) -> Tensor:
    """Four words (n,) to N(0, 1) (n, 4) by the Box-Muller transform, two and two.

    In float64, since the float32 functions of different devices differ in more than the last bit.
    """
    out = []
    for radius, angle in (words[:2], words[2:]):
        r = torch.sqrt(-2 * torch.log((radius + 1).double() * 2.0**-32))
        phi = angle.double() * (2 * math.pi * 2.0**-32)
        out += [(r * torch.cos(phi)).float(), (r * torch.sin(phi)).float()]
    return torch.stack(out, dim=-1)


def numbers_at(numbers: Numbers, start: int, stop: int, rows: Tensor, blocks: int, draw: int, keys: Tensor) -> Tensor:
    """The numbers (stop - start, 4) of blocks `start` to `stop`, counted over all rows with `blocks` each."""
    index = torch.arange(start, stop, device=rows.device)
    row = rows[(index // blocks).clamp(max=len(rows) - 1)]
    counter = index % blocks, torch.full_like(row, draw), row & MASK, row >> 32
    return numbers(philox(counter, keys))


def all_numbers(numbers: Numbers, rows: Tensor, blocks: int, draw: int, keys: Tensor) -> Tensor:
    """The numbers (B blocks, 4) of draw number `draw` of all rows (B,)."""
    if rows.device.type == "cuda":
        return _fused()(numbers, 0, len(rows) * blocks, rows, blocks, draw, keys)
    out = torch.empty(len(rows) * blocks, 4)
    for start in range(0, len(out), CHUNK):
        size = min(CHUNK, len(out) - start)
        stop = start + -(-size // UNIT) * UNIT
        out[start : start + size] = numbers_at(numbers, start, stop, rows, blocks, draw, keys)[:size]
    return out


@cache
def _fused() -> Callable[..., Tensor]:
    """`numbers_at` as one kernel, where Triton can make one."""
    return torch.compile(numbers_at, dynamic=True, fullgraph=True) if find_spec("triton") else numbers_at
