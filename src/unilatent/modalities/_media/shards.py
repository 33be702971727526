"""Samples in tar shards: data sets for training, and reading in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from ...listings import ALONE, Listings
from ...progress import progress_of
from ...shards import places
from ...shards.order import Order
from ...shards.reading import SampleError, ShardSet
from ..base import BadSample, Skipped, Splits
from . import captions as texts
from .collection import (
    CollectionDataset,
    DatasetMaker,
    EncodedCollection,
    FileDecoder,
    held_out_count,
    held_out_indices,
    in_batches,
    untrained,
    untrained_note,
    with_names,
)
from .config import MediaData
from .files import FileKind
from .pixels import Frame


class _LazySequence(Sequence[Any]):
    """One value per sample, computed when it is accessed."""

    def __init__(self, size: int, value: Callable[[int], Any]):
        self.size, self.value = size, value

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        return self.value(number)


class MemberCaptions(texts.Captions):
    """Captions from the `.txt` or `.json` members next to the samples of shards."""

    def __init__(self, shards: ShardSet):
        self.shards = shards

    def __getitem__(self, index: int) -> tuple[str, ...]:
        try:
            raw, suffix = self.shards.text(index)
        except SampleError as error:
            raise BadSample(str(error)) from error
        return texts.of_file(raw, suffix, self.shards.where(index))

    def stamp(self, index: int) -> str:
        raise AssertionError("the fingerprint of shards does not read their samples")


class ShardCollection(EncodedCollection):
    """All samples of a set of shards."""

    def __init__(
        self, shards: ShardSet, kind: FileKind, decoder: FileDecoder, frame: Frame, cache: bool, captions: bool,
        listings: Listings,
    ):  # fmt: skip
        super().__init__(len(shards), frame, cache)
        self.shards, self.decoder, self.listings = shards, decoder, listings
        self.class_names = shards.class_names
        self.names = _LazySequence(len(shards), shards.key)
        self.labels = _LazySequence(len(shards), self._label) if shards.labelled else None
        self.captions = MemberCaptions(shards) if captions and shards.captioned else None
        self.notes = _notes(shards, kind)

    def decode(self, index: int) -> Tensor:
        """Decode a sample. BadSample if it is damaged; ValueError, which ends the run, if a download fails."""
        raw = self.content(index)
        try:
            return self.decoder(raw, self.frame, self.where(index))
        except ValueError as error:
            raise BadSample(str(error)) from error

    def content(self, index: int) -> bytes:
        try:
            return self.shards.read(index)
        except SampleError as error:
            raise BadSample(str(error)) from error

    def where(self, index: int) -> str:
        return self.shards.where(index)

    def stamp(self, index: int) -> str:
        raise AssertionError("the fingerprint of shards does not read their samples")

    def _label(self, index: int) -> int:
        try:
            return self.shards.label(index)
        except SampleError as error:
            raise BadSample(str(error)) from error


class ShardDataset(CollectionDataset):
    """Some samples of shards, in an order in which each process reads from few shards at a time."""

    def __init__(self, collection: ShardCollection, indices: np.ndarray):
        super().__init__(collection, cast("Sequence[int]", indices))
        self.shards, self.numbers = collection.shards, indices  # ascending, so samples of a shard are contiguous
        ends = np.searchsorted(indices, self.shards.ends)
        self.order = Order(np.diff(ends, prepend=0).tolist())

    def _examples(self, count: int) -> list[int]:
        """Return the first indices: others may be in shards that would have to be downloaded."""
        return [int(number) for number in self.indices[:count]]

    def index_at(self, seed: int, position: int) -> int:
        return self.order.at(seed, position)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest (or else of all shard indices), of the sample numbers and of the frame."""
        captions = self.collection.captions
        templates = captions.key if isinstance(captions, texts.TemplateCaptions) else ""
        content = f"{self.collection.frame}\0{self.shards.fingerprint}\0{templates}".encode()
        return sha256(content + self.numbers.astype("<i8").tobytes()).hexdigest()


def suffixes_in_shards(kind: FileKind) -> tuple[str, ...]:
    """Return the suffixes of a kind's members, without the dot."""
    return tuple(suffix[1:] for suffix in kind.suffixes)


def is_shards(path: str, kind: FileKind, listings: Listings = ALONE) -> bool:
    """Whether a path names tar shards of these samples."""
    local = Path(path).expanduser()
    return listings.find(
        ("is shards", str(local.absolute()), kind.suffixes),
        lambda: (places.is_shards(path, suffixes_in_shards(kind)), [local]),
    )


def splits(
    config: MediaData, kind: FileKind, decoder: FileDecoder, frame: Frame, make: DatasetMaker = ShardDataset,
    listings: Listings = ALONE,
) -> Splits:  # fmt: skip
    """Open the training and held-out samples of shards; ValueError names what is missing and the fix.

    make: builds a data set of some samples.
    """
    assert config.path is not None
    path = config.path
    key = ("shards", str(Path(path).expanduser().absolute()), kind.suffixes, config.held_out)
    found = listings.find(key, lambda: _look(path, kind, config.held_out))
    shards = ShardSet(
        [places.Shard(**shard) for shard in found["shards"]], None, suffixes_in_shards(kind), summary=found["summary"]
    )
    collection = ShardCollection(shards, kind, decoder, frame, config.cache, config.captions, listings)
    with_names(collection, config)
    held_out = np.asarray(found["held_out"], dtype=np.int64)
    train = make(collection, np.setdiff1d(np.arange(len(shards)), held_out, assume_unique=True))
    train.notes = (*train.notes, *untrained_note(collection, found.get("untrained", ())))
    return Splits(train, make(collection, held_out))


def _look(path: str, kind: FileKind, held_out: float) -> tuple[dict[str, Any], list[str] | None]:
    """Return the shards at a path, what is in them, which samples are held out, and the witnesses."""
    shards = open_shards(path, "data.path", kind)
    chosen, unseen = _held_out(shards, held_out_count(held_out, len(shards)), kind)
    found = {
        "shards": [asdict(shard) for shard in shards.shards],
        "summary": shards.summary,
        "held_out": chosen,
        "untrained": unseen,
    }
    if not all(map(places.is_local, shards.shards)):
        return found, None  # what is at a URL may change without a sign
    files = [shard.place for shard in shards.shards]
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    manifest = [str(folder / places.MANIFEST)] if shards.manifest is not None else []
    return found, [str(folder), *manifest, *files]


def _held_out(shards: ShardSet, count: int, kind: FileKind) -> tuple[list[int], list[int]]:
    """Choose held-out samples as for folders, among those with all their members. Reads the index of each shard.

    Returns them, and the labels of which no other sample is left."""
    if not count:
        return [], []
    usable, names, labels = [], [], []
    with _progress("reading shard indices", len(shards.shards)) as advance:
        for number in range(len(shards)):
            shard, place = shards.locate(number)
            if shards.is_valid(number):
                usable.append(number)
                names.append(shards.key(number))
                labels.append(shards.label(number) if shards.labelled else 0)
            if place + 1 == shards.counts[shard]:
                advance(1)
    sources = kind.source_of and [kind.source_of(name) for name in names]
    places = held_out_indices(names, labels, count, sources)
    chosen = set(places)
    unseen = untrained(labels, [i in chosen for i in range(len(labels))]) if shards.labelled else []
    return [usable[i] for i in places], unseen


def notes(path: Path, kind: FileKind) -> list[str]:
    """Return what shards hold and is not read, one line each."""
    return _notes(open_shards(str(path), "input", kind), kind)


def _notes(shards: ShardSet, kind: FileKind) -> list[str]:
    unread = kind.unread(name for name in shards.unread)
    lines = kind.note(unread, shards.shards[0].place if len(shards.shards) == 1 else f"{len(shards.shards)} shards")
    if shards.damaged:
        more = f" ({len(shards.damaged)} shards are damaged)" if len(shards.damaged) > 1 else ""
        lines.append(
            f"{shards.damaged[0]}{more}, `unilatent data verify` checks all shards; {kind.noun}s after that may be "
            "missing: copy it again"
        )
    return lines


def open_shards(path: str, field: str, kind: FileKind) -> ShardSet:
    """Open the shards at a path; without a manifest they are indexed now, with a progress bar on the terminal."""
    shards, manifest = places.find(path, field)
    with _progress("reading shard indices", len(shards)) as advance:
        return ShardSet(shards, manifest, suffixes_in_shards(kind), advance)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar that disappears at the end, unless there is only one item."""
    with progress_of(quiet=total < 2, transient=True) as advance:
        yield lambda count: advance(label, count, total)


def read(
    path: Path, kind: FileKind, decoder: FileDecoder, frame: Frame, batch_size: int, skipped: Skipped | None = None
) -> Iterator[tuple[Tensor, list[str]]]:
    """Read all samples of shards in order: batches (B, ...) in [0, 1] and their keys."""
    shards = open_shards(str(path), "input", kind)

    def load(index: int) -> Tensor:
        try:
            raw = shards.read(index)
        except SampleError as error:
            raise BadSample(str(error)) from error
        return decoder(raw, frame, shards.where(index)).float() / 255

    return in_batches(_LazySequence(len(shards), shards.key), load, batch_size, skipped)
