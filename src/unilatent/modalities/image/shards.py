"""Pictures in tar shards: as training data, to be read in order, and made from folders."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ...shards.order import Order
from ...shards.places import find
from ...shards.reading import SampleError, ShardSet
from ..base import BadSample, Raw, Splits
from . import captions as texts
from . import data as files
from .data import CACHE_BYTES, EXTENSIONS, Frame, ImageData

SUFFIXES = tuple(extension[1:] for extension in EXTENSIONS)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


# ---- as training data ----------------------------------------------------------------------------------------------


class _Lazily(Sequence[Any]):
    """One value a sample, looked up when it is wanted."""

    def __init__(self, size: int, value: Callable[[int], Any]):
        self.size, self.value = size, value

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        return self.value(number)


class _Members(texts.Captions):
    """The `.txt` or `.json` beside each picture of shards."""

    def __init__(self, shards: ShardSet):
        self.shards = shards

    def __getitem__(self, index: int) -> tuple[str, ...]:
        try:
            raw, suffix = self.shards.text(index)
        except SampleError as error:
            raise BadSample(str(error)) from error
        return texts.of_file(raw, suffix, self.shards.where(index))

    def stamp(self, index: int) -> str:
        raise AssertionError("the fingerprint of shards is not made of their samples")


class _Shards(files.Collection):
    def __init__(self, shards: ShardSet, frame: Frame, cache: bool, captions: bool):
        self.shards, self.frame = shards, frame
        self.class_names = shards.class_names
        self.names = _Lazily(len(shards), shards.key)
        self.labels = _Lazily(len(shards), self._label) if shards.labelled else None
        self.captions = _Members(shards) if captions and shards.captioned else None
        self.keep = cache and len(shards) * frame.channels * frame.height * frame.width <= CACHE_BYTES
        self.kept: dict[int, Tensor] = {}

    def picture(self, index: int) -> Tensor:
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self._decoded(index)
            if self.keep:
                self.kept[index] = pixels
        return pixels.float() / 255

    def _decoded(self, index: int) -> Tensor:
        """BadSample when it is damaged; a shard that cannot be downloaded is a ValueError, and ends the run."""
        try:
            raw = self.shards.read(index)
        except SampleError as error:
            raise BadSample(str(error)) from error
        try:
            return files.decode(raw, self.frame, self.shards.where(index))
        except ValueError as error:
            raise BadSample(str(error)) from error

    def stamp(self, index: int) -> str:
        raise AssertionError("the fingerprint of shards is not made of their samples")

    def _label(self, index: int) -> int:
        try:
            return self.shards.label(index)
        except SampleError as error:
            raise BadSample(str(error)) from error


class ShardView(files.View):
    """Some of the pictures of shards, in an order that reads each process's share from few of them at a time."""

    def __init__(self, collection: _Shards, indices: np.ndarray):
        super().__init__(collection, cast("Sequence[int]", indices))
        self.shards, self.numbers = collection.shards, indices  # ascending, so those of a shard lie together
        ends = np.searchsorted(indices, self.shards.ends)
        self.order = Order(np.diff(ends, prepend=0).tolist())

    def _few(self, count: int) -> list[int]:
        """The first ones: others may lie in shards that would have to be downloaded."""
        return [int(number) for number in self.indices[:count]]

    def index_at(self, seed: int, position: int) -> int:
        return self.order.at(seed, position)

    @cached_property
    def fingerprint(self) -> str:
        """Of the manifest, or of all indices where there is none; of what is held out and what is cropped to."""
        made = self.collection.captions
        templates = made.key if isinstance(made, texts.Templates) else ""
        content = f"{self.collection.frame}\0{self.shards.fingerprint}\0{templates}".encode()
        return sha256(content + self.numbers.astype("<i8").tobytes()).hexdigest()


def splits(config: ImageData, frame: Frame) -> Splits:
    """Training and held-out pictures of shards; ValueError names what is missing and the way out."""
    assert config.path is not None
    shards = open_shards(config.path, "data.path")
    collection = _Shards(shards, frame, config.cache, config.captions)
    files.with_names(collection, config)
    total = len(shards)
    held_out = _held_out(shards, files.held_out_count(config.held_out, total))
    train = np.setdiff1d(np.arange(total), held_out, assume_unique=True)
    return Splits(ShardView(collection, train), ShardView(collection, held_out))


def _held_out(shards: ShardSet, count: int) -> np.ndarray:
    """As for folders, of the pictures that have all their parts; looks into every shard."""
    if not count:
        return np.arange(0)
    sound, names, labels = [], [], []
    with _progress("looking into shards", len(shards.shards)) as advance:
        for number in range(len(shards)):
            shard, place = shards.locate(number)
            if shards.sound(number):
                sound.append(number)
                names.append(shards.key(number))
                labels.append(shards.label(number) if shards.labelled else 0)
            if place + 1 == shards.counts[shard]:
                advance(1)
    return np.asarray([sound[i] for i in files.held_out_indices(names, labels, count)])


def open_shards(path: str, field: str) -> ShardSet:
    """The shards at a path; those without a manifest are looked into now, with a bar on the terminal."""
    found, manifest = find(path, field)
    with _progress("looking into shards", len(found)) as advance:
        return ShardSet(found, manifest, SUFFIXES, advance)


class _progress:
    """A bar on the terminal, gone when it is done."""

    def __init__(self, label: str, total: int):
        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal or total < 2)
        self.label, self.total = label, total

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        task = self.bar.add_task(self.label, total=self.total)
        return lambda count: self.bar.update(task, advance=count)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def read(path: Path, frame: Frame, batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches (B, C, H, W) in [0, 1] of all pictures of shards in the order they lie in, and their keys."""
    shards = open_shards(str(path), "input")
    return _batches(shards, frame, batch_size)


def _batches(shards: ShardSet, frame: Frame, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    for start in range(0, len(shards), size):
        batch = range(start, min(start + size, len(shards)))
        pictures = [files.decode(shards.read(i), frame, shards.where(i)) for i in batch]
        yield torch.stack(pictures).float() / 255, [shards.key(i) for i in batch]


# ---- made from folders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """How pictures are stored. size: (height, width), None as they are."""

    size: tuple[int, int] | None
    format: str
    quality: int


class Pictures(Raw):
    """The pictures of a folder or zip, with the classes that training would find there."""

    def __init__(self, source: Path, encoding: Encoding):
        self.encoding = encoding
        self.files = files.locate(source, "source")
        listing = files.Listing(self.files, "source")
        self.root, self.names, self.captions = listing.root, listing.names, listing.captions
        self.class_names, self.labels = listing.class_names, listing.labels
        size = list(encoding.size) if encoding.size else None
        quality = {} if encoding.format == "png" else {"quality": encoding.quality}
        captions = {} if self.captions is None else {"captions": True}
        self.settings = {"size": size, "format": encoding.format, **quality, **captions}

    def stamp(self, number: int) -> str:
        stamp = self.files.stamp(self.root + self.names[number])
        return stamp if self.captions is None else f"{stamp} {self.captions.stamp(number)}"

    def check(self, number: int) -> None:
        name = self.root + self.names[number]
        files.decode(self.files.read(name), Frame(1, 1, 3, 1), self.files.where(name))
        self.beside(number)

    def beside(self, number: int) -> list[tuple[str, bytes]]:
        """Its captions, one a line."""
        if self.captions is None:
            return []
        return [("txt", "\n".join(" ".join(line.split()) for line in self.captions[number]).encode())]

    def encode(self, number: int) -> tuple[str, bytes]:
        """Cropped as training crops, and saved; a file that is what it would become is taken as it is."""
        name = self.root + self.names[number]
        raw, where = self.files.read(name), self.files.where(name)
        picture = files.open_picture(raw, 3, where)
        chosen = self.encoding
        if chosen.size and picture.size != chosen.size[::-1]:
            picture = files.fit(picture, *chosen.size)
        elif _is_already(raw, chosen.format):
            return chosen.format, raw
        if _is_grey(raw):
            picture = picture.convert("L")
        return chosen.format, _saved(picture, chosen)


def _is_already(raw: bytes, format: str) -> bool:
    with Image.open(io.BytesIO(raw)) as opened:
        upright = ImageOps.exif_transpose(opened).size == opened.size and opened.getexif().get(0x0112, 1) == 1
        return opened.format == FORMATS[format] and opened.mode in ("L", "RGB") and upright


def _is_grey(raw: bytes) -> bool:
    with Image.open(io.BytesIO(raw)) as opened:
        return opened.mode in ("1", "L") or opened.mode.startswith(("I", "F"))


def _saved(picture: Image.Image, encoding: Encoding) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if encoding.format == "png" else {"quality": encoding.quality}
    if encoding.format == "jpg":
        options["subsampling"] = 0  # colours at full resolution: the pictures are small already
    picture.save(buffer, FORMATS[encoding.format], **options)
    return buffer.getvalue()
