"""One random stream per sample: a sample never depends on the batch, rank or accumulation it happens to be in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .times import stratified


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as ("noise", seed, step, index); unlike keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Streams:
    """A row of independent generators, one a sample, drawn from together.

    Successive draws continue each stream, so the order of draws is part of the result. Draws are float32.
    """

    def __init__(self, keys: Iterable[tuple[int | str, ...]], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.keys = list(keys)
        self.generators = [generator(*key, device=self.device) for key in self.keys]
        self.stratified_draws = 0

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), (B, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, stream in zip(out, self.generators, strict=True):
            row.normal_(generator=stream)
        return out

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1), (B, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, stream in zip(out, self.generators, strict=True):
            row.uniform_(generator=stream)
        return out

    def stratified(self) -> Tensor:
        """U[0, 1) times (B,) that cover [0, 1) more evenly than chance, to make a loss less noisy.

        A key ends with its sample's position in the run. The time is a function of the key and of how many such draws
        came before (`times.stratified`, shifted by a number that all positions share): batch mates spread out because
        they stand at other positions, not because they know each other.
        """
        shifts = {key[:-1]: 2 * seed_of("stratified", *key[:-1], self.stratified_draws) for key in self.keys}
        times = [stratified([int(key[-1])], shifts[key[:-1]], self.stratified_draws) for key in self.keys]
        self.stratified_draws += 1
        return torch.cat(times).to(self.device)
