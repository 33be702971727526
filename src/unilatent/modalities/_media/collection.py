"""Collections of samples with random access, data sets of them, and the division into training and held-out samples."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...listings import ALONE, Listings
from ...maths.streams import seed_of
from ...plain_text import count_of, same_names
from ..base import BadSample, CountedBatches, Dataset, Skipped, Splits
from . import captions as texts
from .captions import ARGUMENT, Captions
from .class_names import read_class_names, refuse_codes
from .config import MediaData
from .files import FileSource
from .listing import Listing
from .pixels import Frame

CACHE_BYTES = 256 * 2**20
"""Largest total size of the decoded 8-bit samples at which they are cached in memory."""


class Collection(ABC):
    """Samples by index.

    frame: the size that samples are resized to. names: identifiers that do not depend on where the collection is
    stored. labels: None without classes.
    """

    frame: Frame
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    captions: Captions | None = None
    notes: Sequence[str] = ()
    """What was found with the samples and is not used, one line each."""
    hints: Mapping[str, str] = {}
    """As in `Dataset`."""
    numbers_are_names: bool = False
    """Whether the numbers are proper class names because samples show them (digits)."""
    numbered_anew: bool = False
    """Whether classes are in another order than that of their characters, and named in that order by a file."""
    listings: Listings = ALONE
    """Who looks at files when a data set of the collection is opened."""

    sources: Sequence[str] | None = None
    """What each sample was taken from; samples of one source are held out together. None: each is its own source."""

    @property
    def groups(self) -> Sequence[int]:
        """Numbers of the samples' classes for the choice of held-out samples, whatever order the classes are in."""
        return [0] * len(self.names) if self.labels is None else self.labels

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Return one sample, float32 in [0, 1]; BadSample if it cannot be read."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Return the sample's part of the data fingerprint."""


class CachedCollection(Collection):
    """A collection of samples decoded to 8 bits, which are cached if all of them take at most CACHE_BYTES."""

    def __init__(self, count: int, frame: Frame, cache: bool):
        self.frame = frame
        self.caches = cache and count * frame.values <= CACHE_BYTES
        self.cached: dict[int, Tensor] = {}

    @abstractmethod
    def decode(self, index: int) -> Tensor:
        """Return one sample, uint8."""

    def load(self, index: int) -> Tensor:
        pixels = self.cached.get(index)
        if pixels is None:
            pixels = self.decode(index)
            if self.caches:
                self.cached[index] = pixels
        return pixels.float() / 255


FileDecoder = Callable[[Any, Frame, str], Tensor]
"""(content of a file, frame, its path for messages) -> sample as uint8; BadSample if it cannot be decoded."""


class EncodedCollection(CachedCollection):
    """Samples that are decoded from files, wherever these lie."""

    decoder: FileDecoder

    def decode(self, index: int) -> Tensor:
        return self.decoder(self.content(index), self.frame, self.where(index))

    @abstractmethod
    def content(self, index: int) -> Any:
        """Return the content of a sample's file; BadSample if it cannot be read."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the place of a sample, for messages."""


class FileCollection(EncodedCollection):
    """The files of a folder or archive."""

    def __init__(
        self, source: FileSource, decoder: FileDecoder, frame: Frame, cache: bool, captions: bool = True,
        column: str | None = None, listings: Listings = ALONE,
    ):  # fmt: skip
        self.source, self.decoder, self.listings = source, decoder, listings
        listing = Listing(source, "data.path", captions, column, listings)
        super().__init__(len(listing.names), frame, cache)
        self.root, self.names, self.captions = listing.root, listing.names, listing.captions
        self.class_names, self.labels, self.notes = listing.class_names, listing.labels, listing.notes
        self.hints, self.stamps = listing.hints, listing.stamps
        self.sources = source.kind.source_of and [source.kind.source_of(name) for name in self.names]
        places = {name: place for place, name in enumerate(sorted(self.class_names))}
        order = [places[name] for name in self.class_names]
        self.places = None if order == sorted(order) else [order[label] for label in self.labels or ()]

    @property
    def groups(self) -> Sequence[int]:
        """Labels by the order of the class names' characters."""
        return super().groups if self.places is None else self.places

    def content(self, index: int) -> Any:
        return self.source.content(self.root + self.names[index])

    def where(self, index: int) -> str:
        return self.source.where(self.root + self.names[index])

    def stamp(self, index: int) -> str:
        return self.source.stamp(self.root + self.names[index]) if self.stamps is None else self.stamps[index]


class CollectionDataset(Dataset):
    """Some samples of a collection, with {"labels": int} if it has classes and {"prompts": str} if it has captions.

    The prompt is the first caption; in training, one of the captions, chosen by the global sample index.
    """

    def __init__(self, collection: Collection, indices: Sequence[int]):
        self.collection, self.indices = collection, indices
        self.facts: dict[str, dict[str, Any]] = {}
        if collection.labels is not None:
            self.facts["labels"] = {"class_names": collection.class_names}
        if (captions := collection.captions) is not None:
            shown = self._examples(texts.SHOWN)
            self.facts[ARGUMENT] = collection.listings.share(lambda: texts.facts(captions, shown))
        self.notes, self.hints = tuple(collection.notes), collection.hints

    def adopt(self, argument: str, stored: dict[str, Any]) -> None:
        """Number the classes as `stored["class_names"]`, if these are the same classes in another order."""
        names, collection = tuple(stored.get("class_names") or ()), self.collection
        if argument != "labels" or collection.labels is None or len(set(names)) != len(names):
            return
        same = same_names(collection.class_names, names)
        if same and names != collection.class_names:
            places = [names.index(same[name]) for name in collection.class_names]
            collection.labels, collection.class_names = _Renumbered(collection.labels, places), names
        self.facts["labels"] = {"class_names": collection.class_names}

    def some_values(self, argument: str, count: int) -> list[Any]:
        """Return the captions of up to `count` samples, all of those that have several."""
        captions = self.collection.captions
        if argument != ARGUMENT or captions is None:
            return []
        values: list[str] = []
        for index in self._examples(count):
            with suppress(BadSample):
                values += captions[index]
        return values

    def _examples(self, count: int) -> list[int]:
        """Return at most `count` indices of the collection, evenly spaced."""
        count = min(count, len(self.indices))
        return [int(self.indices[place * len(self.indices) // count]) for place in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self._sample(index, lambda captions: captions[0])

    def view(self, index: int, position: int) -> tuple[Tensor, dict[str, Any]]:
        return self._sample(index, lambda captions: texts.chosen(captions, index, position))

    def values(self, index: int) -> dict[str, Any]:
        """Return label and first caption, without loading the sample."""
        return self._values(self.indices[index], lambda captions: captions[0])

    def _sample(self, index: int, choose: Callable[[tuple[str, ...]], str]) -> tuple[Tensor, dict[str, Any]]:
        number = self.indices[index]
        values = self._values(number, choose)
        return self.collection.load(number), values

    def _values(self, number: int, choose: Callable[[tuple[str, ...]], str]) -> dict[str, Any]:
        labels, captions = self.collection.labels, self.collection.captions
        values: dict[str, Any] = {} if labels is None else {"labels": labels[number]}
        if captions is not None:
            values[ARGUMENT] = choose(captions[number])
        return values

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the frame and of each sample's name, size and, if known without reading it, content."""
        digest = hashlib.sha256(repr(self.collection.frame).encode())
        if self.collection.numbered_anew:
            digest.update(b"\0classes in the order of their numbers")
        for number in self.indices:
            stamps = [self.collection.names[number], self.collection.stamp(number)]
            stamps += [] if self.collection.captions is None else [self.collection.captions.stamp(number)]
            digest.update("".join(f"{stamp}\0" for stamp in stamps).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class _Renumbered(Sequence[int]):
    """Labels with other numbers. places: the new number of each class."""

    def __init__(self, labels: Sequence[int], places: Sequence[int]):
        self.labels, self.places = labels, places

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.places[self.labels[index]]


# ---- names and captions of classes ---------------------------------------------------------------------------------


def with_names(collection: Collection, config: MediaData) -> Collection:
    """Set the class names of a collection, and its captions if the configuration has templates; return it."""
    found, listings = collection.class_names, collection.listings
    collection.class_names = configured_names(found, config, collection.numbers_are_names, listings)
    if config.class_names_file is not None and isinstance(collection, FileCollection) and collection.places is not None:
        in_order = configured_names(tuple(sorted(found)), config, listings=listings) == collection.class_names
        collection.numbered_anew = in_order  # its lines are in the order of the classes, whatever that is
    if config.templates:
        renamed = config.class_names_file is not None
        collection.captions = texts.TemplateCaptions(
            config.templates, collection.class_names, collection.labels, renamed
        )
    return collection


def configured_names(
    names: tuple[str, ...], config: MediaData, numbers_are_names: bool = False, listings: Listings = ALONE
) -> tuple[str, ...]:
    """Return the class names after `class_names_file`; ValueError if templates would be filled with codes.

    listings: who reads that file.
    """
    file = config.class_names_file
    if file is not None:
        return listings.share(lambda: read_class_names(file, names))
    if config.templates and not numbers_are_names:
        refuse_codes(names)
    return names


DatasetMaker = Callable[[Any, Any], Dataset]
"""(collection, numbers of its samples) -> data set."""


# ---- held-out samples ----------------------------------------------------------------------------------------------


def divide(
    collection: Collection, held_out: float, make: DatasetMaker = CollectionDataset, among: Sequence[int] | None = None
) -> Splits:
    """Hold out `held_out` samples (below 1: a fraction) and train on the others; ValueError if none is left.

    make: builds a data set of some samples. among: the samples that are used; None: all.
    """
    used = range(len(collection.names)) if among is None else among
    names, groups = [collection.names[i] for i in used], [collection.groups[i] for i in used]
    sources = None if collection.sources is None else [collection.sources[i] for i in used]
    chosen = {used[i] for i in held_out_indices(names, groups, held_out_count(held_out, len(used)), sources)}
    train = make(collection, [i for i in used if i not in chosen])
    if held_out and not chosen:
        share = f"{held_out:g} of {count_of(len(used), 'sample')} is none"
        train.notes = (*train.notes, f"data.held_out: {share}, nothing is held out; set data.held_out=1 or more")
    if collection.labels is not None and chosen:
        labels = [collection.labels[i] for i in used]
        train.notes = (*train.notes, *untrained_note(collection, untrained(labels, [i in chosen for i in used])))
    return Splits(train, make(collection, sorted(chosen)))


def untrained(labels: Sequence[int], held_out: Sequence[bool]) -> list[int]:
    """Return the labels of which every sample is held out."""
    return sorted(set(labels) - {label for label, out in zip(labels, held_out, strict=True) if not out})


def untrained_note(collection: Collection, labels: Sequence[int]) -> list[str]:
    """Return a line that names the classes with these labels, of which no sample is trained on; none without labels."""
    if not labels:
        return []
    few = f"{', '.join(collection.class_names[label] for label in labels[:3])}{', ...' if len(labels) > 3 else ''}"
    return [
        f"{count_of(len(labels), 'class has', 'classes have')} no training sample, all of theirs are held out ({few}); "
        "hold out fewer (data.held_out), or give more samples of each"
    ]


def held_out_count(held_out: float, total: int) -> int:
    """Return how many of `total` samples are held out; ValueError if none is left to train on."""
    count = round(held_out * total) if held_out < 1 else int(held_out)
    if count >= total:
        raise ValueError(
            f"data.held_out: {held_out:g}, but there {'is' if total == 1 else 'are'} only {count_of(total, 'sample')}; "
            f"hold out fewer: {'data.held_out=0.1' if total > 9 else 'data.held_out=0'}"
        )
    return count


def held_out_indices(
    names: Sequence[str], labels: Sequence[int], count: int, sources: Sequence[str] | None = None
) -> list[int]:
    """Return the `count` samples to hold out, sorted: round-robin over classes, within a class by the hash of the name.

    Adding samples therefore moves few others between the splits. The last remaining sample of a class is taken only
    after all other samples. sources: what each sample was taken from; then whole sources are held out, as many as give
    at least `count` samples. ValueError if there is none left to train on.
    """
    if sources is not None and len(set(sources)) < len(names):
        return _held_out_sources(labels, count, sources)
    return sorted(_in_turns(names, labels)[:count])


def _in_turns(names: Sequence[str], labels: Sequence[int]) -> list[int]:
    """Return all indices in the order in which they are held out."""
    sizes, seen = Counter(labels), Counter[int]()
    turns = []
    for index in sorted(range(len(names)), key=lambda i: seed_of("held_out", names[i])):
        label = labels[index]
        seen[label] += 1
        turns.append((seen[label] == sizes[label], seen[label], label, index))
    return [turn[-1] for turn in sorted(turns)]


def _held_out_sources(labels: Sequence[int], count: int, sources: Sequence[str]) -> list[int]:
    members: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        members.setdefault(source, []).append(index)
    units = list(members)
    firsts = [labels[members[unit][0]] for unit in units]
    chosen: list[int] = []
    for unit in _in_turns(units, firsts):
        if len(chosen) >= count:
            break
        chosen += members[units[unit]]
    if len(chosen) == len(labels):
        raise ValueError(
            f"data.held_out: {count}, but samples of one source are held out together, and all "
            f"{count_of(len(labels), 'sample')} come from {count_of(len(units), 'source')} ({units[0]}); hold out fewer"
        )
    return sorted(chosen)


# ---- reading in order ----------------------------------------------------------------------------------------------


def in_batches(
    names: Sequence[str], load: Callable[[int], Tensor], size: int, skipped: Skipped | None = None
) -> CountedBatches:
    """Return all samples in order: batches (B, ...) and their names.

    load: returns a sample by index. skipped: as in `Modality.read`.
    """
    return CountedBatches(len(names), _in_batches(names, load, size, skipped))


def _in_batches(
    names: Sequence[str], load: Callable[[int], Tensor], size: int, skipped: Skipped | None
) -> Iterator[tuple[Tensor, list[str]]]:
    for start in range(0, len(names), size):
        batch: list[tuple[Tensor, str]] = []
        for i in range(start, min(start + size, len(names))):
            try:
                batch.append((load(i), names[i]))
            except BadSample as error:
                if skipped is None:
                    raise
                skipped(str(error))
        if batch:
            yield torch.stack([sample for sample, _ in batch]), [name for _, name in batch]


def files_in_batches(
    source: FileSource,
    names: Sequence[str],
    decoder: FileDecoder,
    frame: Frame,
    size: int,
    skipped: Skipped | None = None,
) -> CountedBatches:
    """Return named files of a source: batches (B, ...) in [0, 1] and the names."""

    def load(index: int) -> Tensor:
        return decoder(source.read(names[index]), frame, source.where(names[index])).float() / 255

    return in_batches(names, load, size, skipped)
