"""An order that is random enough for training and near on disk: a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..maths.streams import generator

LANES = 64
"""Neighbouring positions lie in as many different places of the data."""
WINDOW = 2048
"""Samples of a lane that are shuffled among each other."""


class Order:
    """The order of samples that lie in shards of those counts.

    Each epoch the shards are permuted and chained to one row, the row is cut into `lanes` equal segments (the first
    ones longer by one where it does not divide), and place p of the epoch is place p // lanes of lane p % lanes. In a
    lane, windows of `window` samples are shuffled. Every sample comes exactly once an epoch.

    A process that takes every world-th position, lanes a multiple of world, reads its own lanes only.
    """

    def __init__(self, counts: Sequence[int], lanes: int = LANES, window: int = WINDOW):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.size = int(self.starts[-1])
        filled = max(1, int((self.counts > 0).sum()))
        self.lanes = max(1, min(lanes, 1 << (filled.bit_length() - 1)))  # a power of two: worlds mostly are
        self.window = window
        self._key = self.counts.tobytes()

    def at(self, seed: int, position: int) -> int:
        """The sample at a position of the endless row of epochs, by its place in the unpermuted row of shards."""
        epoch, place = divmod(position, self.size)
        lane, step = place % self.lanes, place // self.lanes
        length, longer = divmod(self.size, self.lanes)
        start, length = lane * length + min(lane, longer), length + (lane < longer)
        first = step - step % self.window
        among = _shuffled(seed, epoch, lane, first, min(self.window, length - first))
        return self._unpermuted(seed, epoch, start + first + int(among[step - first]))

    def _unpermuted(self, seed: int, epoch: int, place: int) -> int:
        """From the row of permuted shards to the row as it lies."""
        order = _shards(seed, epoch, len(self.counts))
        ends = _ends(self._key, seed, epoch)
        which = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[which])
        return int(self.starts[shard] + place - (ends[which] - self.counts[shard]))


@lru_cache(maxsize=4 * LANES)
def _shuffled(seed: int, epoch: int, lane: int, first: int, size: int) -> np.ndarray:
    return torch.randperm(size, generator=generator("window", seed, epoch, lane, first)).numpy().astype(np.int32)


@lru_cache(maxsize=8)
def _shards(seed: int, epoch: int, number: int) -> np.ndarray:
    return torch.randperm(number, generator=generator("shards", seed, epoch)).numpy()


@lru_cache(maxsize=8)
def _ends(counts: bytes, seed: int, epoch: int) -> np.ndarray:
    """Where each permuted shard ends."""
    sizes = np.frombuffer(counts, dtype=np.int64)
    return np.cumsum(sizes[_shards(seed, epoch, len(sizes))])
