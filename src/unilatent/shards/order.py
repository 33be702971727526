"""Sample order for shards: shuffled, but mostly sequential on disk; a pure function of (seed, position).

A lane is one of several interleaved streams of shards: consecutive positions come from different lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..maths.streams import generator

LANES = 64
"""Number of interleaved shard streams."""
WINDOW = 2048
"""Samples of a lane that are shuffled together."""


class Order:
    """The order of samples in shards with the given sample counts.

    Each epoch, the shards are permuted and concatenated. The sequence is split into `lanes` segments of equal length
    (the first ones have one sample more if it does not divide). Place p of the epoch is place p // lanes of lane
    p % lanes. Within a lane, windows of `window` samples are shuffled. Every sample occurs exactly once per epoch.

    A process that takes every world-th position reads its own lanes only, if `lanes` is a multiple of world.
    """

    def __init__(self, counts: Sequence[int], lanes: int = LANES, window: int = WINDOW):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.size = int(self.starts[-1])
        filled = max(1, int((self.counts > 0).sum()))
        self.lanes = max(1, min(lanes, 1 << (filled.bit_length() - 1)))  # a power of two, as most world sizes are
        self.window = window
        self._key = self.counts.tobytes()

    def at(self, seed: int, position: int) -> int:
        """Return the index of the sample, in unpermuted shards, at a position of the infinite sequence of epochs."""
        epoch, place = divmod(position, self.size)
        lane, step = place % self.lanes, place // self.lanes
        length, longer = divmod(self.size, self.lanes)
        start, length = lane * length + min(lane, longer), length + (lane < longer)
        first = step - step % self.window
        shuffled = _shuffled(seed, epoch, lane, first, min(self.window, length - first))
        return self._unpermuted(seed, epoch, start + first + int(shuffled[step - first]))

    def _unpermuted(self, seed: int, epoch: int, place: int) -> int:
        """Convert a place in the permuted shards to a sample index in the unpermuted ones."""
        order = _shards(seed, epoch, len(self.counts))
        ends = _ends(self._key, seed, epoch)
        index = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[index])
        return int(self.starts[shard] + place - (ends[index] - self.counts[shard]))


@lru_cache(maxsize=4 * LANES)
def _shuffled(seed: int, epoch: int, lane: int, first: int, size: int) -> np.ndarray:
    return torch.randperm(size, generator=generator("window", seed, epoch, lane, first)).numpy().astype(np.int32)


@lru_cache(maxsize=8)
def _shards(seed: int, epoch: int, number: int) -> np.ndarray:
    return torch.randperm(number, generator=generator("shards", seed, epoch)).numpy()


@lru_cache(maxsize=8)
def _ends(counts: bytes, seed: int, epoch: int) -> np.ndarray:
    """Return the end of each permuted shard."""
    sizes = np.frombuffer(counts, dtype=np.int64)
    return np.cumsum(sizes[_shards(seed, epoch, len(sizes))])
