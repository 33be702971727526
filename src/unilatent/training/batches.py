"""Which sample comes when: a pure function of (seed, position), so a resumed run sees what an unbroken one sees."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..modalities.base import Dataset, Modality
from ..types import Batch


def micro_batches(steps: range, batch_size: int, micro: int | None, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Positions of each micro-batch of one process, step by step; together they are every position of every step.

    A process takes every `world`-th position, so that data laid out in lanes is read by as few of them as possible.
    """
    for step in steps:
        own = range(step * batch_size + rank, (step + 1) * batch_size, world)
        size = micro or max(1, len(own))
        for first in range(0, len(own), size):
            yield own[first : first + size]


class _Indices:
    """A batch sampler; a class so that a loader may start over."""

    def __init__(self, dataset: Dataset, seed: int, batches: list[range] | Iterator[range]):
        self.dataset, self.seed, self.batches = dataset, seed, batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.batches:
            yield [(self.dataset.index_at(self.seed, position), position) for position in positions]


class _Views:
    """A data set whose keys are (index, position)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
        return self.dataset.view(*key)


def loader(
    dataset: Dataset, modality: Modality, batches: Iterator[range] | list[range], seed: int, workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Batches of a shuffled data set at those positions, read ahead by `workers` processes."""
    reader: DataLoader[Any] = DataLoader(
        _Views(dataset),  # type: ignore[arg-type]
        batch_sampler=_Indices(dataset, seed, batches),
        collate_fn=_Collate(modality),
        num_workers=workers,
        worker_init_fn=_quiet_worker if workers else None,
        persistent_workers=bool(workers),
        pin_memory=pin_memory,
    )
    return iter(reader)


class _Collate:
    def __init__(self, modality: Modality):
        self.modality = modality

    def __call__(self, samples: list[tuple[Any, dict[str, Any]]]) -> Batch:
        return collate(samples, self.modality)


def collate(samples: list[tuple[Any, dict[str, Any]]], modality: Modality) -> Batch:
    """Items of a Dataset to a Batch."""
    values = {key: torch.as_tensor([value[key] for _, value in samples]) for key in samples[0][1]}
    return Batch(modality.collate([data for data, _ in samples]), values)


def whole(dataset: Dataset, modality: Modality, limit: int | None = None) -> Batch:
    """A whole data set in one batch, or `limit` samples spread evenly over it."""
    size = len(dataset)
    count = size if limit is None else min(limit, size)
    return collate([dataset[i * size // count] for i in range(count)], modality)


def _quiet_worker(_: int) -> None:
    """Signals are the training process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
