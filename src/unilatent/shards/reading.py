"""Random access to the samples of shards by number, from any process or thread."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from ..plain_text import count_of
from .index import NO_DATA, Index, index
from .places import Manifest, Shard, cache_folder, fetch

OPEN = 256
"""Largest number of shards that a process keeps open, and of indices that it keeps in memory."""

FIRST_NO_DATA = f"{NO_DATA}bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
"""The fault of a sample without data as the first versions wrote it: fingerprints do not change with the suffixes."""

T = TypeVar("T")


class SampleError(ValueError):
    """A sample that cannot be read; the message names the shard, the sample and the fault."""


class _LRUCache(Generic[T]):
    """A least-recently-used cache, pickled empty. If two threads race, a value is computed twice, without harm."""

    def __init__(self, limit: int):
        self.limit = limit
        self.cached: dict[int, T] = {}

    def get(self, key: int, compute: Callable[[int], T]) -> T:
        value = self.cached.pop(key, None)
        if value is None:
            value = compute(key)
        self.cached[key] = value
        while len(self.cached) > self.limit:
            self.cached.pop(next(iter(self.cached)), None)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "cached": {}}


class _Open:
    """A file descriptor, closed when the last reader has released it."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardSet:
    """The samples of all shards, numbered from 0.

    With a manifest, a shard is downloaded and indexed when one of its samples is first read. Without one, all shards
    are indexed at once, and `progress` is called after each. If a shard contains fewer samples than its manifest says,
    the numbers of all others do not change, and reading a missing one raises SampleError.
    """

    def __init__(
        self, shards: list[Shard], manifest: Manifest | None, suffixes: Collection[str],
        progress: Callable[[int], None] | None = None, summary: dict[str, Any] | None = None,
    ):  # fmt: skip
        """summary: that of the same shards in another process or at another time; then none of them is indexed."""
        self.shards, self.manifest, self.suffixes = shards, manifest, frozenset(suffixes)
        self._indices, self._files = _LRUCache[Index](OPEN), _LRUCache[_Open](OPEN)
        self.class_names: tuple[str, ...]
        self.captioned = False
        """Whether samples have texts."""
        self.unread: list[str] = []
        """Members of shards without a manifest that are not read and belong to no sample."""
        self.damaged: list[str] = []
        """Shards without a manifest that are damaged, with the fault; what follows it is unknown."""
        if summary is not None:
            counts, self.class_names = summary["counts"], tuple(summary["class_names"])
            self.fingerprint, self.captioned = summary["fingerprint"], summary["captioned"]
            self.unread, self.damaged = list(summary["unread"]), list(summary["damaged"])
        elif manifest is not None:
            counts = [shard["count"] for shard in manifest.shards]
            self.class_names, self.fingerprint = manifest.class_names, manifest.sha256
            self.captioned = bool(manifest.made.get("captions"))
        else:
            counts, self.class_names, self.fingerprint = self._index_all(progress)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def summary(self) -> dict[str, Any]:
        """What opening all shards without a manifest finds out, as plain data."""
        return {
            "counts": self.counts.tolist(), "class_names": list(self.class_names), "fingerprint": self.fingerprint,
            "captioned": self.captioned, "unread": self.unread, "damaged": self.damaged,
        }  # fmt: skip

    @property
    def labelled(self) -> bool:
        """Whether samples have a class."""
        return bool(self.class_names)

    def read(self, number: int) -> bytes:
        """Return a sample's data; SampleError if it cannot be read."""
        content, place = self._valid(number)
        return self._bytes(number, *content.places[place])

    def text(self, number: int) -> tuple[bytes, str]:
        """Return the member with a sample's texts, and its suffix; SampleError if there is none."""
        content, place = self._valid(number)
        offset, size, suffix = content.texts[place]
        if not suffix:
            raise SampleError(f"{self.where(number)}: no caption (a .txt, or caption in .json)")
        return self._bytes(number, offset, size), suffix

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        shard = self.locate(number)[0]
        try:
            file = self._files.get(shard, self._open)  # this reference keeps it open if another thread evicts it
            raw = os.pread(file.fd, size, offset)
        except OSError as error:
            raise SampleError(f"{self.where(number)}: {error.strerror}") from error
        if len(raw) < size:
            raise SampleError(f"{self.where(number)}: the file ends after {len(raw):,} of its {size:,} bytes")
        return raw

    def label(self, number: int) -> int:
        """Return a sample's class; SampleError if there is none."""
        content, place = self._valid(number)
        return content.labels[place]

    def key(self, number: int) -> str:
        """Return a sample's key in the shard; "" if the sample is missing."""
        content, place = self._lookup(number)
        return content.keys[place] if place < len(content.keys) else ""

    def is_valid(self, number: int) -> bool:
        """Return whether a sample is complete; its data may still be damaged."""
        return not self._fault(*self._lookup(number))

    def where(self, number: int) -> str:
        """Return a sample's key and shard, for error messages."""
        shard, place = self.locate(number)
        key = "".join(character if character.isprintable() else "?" for character in self.key(number))
        return f"sample {key or place} in {self.shards[shard].place}"

    def locate(self, number: int) -> tuple[int, int]:
        """Return the shard of a sample, and its place in the shard."""
        assert 0 <= number < len(self), number
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, int(number - (self.ends[shard] - self.counts[shard]))

    def index_of(self, shard: int) -> Index:
        """Return a shard's index, from memory if it was used recently."""
        return self._indices.get(shard, self._index)

    def _valid(self, number: int) -> tuple[Index, int]:
        """Return the index with a sample, and its place there; SampleError if the sample has a fault."""
        content, place = self._lookup(number)
        if fault := self._fault(content, place):
            raise SampleError(f"{self.where(number)}: {fault}")
        return content, place

    def _lookup(self, number: int) -> tuple[Index, int]:
        shard, place = self.locate(number)
        try:
            return self.index_of(shard), place
        except OSError as error:
            raise SampleError(f"sample {place} in {self.shards[shard].place}: {error.strerror}") from error

    def _fault(self, content: Index, place: int) -> str:
        if place >= len(content.keys):
            reason = f" ({content.end})" if content.end else ""
            return f"missing, the shard contains only {count_of(len(content.keys), 'sample')}{reason}"
        if self.labelled and not content.faults[place] and not 0 <= content.labels[place] < len(self.class_names):
            return f"no class (a number below {len(self.class_names):,} in .cls, or label in .json)"
        return content.faults[place]

    def _index(self, shard: int) -> Index:
        return index(fetch(self.shards[shard]), self.suffixes, cache_folder() / "index")

    def _open(self, shard: int) -> _Open:
        return _Open(fetch(self.shards[shard]))

    def _index_all(self, progress: Callable[[int], None] | None) -> tuple[list[int], tuple[str, ...], str]:
        """Return counts, class names and fingerprint of shards without a manifest."""
        digest, counts, highest = hashlib.sha256(), [], -1
        faults = {f"{NO_DATA}{', .'.join(sorted(self.suffixes))}": FIRST_NO_DATA}
        for i, shard in enumerate(self.shards):
            try:
                content = self.index_of(i)
            except OSError as error:
                raise ValueError(f"shard {shard.place}: {error.strerror}; make it readable or remove it") from error
            self.captioned = self.captioned or any(suffix for *_, suffix in content.texts)
            self.unread += content.unread
            self.damaged += [f"{shard.place}: {content.end}"] if content.end else []
            hashed = [faults.get(fault, fault) for fault in content.faults]
            rows = repr((shard.name, content.keys, content.places, content.labels, content.texts, hashed))
            digest.update(rows.encode("utf-8", "surrogateescape"))
            counts.append(len(content.keys))
            highest = max(highest, *content.labels, -1)
            if progress:
                progress(1)
        if not sum(counts):
            looked = ", ".join(f".{suffix}" for suffix in sorted(self.suffixes))
            reason = f" ({end})" if (end := self.index_of(0).end) else ""
            raise ValueError(
                f"shard {self.shards[0].place}: it contains no samples{reason}; looked for {looked} "
                "(`unilatent data verify` names what is wrong with each shard)"
            )
        if highest >= 1_000_000:
            raise ValueError(
                f"shard {self.shards[0].place}: labels up to {highest:,}; give class numbers below a million"
            )
        return counts, tuple(str(i) for i in range(highest + 1)), digest.hexdigest()
