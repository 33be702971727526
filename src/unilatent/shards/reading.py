"""Samples of shards by number: any of them at any time, by any process, without a file position to share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from .index import Index, index
from .places import Manifest, Shard, cache_folder, fetch

OPEN = 256
"""Shards that a process holds open, and whose index it holds, at once."""

T = TypeVar("T")


class SampleError(ValueError):
    """A sample that cannot be read: names the shard, the sample and what is wrong."""


class _Recent(Generic[T]):
    """The last values that were asked for. A thread that loses a race makes a value twice, nothing worse."""

    def __init__(self, limit: int):
        self.limit = limit
        self.kept: dict[int, T] = {}

    def get(self, key: int, make: Callable[[int], T]) -> T:
        value = self.kept.pop(key, None)
        if value is None:
            value = make(key)
        self.kept[key] = value
        while len(self.kept) > self.limit:
            self.kept.pop(next(iter(self.kept)), None)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "kept": {}}


class _Open:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardSet:
    """Shards as one row of samples, numbered from 0.

    With a manifest a shard is looked into, and downloaded, when one of its samples is wanted; without one, all are at
    once: `progress` is called after each. A shard that holds fewer samples than its manifest says keeps their numbers;
    reading one that is missing is a SampleError.
    """

    def __init__(
        self, shards: list[Shard], manifest: Manifest | None, suffixes: Collection[str],
        progress: Callable[[int], None] | None = None,
    ):  # fmt: skip
        self.shards, self.manifest, self.suffixes = shards, manifest, frozenset(suffixes)
        self._indices, self._files = _Recent[Index](OPEN), _Recent[_Open](OPEN)
        self.class_names: tuple[str, ...]
        self.captioned = False
        """Whether samples have texts."""
        if manifest is not None:
            counts = [shard["count"] for shard in manifest.shards]
            self.class_names, self.fingerprint = manifest.class_names, manifest.sha256
            self.captioned = bool(manifest.made.get("captions"))
        else:
            counts, self.class_names, self.fingerprint = self._look_into_all(progress)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def labelled(self) -> bool:
        """Whether samples have a class."""
        return bool(self.class_names)

    def read(self, number: int) -> bytes:
        """A sample's data; SampleError if it cannot be had."""
        found, place = self._found(number)
        if fault := self._fault(found, place):
            raise SampleError(f"{self.where(number)}: {fault}")
        return self._bytes(number, *found.places[place])

    def text(self, number: int) -> tuple[bytes, str]:
        """The member with a sample's texts, and its suffix; SampleError if there is none."""
        found, place = self._found(number)
        if fault := self._fault(found, place):
            raise SampleError(f"{self.where(number)}: {fault}")
        offset, size, suffix = found.texts[place]
        if not suffix:
            raise SampleError(f"{self.where(number)}: no caption beside it (a .txt, or caption in .json)")
        return self._bytes(number, offset, size), suffix

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        shard = self.locate(number)[0]
        try:
            file = self._files.get(shard, self._open)  # held until it was read: another thread may let go of it
            raw = os.pread(file.fd, size, offset)
        except OSError as error:
            raise SampleError(f"{self.where(number)}: {error.strerror}") from error
        if len(raw) < size:
            raise SampleError(f"{self.where(number)}: the file ends after {len(raw):,} of its {size:,} bytes")
        return raw

    def label(self, number: int) -> int:
        """Its class; SampleError if there is none."""
        found, place = self._found(number)
        if fault := self._fault(found, place):
            raise SampleError(f"{self.where(number)}: {fault}")
        return found.labels[place]

    def key(self, number: int) -> str:
        """Its name in the shard; "" if it is missing."""
        found, place = self._found(number)
        return found.keys[place] if place < len(found.keys) else ""

    def sound(self, number: int) -> bool:
        """Whether it is there with all its parts; its data may still be damaged."""
        return not self._fault(*self._found(number))

    def where(self, number: int) -> str:
        """For messages."""
        shard, place = self.locate(number)
        return f"sample {self.key(number) or place} in {self.shards[shard].place}"

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, place in it) of a sample."""
        assert 0 <= number < len(self), number
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, int(number - (self.ends[shard] - self.counts[shard]))

    def look_into(self, shard: int) -> Index:
        """A shard's index, from memory if it was wanted lately."""
        return self._indices.get(shard, self._index)

    def _found(self, number: int) -> tuple[Index, int]:
        shard, place = self.locate(number)
        try:
            return self.look_into(shard), place
        except OSError as error:
            raise SampleError(f"sample {place} in {self.shards[shard].place}: {error.strerror}") from error

    def _fault(self, found: Index, place: int) -> str:
        if place >= len(found.keys):
            reason = f" ({found.end})" if found.end else ""
            return f"missing, the shard holds {len(found.keys):,} samples and should hold more{reason}"
        if self.labelled and not found.faults[place] and not 0 <= found.labels[place] < len(self.class_names):
            return f"no class beside it (a number below {len(self.class_names):,} in .cls, or label in .json)"
        return found.faults[place]

    def _index(self, shard: int) -> Index:
        return index(fetch(self.shards[shard]), self.suffixes, cache_folder() / "index")

    def _open(self, shard: int) -> _Open:
        return _Open(fetch(self.shards[shard]))

    def _look_into_all(self, progress: Callable[[int], None] | None) -> tuple[list[int], tuple[str, ...], str]:
        """Counts, class names and fingerprint of shards nobody vouches for."""
        digest, counts, most = hashlib.sha256(), [], -1
        for i, shard in enumerate(self.shards):
            try:
                found = self.look_into(i)
            except OSError as error:
                raise ValueError(f"shard {shard.place}: {error.strerror}; make it readable or remove it") from error
            self.captioned = self.captioned or any(suffix for *_, suffix in found.texts)
            rows = repr((shard.name, found.keys, found.places, found.labels, found.texts, found.faults))
            digest.update(rows.encode("utf-8", "surrogateescape"))
            counts.append(len(found.keys))
            most = max(most, *found.labels, -1)
            if progress:
                progress(1)
        if not sum(counts):
            looked = ", ".join(f".{suffix}" for suffix in sorted(self.suffixes))
            reason = f" ({end})" if (end := self.look_into(0).end) else ""
            raise ValueError(f"shard {self.shards[0].place}: no samples in it{reason}; looked for {looked}")
        if most >= 1_000_000:
            raise ValueError(f"shard {self.shards[0].place}: classes up to {most:,}; these are no class numbers")
        return counts, tuple(str(i) for i in range(most + 1)), digest.hexdigest()
