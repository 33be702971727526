"""Data sets of clips: one or several of each video, drawn in training and fixed in evaluation.

`dataset[index]` is a fixed window of a video. `view(index, position)` is a random one, a pure function of both numbers,
so that a resumed run reads what an unbroken one reads. A clip is (T, C, H, W) uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from ...plain_text import count_of
from ...progress import progress_of
from ...shards.order import Order
from .._media import captions as texts
from .._media.collection import CACHE_BYTES, CollectionDataset, EncodedCollection
from .._media.hub import HubStream
from .._media.shards import ShardDataset
from ..base import BadSample
from .reading import Recording, clip, drawn_clip, fixed_clip, open_video, too_short
from .windows import ClipFrame, Window, drawn, fixed

Clips = int | Literal["all"]
"""Clips of each video in an epoch; "all": as many as fit without overlap."""
CORES = 8
"""Videos whose frames are counted at a time."""


class ClipDataset(CollectionDataset):
    """Clips of some videos of a collection, with their labels and captions.

    clips: per video. A video that is too short, or cannot be read, is a BadSample when it is loaded; with "all", videos
    are counted first, and short ones are left out with a note.
    """

    collection: EncodedCollection

    def __init__(self, collection: EncodedCollection, indices: Sequence[int], clips: Clips = 1):
        super().__init__(collection, indices)
        self.frame = cast(ClipFrame, collection.frame)
        self.clips, self.details = clips, {"clips": f"{clips}-a-video"}
        self.ends: np.ndarray | None = None
        """With "all", the number of clips up to and including each video."""
        if clips == "all":
            self._count()
        self.memory = _Memory(self.frame, collection.caches and collection.frame.values > 0)

    def _count(self) -> None:
        """Count the frames of every video; ValueError if none is long enough."""
        counts = frame_counts(self.collection, self.indices)
        fitting = [1 if count is None else self.frame.fitting(count) for count in counts]  # unreadable: a BadSample
        short = [place for place, number in enumerate(fitting) if not number]
        if short:
            where, count = self.collection.where(int(self.indices[short[0]])), counts[short[0]] or 0
            line = too_short(where, count, self.frame)
            if len(short) == len(fitting):
                raise ValueError(f"data.path: no video is long enough for a clip, the first: {line}")
            self.notes = (
                *self.notes,
                f"{len(short):,} of {count_of(len(fitting), 'video')} are too short and not used, the first: {line}",
            )
        self.ends = np.cumsum(fitting)

    def __len__(self) -> int:
        if self.ends is not None:
            return int(self.ends[-1]) if len(self.ends) else 0
        return len(self.indices) * int(self.clips)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Return the number of the video in the collection, the place of a clip in it, and the number of its clips."""
        assert 0 <= index < len(self), index
        if self.ends is None:
            video, place = divmod(index, int(self.clips))
            return int(self.indices[video]), place, int(self.clips)
        video = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[video - 1]) if video else 0
        return int(self.indices[video]), index - first, int(self.ends[video]) - first

    def _video(self, number: int) -> Recording:
        return open_video(self.collection.content(number), self.collection.where(number))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        number, place, of = self.locate(index)
        values = self._values(number, lambda captions: captions[0])
        return self._clip(number, lambda count: fixed(self.frame, count, place, of)), values

    def view(self, index: int, position: int) -> tuple[Tensor, dict[str, Any]]:
        number, _, _ = self.locate(index)
        values = self._values(number, lambda captions: texts.chosen(captions, index, position))
        return self._clip(number, lambda count: drawn(self.frame, count, index, position)), values

    def values(self, index: int) -> dict[str, Any]:
        return self._values(self.locate(index)[0], lambda captions: captions[0])

    def _clip(self, number: int, window: Callable[[int], Window | None]) -> Tensor:
        return self.memory.clip(number, lambda: self._video(number), window)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the videos and of which clips of them are used."""
        parts = f"{super().fingerprint}\0{self.clips}\0{'' if self.ends is None else self.ends.tolist()}"
        return hashlib.sha256(parts.encode()).hexdigest()


class ShardClips(ClipDataset, ShardDataset):
    """Clips of the videos of shards, in an order in which each process reads from few shards at a time."""

    def __init__(self, collection: Any, indices: np.ndarray, clips: Clips = 1):
        super().__init__(collection, cast("Sequence[int]", indices), clips)
        ends = np.searchsorted(indices, self.shards.ends)  # videos up to and including each shard
        if self.ends is not None:
            ends = np.concatenate([[0], self.ends])[ends]
        else:
            ends = ends * int(clips)
        self.order = Order(np.diff(ends, prepend=0).tolist())


class ClipStream(HubStream):
    """Videos of a data set on the hub that is read in order: in training one random clip of each, a function of the row
    and the epoch."""

    def _decoded(self, index: int, cell: dict[str, Any] | None, row: str, epoch: int) -> Tensor:
        where = self.source.where(row, (cell or {}).get("path"))
        return drawn_clip(self.source.content(cell, row), cast(ClipFrame, self.frame), where, index, epoch)


class HeldOutStream(ClipStream):
    """The same with the middle clip of each video."""

    def _decoded(self, index: int, cell: dict[str, Any] | None, row: str, epoch: int) -> Tensor:
        where = self.source.where(row, (cell or {}).get("path"))
        return fixed_clip(self.source.content(cell, row), cast(ClipFrame, self.frame), where)


class _Memory:
    """Whole videos in memory, resized and cropped, as long as they fit into CACHE_BYTES. Pickled empty.

    Reading a small data set from memory is some hundred times faster than decoding its clips again. The clips are the
    same.
    """

    def __init__(self, frame: ClipFrame, used: bool):
        self.frame, self.used = frame, used and frame.crop == "centre"
        self.bytes = 0
        self.videos: dict[int, Tensor] = {}

    def clip(self, number: int, open_one: Callable[[], Recording], window: Callable[[int], Window | None]) -> Tensor:
        kept = self.videos.get(number)
        if kept is not None:
            found = window(len(kept))
            assert found is not None  # only clips that exist are asked for of a video that was read
            return kept[list(found.numbers(self.frame.length))]
        video = open_one()
        found = window(video.count)
        size = video.count * self.frame.values // self.frame.length
        if found is None or not self.used or self.bytes + size > CACHE_BYTES:
            return clip(video, self.frame, found)
        try:
            whole = video.whole(self.frame, found)
        except BadSample:  # another clip of it may be whole
            return clip(video, self.frame, found)
        self.bytes += size
        self.videos[number] = whole
        return whole[list(found.numbers(self.frame.length))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bytes": 0, "videos": {}}


def frame_counts(collection: EncodedCollection, numbers: Sequence[int]) -> list[int | None]:
    """Return the number of frames of each video, from their packets; None of one that cannot be read."""

    def count(number: int) -> int | None:
        try:
            return open_video(collection.content(number), collection.where(number)).count
        except BadSample:
            return None

    counts: list[int | None] = []
    with _progress("counting frames", len(numbers)) as advance, ThreadPoolExecutor(CORES) as pool:
        for found in pool.map(count, [int(number) for number in numbers]):
            counts.append(found)
            advance(1)
    return counts


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress_of(quiet=total < 2, transient=True) as advance:
        yield lambda more: advance(label, more, total)
