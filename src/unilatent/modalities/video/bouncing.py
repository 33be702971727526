"""Bouncing digits: a handwritten digit that crosses the frame at constant velocity and is reflected by its borders.

A clip is a function of its number; nothing is stored or downloaded. Digits are scikit-learn's, 8 x 8 pixels. Those of
held-out clips occur in no training clip.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ...maths.streams import seed_of
from .._media.collection import CachedCollection, CollectionDataset, held_out_count, held_out_indices
from ..base import Splits
from .windows import ClipFrame

BOUNCING = "bouncing"
"""The value of `data.path` that selects this data."""
ORIGIN = (
    "Clips drawn by this package from the handwritten digits of E. Alpaydin and C. Kaynak (UCI Machine Learning "
    "Repository, 1998, doi:10.24432/C50P49, CC BY 4.0) that scikit-learn contains."
)
SIDE = 8
"""Side of a digit in pixels."""
SMALLEST = 10
"""Smallest frame side, which leaves a digit a way of two pixels."""
HELD_OUT_DIGITS = 360
"""Digits that only held-out clips show."""
TRAINED = 20_000
"""Default number of training clips."""
SPEEDS = (0.5, 1.5)
"""Smallest and largest speed in pixels per frame."""
VERSION = 1
"""Version of the drawing. Part of the fingerprint: change it whenever clips change."""


@dataclass(frozen=True)
class Bounce:
    """Where a digit's upper left corner is in the first frame (row, column), and its velocity in pixels per frame."""

    start: tuple[float, float]
    velocity: tuple[float, float]

    def path(self, frames: int, ways: tuple[float, float]) -> np.ndarray:
        """Return the corner in each frame, (frames, 2); ways: how far it can go along each axis."""
        unfolded = np.array(self.start) + np.arange(frames)[:, None] * np.array(self.velocity)
        return np.stack([triangle(unfolded[:, axis], way) for axis, way in enumerate(ways)], 1)


def triangle(unfolded: np.ndarray, way: float) -> np.ndarray:
    """Fold positions into [0, way], as walls reflect them."""
    return way - np.abs(unfolded % (2 * way) - way)


@lru_cache(maxsize=32768)
def bounce(number: int, height: int, width: int) -> Bounce:
    """Return the motion of a clip in frames of this size: all starts, directions and speeds of SPEEDS are as likely."""
    draw = random.Random(seed_of(BOUNCING, number)).random  # `random` gives equal numbers in every version of Python
    start = draw() * (height - SIDE), draw() * (width - SIDE)
    angle, speed = 2 * math.pi * draw(), SPEEDS[0] + draw() * (SPEEDS[1] - SPEEDS[0])
    return Bounce(start, (speed * math.sin(angle), speed * math.cos(angle)))


def draw(digit: np.ndarray, corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw a digit (8, 8) with its corner at each of (T, 2) places between pixels: (T, height, width).

    Each pixel of the digit is divided over the four that it covers, which keeps its mass and its centroid.
    """
    rows, columns = _spread(corners[:, 0], height), _spread(corners[:, 1], width)
    return np.einsum("thi,ij,twj->thw", rows, digit, columns)


def _spread(places: np.ndarray, size: int) -> np.ndarray:
    """Return for each place the shares (T, size, 8) of a digit's lines in a frame's."""
    distance = np.arange(size)[:, None] - np.arange(SIDE) - places[:, None, None]
    return np.clip(1 - np.abs(distance), 0, None)


class Bouncing(CachedCollection):
    """`trained` clips of the training digits, then `held_out` clips of the other digits, both in turn."""

    numbers_are_names = True

    def __init__(self, frame: ClipFrame, trained: int, held_out: int):
        from sklearn.datasets import load_digits

        super().__init__(trained + held_out, frame, cache=True)
        self.clip = frame
        digits = load_digits()
        self.digits, classes = digits.images / 16, digits.target.tolist()  # (1797, 8, 8) in [0, 1]
        names = [str(i) for i in range(len(classes))]
        hidden = held_out_indices(names, classes, HELD_OUT_DIGITS)
        shown = sorted(set(range(len(classes))) - set(hidden))
        self.shows = [shown[i % len(shown)] for i in range(trained)]
        self.shows += [hidden[i % len(hidden)] for i in range(held_out)]
        self.labels = [classes[digit] for digit in self.shows]
        self.names = [str(number) for number in range(trained + held_out)]
        self.class_names = tuple(str(i) for i in range(10))

    def decode(self, index: int) -> Tensor:
        height, width = self.clip.height, self.clip.width
        ways = float(height - SIDE), float(width - SIDE)
        corners = bounce(index, height, width).path(self.clip.span(), ways)[:: self.clip.strides[0]]
        drawn = draw(self.digits[self.shows[index]], corners, height, width)
        levels = torch.from_numpy(np.rint(255 * drawn).astype(np.uint8))[:, None]  # (T, 1, H, W)
        return levels.repeat(1, self.clip.channels, 1, 1)

    def stamp(self, index: int) -> str:
        return ""


class BouncingDataset(CollectionDataset):
    """A subset of the clips."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the number of clips and of how they are drawn; no clip is drawn to compute it."""
        assert isinstance(self.collection, Bouncing)
        parts = (VERSION, self.collection.clip, len(self.collection.names), self.indices)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def splits(frame: ClipFrame, num_samples: int | None, held_out: float) -> Splits:
    """Return training clips and held-out clips; ValueError if the frames are too small."""
    if min(frame.height, frame.width) < SMALLEST:
        raise ValueError(
            f"data.path: {BOUNCING!r} needs frames of at least {SMALLEST} pixels, not {frame.height} x {frame.width}; "
            "set a larger modality.size"
        )
    trained = TRAINED if num_samples is None else num_samples
    count = held_out_count(held_out, max(trained, int(held_out) + 1))
    collection = Bouncing(frame, trained, count)
    return Splits(
        BouncingDataset(collection, range(trained)), BouncingDataset(collection, range(trained, trained + count))
    )
