"""Which frames of a video a clip has: drawn in training, fixed in evaluation; pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...maths.streams import generator
from .._media.pixels import Frame


@dataclass(frozen=True)
class ClipFrame(Frame):
    """The size of a clip. length: frames of it. strides: smallest and largest number of frames of the video from one
    frame of the clip to the next. crop: where the longer side is cut; "random" in training, else at its centre."""

    length: int
    strides: tuple[int, int] = (1, 1)
    crop: Literal["centre", "random"] = "centre"

    @property
    def values(self) -> int:
        """Number of values of a clip."""
        return self.length * super().values

    def span(self, stride: int | None = None) -> int:
        """Return how many frames of the video a clip of this stride (default: the smallest) extends over."""
        return (self.length - 1) * (self.strides[0] if stride is None else stride) + 1

    def fitting(self, count: int) -> int:
        """Return how many clips of the smallest stride a video of `count` frames holds without overlap."""
        return count // self.span()


@dataclass(frozen=True)
class Window:
    """A clip of a video. start: number of its first frame. stride: in frames. across, down: where the crop lies between
    left (top) 0 and right (bottom) 1."""

    start: int
    stride: int
    across: float = 0.5
    down: float = 0.5

    def numbers(self, length: int) -> range:
        """Return the numbers of its frames."""
        return range(self.start, self.start + length * self.stride, self.stride)


def fixed(frame: ClipFrame, count: int, place: int = 0, of: int = 1) -> Window | None:
    """Return clip `place` of `of` clips at equal distances, in a video of `count` frames; None if it is too short.

    The first one begins with the video and the last one ends with it; a single one lies in the middle. They overlap
    only if there are more than `frame.fitting(count)`.
    """
    last = count - frame.span()
    if last < 0:
        return None
    return Window(last // 2 if of == 1 else round(place * last / (of - 1)), frame.strides[0])


def drawn(frame: ClipFrame, count: int, *key: int | str) -> Window | None:
    """Return a random clip of a video of `count` frames, a pure function of the arguments; None if it is too short.

    The stride is uniform over those at which a clip fits, the start uniform over all at which it does.
    """
    if count < frame.span():
        return None
    smallest, largest = frame.strides
    if frame.length > 1:
        largest = min(largest, (count - 1) // (frame.length - 1))
    numbers = torch.rand(4, generator=generator("clip", *key), dtype=torch.float64).tolist()
    stride = smallest + int(numbers[0] * (largest - smallest + 1))
    start = int(numbers[1] * (count - frame.span(stride) + 1))
    across, down = (numbers[2], numbers[3]) if frame.crop == "random" else (0.5, 0.5)
    return Window(start, stride, across, down)
