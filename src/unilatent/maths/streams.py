"""One random number stream per sample: its draws do not depend on batch, rank or gradient accumulation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .times import stratified


def seed_of(*key: int | str) -> int:
    """Hash a key such as ("noise", seed, step, index) to a 63-bit seed; different keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator, seeded by a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Streams:
    """A batch of random number streams: independent generators, one per sample.

    Successive draws continue each stream, so results depend on the order of draws. Draws are float32.
    """

    def __init__(self, keys: Iterable[tuple[int | str, ...]], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.keys = list(keys)
        self.generators = [generator(*key, device=self.device) for key in self.keys]
        self.stratified_draws = 0

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """Draw N(0, 1) of shape (B, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, stream in zip(out, self.generators, strict=True):
            row.normal_(generator=stream)
        return out

    def uniform(self, *shape: int) -> Tensor:
        """Draw U[0, 1) of shape (B, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, stream in zip(out, self.generators, strict=True):
            row.uniform_(generator=stream)
        return out

    def stratified(self) -> Tensor:
        """Draw U[0, 1) times (B,) that cover [0, 1) evenly, to reduce the variance of a loss.

        The last element of each key is the sample's global sample index. A time is a function of the key and of the
        number of earlier calls (`times.stratified`, with a shift shared by all positions). The times of a batch are
        spread evenly because their positions differ; none depends on the rest of the batch.
        """
        shifts = {key[:-1]: 2 * seed_of("stratified", *key[:-1], self.stratified_draws) for key in self.keys}
        times = [stratified([int(key[-1])], shifts[key[:-1]], self.stratified_draws) for key in self.keys]
        self.stratified_draws += 1
        return torch.cat(times).to(self.device)
