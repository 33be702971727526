"""How far samples are from real images, as a multiple of how far other real images are: a mean over features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.frechet import Factor
from ...maths.streams import generator
from ...records import Rows
from ..base import Evidence, Metric, Row


@dataclass(frozen=True)
class Feature:
    """A tensor of a `Space` that is compared. title: its name in tables."""

    space: str
    tensor: str
    title: str


PUBLISHED = (
    Feature("inception", "pool", "Inception"), Feature("dinov2", "dinov2", "DINOv2"), Feature("clip", "clip", "CLIP"),
)  # fmt: skip
STAND_INS = Feature("pixels", "pixels", "pixels"), Feature("classifier", "hidden", "classifier")
"""Features of small images that need no download; their mean is never called FDr."""
SAME = 1e-9
"""Frechet distance, as a share of the total variance, below which two sets are the same images."""
MANY = 4096
"""Above so many images, features are not all held in memory."""


class RelativeDistance(Metric):
    """Mean over features of FD(samples, reference) / FD(real, reference), FD being the Frechet distance.

    `real` are held-out images, of which the metric takes as many as there are samples; with fewer of them, as many
    samples as there are held-out images. A Frechet distance depends on the number of images, a ratio of two of the same
    number hardly does. Which ones are taken is random and fixed. Without held-out images, half of the reference is
    `real`, and the other half the reference.

    About 1 for real images. With PUBLISHED it is FDr^k (Yang et al. 2026, arXiv:2604.28190) of these k = 3 features;
    values for other features cannot be compared with it. No row unless all features are there.
    """

    needs_held_out = True
    relative = True

    def __init__(self, key: str, name: str, features: tuple[Feature, ...]):
        self.gives, self.name, self.features = (key,), name, features

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(feature.space for feature in self.features)

    def used(self, evidence: Evidence) -> tuple[int, int]:
        sets = self._sets(evidence)
        return (0, 0) if sets is None else (sets.count, sets.size)

    def __call__(self, evidence: Evidence) -> list[Row]:
        sets = self._sets(evidence)
        if sets is None:
            return []
        ratios: dict[str, float] = {}
        for feature in self.features:
            ratio = sets.ratio(feature.tensor)
            if ratio is None:
                return []
            ratios[feature.title] = ratio
        mean = sum(ratios.values()) / len(ratios)
        return [Row(self.gives[0], self.name, mean, "", "lower", {"real": 1.0}, parts=ratios)]

    def _sets(self, evidence: Evidence) -> _Sets | None:
        """The sets to compare; None if there are not all features of at least two images of each."""
        names = [feature.tensor for feature in self.features]
        train, held_out, samples = evidence.train, evidence.held_out, evidence.samples
        if train is None or samples is None or not all(name in samples for name in names):
            return None
        if held_out is not None and all(name in held_out for name in names):
            if not all(name in train or name in train.known_moments for name in names):
                return None
            sets = _against_held_out(train, held_out, samples)
        elif all(name in train for name in names):
            sets = _against_half(train, samples)
        else:
            return None
        return sets if sets.count >= 2 else None


@dataclass(frozen=True)
class _Sets:
    """count: of samples, and of real images. size: of the reference. real: name of a tensor -> its factor over the
    reference, and over the real images."""

    samples: Rows
    count: int
    size: int
    real: Callable[[str], tuple[Factor, Factor]]

    def ratio(self, tensor: str) -> float | None:
        """None if the real images are the reference."""
        reference, real = self.real(tensor)
        unit = reference.distance(real)
        if unit <= SAME * float(reference.root.square().sum()):
            return None
        return reference.distance(_of_some(self.samples, tensor, self.count)) / unit


def _against_held_out(train: Rows, held_out: Rows, samples: Rows) -> _Sets:
    count = min(len(samples), len(held_out))
    return _Sets(
        samples, count, len(train),
        lambda tensor: (Factor.of(train.moments(tensor)), _of_some(held_out, tensor, count)),
    )  # fmt: skip


def _against_half(train: Rows, samples: Rows) -> _Sets:
    half = _chosen(len(train), len(train) // 2)
    others = torch.ones(len(train), dtype=torch.bool)
    others[half] = False
    count = min(len(samples), len(half))

    def real(tensor: str) -> tuple[Factor, Factor]:
        rows = train[tensor]
        return Factor.of_features(rows[others]), Factor.of_features(rows[half[_chosen(len(half), count)]])

    return _Sets(samples, count, len(train) - len(half), real)


def _of_some(rows: Rows, tensor: str, count: int) -> Factor:
    """Return the factor of a tensor over `count` rows; of many, from moments, which are read in chunks."""
    if count == len(rows) > MANY:
        return Factor.of(rows.moments(tensor))
    return Factor.of_features(rows[tensor][_chosen(len(rows), count)])


def _chosen(size: int, count: int) -> Tensor:
    """Return `count` of `size` places: one of each of `count` equal stretches, at random.

    Sets are often sorted by class, which the first ones are not representative of, or go through the classes in turn,
    which places at equal distances may not be.
    """
    ends = torch.arange(count + 1) * size // max(count, 1)
    widths = ends.diff()
    return ends[:-1] + (torch.rand(count, generator=generator("relative distance")) * widths).long()
