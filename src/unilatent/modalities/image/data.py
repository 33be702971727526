"""Pictures from a folder or zip archive, decoded and cropped to one size; without a path, the embedded digits."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, model_validator
from torch import Tensor

from ...config import Config
from ...maths.streams import seed_of
from ..base import BadSample, Dataset, Splits
from . import captions as texts
from .captions import ARGUMENT, Captions
from .class_names import read_class_names, refuse_codes

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CACHE_BYTES = 256 * 2**20
MEMBER_BYTES = 256 * 2**20
"""What one picture of an archive may unpack to: a small archive can hold terabytes of nothing."""
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


DIGITS = "digits"
"""The path that means scikit-learn's 1,797 handwritten digits."""
SCENES = "scenes"
"""The path that means drawn scenes with captions."""


HUB = "hf:"
"""Starts the path of a Hugging Face data set: "hf:OWNER/NAME", or "hf:FOLDER" of parquet or arrow files."""
HUB_FIELDS = (
    "split", "held_out_split", "image_column", "label_column", "revision", "streaming", "lanes", "shuffle_buffer",
)  # fmt: skip


class ImageData(Config):
    """path: a folder or zip of class folders, or of pictures without classes; "digits", the embedded 8 x 8 ones;
    "scenes", drawn shapes with captions; a .npz of ADM's layout (`arr_0`, uint8 (N, H, W, C)), whose pictures have the
    model's size already; tar shards: a folder, a pattern such as `name-{000..099}.tar`, or the URL of either; or
    "hf:OWNER/NAME" or "hf:FOLDER", a data set that the library `datasets` reads, to which the fields from `split` to
    `shuffle_buffer` belong.
    """

    path: str | None = None
    held_out: float = Field(default=0, ge=0)
    """How many pictures no training step sees, or below 1 which share of them, in equal numbers of every class."""
    captions: bool = True
    """Read captions where there are some: files beside the pictures, metadata.csv or .jsonl, members of shards, a
    column of texts. False leaves them alone."""
    caption_template: str | tuple[str, ...] | None = None
    """Captions made of class names, in place of all others: "a photo of a {}", or several such."""
    class_names_file: str | None = None
    """Names of the classes in place of their folders' (or columns'): a text file with one a line, in the order of the
    sorted classes, or `class name` a line. Labels are shown and asked for by them, and templates say them."""
    caption_column: str | None = None
    """Of metadata.csv, metadata.jsonl or a Hugging Face data set; None: text, caption, captions or prompt."""
    cache: bool = True
    """Keep decoded pictures in memory when all of them take at most 256 MB."""
    split: str = "train"
    held_out_split: str | None = None
    """Where the held-out pictures come from; None takes them out of `split`, which a stream cannot."""
    image_column: str | None = None
    """None: the only column of pictures."""
    label_column: str | None = None
    """None: the only column of class labels, if there is one."""
    revision: str | None = None
    """A branch, tag or commit of a data set on the hub."""
    streaming: bool = False
    """Read in order while training, without a local copy; shuffled by shards and within a buffer."""
    num_samples: int | None = Field(default=None, ge=1)
    """Pictures of a stream's epoch, where the data set does not say; of scenes, how many are trained on (20,000)."""
    lanes: int | None = Field(default=None, ge=1)
    """Rows that a stream is read in side by side; None: the largest power of two up to 64 and the number of files."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Pictures of a stream held for shuffling, over all lanes."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=DIGITS)

    @model_validator(mode="after")
    def _fields_of_the_path(self) -> Self:
        plain = type(self).model_fields
        given = [name for name in HUB_FIELDS if getattr(self, name) != plain[name].default]
        if self.num_samples is not None and self.path != SCENES:
            given.append("num_samples")
        if given and not (self.path or "").startswith(HUB):
            raise ValueError(
                f"{given[0]}: for a data.path that starts with {HUB!r}, not for {self.path!r}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _scenes_have_no_classes(self) -> Self:
        if self.class_names_file is not None and self.path == SCENES:
            raise ValueError(f"class_names_file: {SCENES!r} have no classes; leave it out")
        return self

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(
                    f'caption_template: {template!r} has no {{}} for the class name; write "a photo of a {{}}"'
                )
        return self

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.caption_template,) if isinstance(self.caption_template, str) else self.caption_template or ()


@dataclass(frozen=True)
class Frame:
    """What every picture is brought to; files smaller than `patch` in either axis are refused."""

    height: int
    width: int
    channels: int
    patch: int


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(raw: bytes, frame: Frame, where: str) -> Tensor:
    """A picture file's bytes as (C, H, W) uint8; BadSample names `where` it came from."""
    picture = open_picture(raw, frame.channels, where)
    if min(picture.size) < frame.patch:
        size = f"{picture.height} x {picture.width}"
        raise BadSample(f"picture {where}: {size} (height x width) is smaller than a patch ({frame.patch}); remove it")
    pixels = np.asarray(fit(picture, frame.height, frame.width)).reshape(frame.height, frame.width, -1)  # (H, W, C)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def open_picture(raw: bytes, channels: int, where: str) -> Image.Image:
    """Upright, 8 bits, on white where transparent, grey (1 channel) or RGB (3); BadSample names `where`."""
    try:
        return _open(raw, channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        known = not isinstance(error, UnidentifiedImageError)
        reason = " ".join(str(error).split()) or type(error).__name__ if known else "it is in no known picture format"
        raise BadSample(f"picture {where}: cannot be decoded ({reason}); remove it or save it anew") from error


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The centre crop of Dhariwal & Nichol (2021): halve by averaging, resize to just cover the target, cut."""
    while min(picture.height / height, picture.width / width) >= 2:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)  # a plain copy where the size is right already
    left, top = (wide - width) // 2, (high - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _open(raw: bytes, channels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, before a pixel is decoded
        opened = Image.open(io.BytesIO(raw))
    with opened:
        if (Image.MAX_IMAGE_PIXELS or 0) < opened.width * opened.height:
            raise ValueError(
                f"{opened.height} x {opened.width} pixels are more than the {Image.MAX_IMAGE_PIXELS:,} that are decoded"
            )
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB" if channels == 3 else "L")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow may hold in 32-bit integers, to the nearest of 256 levels."""
    pixels = np.asarray(picture)
    if picture.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are neither 8 nor 16-bit integers")
    return Image.fromarray(np.rint(pixels.astype(np.float64) / 257).astype(np.uint8))


# ---- where files lie -----------------------------------------------------------------------------------------------


class _Files(ABC):
    """Picture files by name: their path inside the folder or archive, with forward slashes."""

    path: Path

    @abstractmethod
    def files(self) -> list[str]:
        """Of everything there."""

    def names(self) -> list[str]:
        """Of all picture files, sorted."""
        return sorted(name for name in set(self.files()) if _is_picture(name))

    @abstractmethod
    def read(self, name: str) -> bytes:
        """BadSample if it cannot be read."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """What is known of a file without reading it."""

    @abstractmethod
    def where(self, name: str) -> str:
        """For messages."""


class _Folder(_Files):
    def __init__(self, path: Path):
        self.path = path

    def files(self) -> list[str]:
        found = []
        for folder, subfolders, names in os.walk(self.path, onerror=_unreadable, followlinks=True):
            subfolders[:] = [name for name in subfolders if not _is_loop(Path(folder, name))]
            inside = Path(folder).relative_to(self.path).as_posix()
            found += [name if inside == "." else f"{inside}/{name}" for name in names]
        return found

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadSample(f"picture {self.where(name)}: {error.strerror}; make it readable or remove it") from error

    def stamp(self, name: str) -> str:
        path = self.path / name
        return str(path.stat().st_size) if path.exists() else "missing"

    def where(self, name: str) -> str:
        return str(self.path / name)


class _Zip(_Files):
    """Opened anew in every process: a file position shared with a forked worker would give both wrong bytes."""

    def __init__(self, path: Path):
        self.path = path
        self._process: int | None = None
        self._opened: zipfile.ZipFile | None = None

    def files(self) -> list[str]:
        return self._archive.namelist()

    def read(self, name: str) -> bytes:
        if name not in self._archive.NameToInfo:
            raise BadSample(f"picture {self.where(name)}: not in the archive; add it, or do not name it")
        if (size := self._archive.getinfo(name).file_size) > MEMBER_BYTES:
            raise BadSample(
                f"picture {self.where(name)}: unpacks to {size / 2**20:,.0f} MiB, more than {MEMBER_BYTES >> 20}; "
                "remove it or save it smaller"
            )
        try:
            return self._archive.read(name)
        except Exception as error:  # BadZipFile, zlib.error, RuntimeError when encrypted, NotImplementedError, ...
            reason = " ".join(str(error).split())
            raise BadSample(f"picture {self.where(name)}: cannot be unpacked ({reason}); make the zip anew") from error

    def stamp(self, name: str) -> str:
        member = self._archive.NameToInfo.get(name)
        return "missing" if member is None else f"{member.file_size} {member.CRC:08x}"

    def where(self, name: str) -> str:
        return f"{name} in {self.path}"

    @property
    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_process": None, "_opened": None}


def _is_picture(name: str) -> bool:
    """By extension; hidden files and what macOS adds to archives are none."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(EXTENSIONS) and not hidden


def _unreadable(error: OSError) -> None:
    raise ValueError(f"folder {error.filename}: {error.strerror}; make it readable or remove it") from error


def _is_loop(folder: Path) -> bool:
    """A link to a folder it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def is_npz(path: str | Path) -> bool:
    """Whether a path names arrays of pictures."""
    return Path(path).suffix.lower() == ".npz"


def locate(path: Path, field: str) -> _Files:
    """The folder or zip at a path; ValueError when it is neither."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"{field}: {path} does not exist; give a folder or .zip of pictures")
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        raise ValueError(f"{field}: {path} is neither a folder nor a .zip of pictures; give one of these")
    try:
        zipfile.ZipFile(path).close()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{field}: {path} is not a whole zip archive ({error}); copy or make it again") from error
    return _Zip(path)


def picture_names(source: _Files, field: str) -> list[str]:
    return _some(source.names(), source, field)


def _some(names: list[str], source: _Files, field: str) -> list[str]:
    if not names:
        raise ValueError(f"{field}: {source.path} holds no pictures; accepted are {', '.join(EXTENSIONS)}")
    return names


class Listing:
    """The pictures of a folder or archive, with their classes and captions.

    root: the folder of all of them. names: from there on, sorted; also those that only a table of captions names, which
    are bad samples. labels: None without classes. captions: None where there are none, or none are wanted.
    """

    def __init__(self, source: _Files, field: str, captions: bool = True, column: str | None = None):
        present = set(source.files())
        tables = _tables(source, sorted(present), column) if captions else {}
        names = {name for name in present if _is_picture(name)} | {name for rows in tables.values() for name in rows}
        pictures = _some(sorted(names), source, field)
        self.root = class_root(pictures)
        self.names = [name.removeprefix(self.root) for name in pictures]
        self.class_names = class_names(self.names, source.path / self.root, field)
        numbers = {name: i for i, name in enumerate(self.class_names)}
        self.labels = [numbers[name.split("/", 1)[0]] for name in self.names] if numbers else None
        self.captions: Captions | None = None
        if tables:
            cells = {name: row for rows in tables.values() for name, row in rows.items()}
            listed = ", ".join(source.where(table) for table in tables)
            self.captions = texts.Listed(
                [cells.get(name) for name in pictures], lambda i: f"{source.where(pictures[i])} (by {listed})"
            )
        elif captions and (beside := texts.Beside(source, pictures, present)):
            self.captions = beside


def _tables(source: _Files, present: Sequence[str], column: str | None) -> dict[str, dict[str, list[str]]]:
    """Captions by picture, of every table of captions; names are those of `source`."""
    found = {}
    for name in present:
        folder, slash, file = name.rpartition("/")
        if file in texts.TABLES:
            rows = texts.table(source.read(name), file, source.where(name), column)
            if rows is not None:
                found[name] = {f"{folder}{slash}{picture}": cells for picture, cells in rows.items()}
    if column is not None and not found:
        raise ValueError(f"data.caption_column: {column!r}, but {source.path} has no {' or '.join(texts.TABLES)}")
    return found


# ---- collections and their splits ----------------------------------------------------------------------------------


class Collection(ABC):
    """Pictures by index. names: what identifies each, wherever the collection lies; labels: None without classes."""

    frame: Frame
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    captions: Captions | None = None

    @abstractmethod
    def picture(self, index: int) -> Tensor:
        """(C, H, W) float32 in [0, 1]."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Part of the fingerprint."""


class _Digits(Collection):
    def __init__(self, frame: Frame):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.frame = frame
        self.levels = digits.images.astype(np.float32)  # (1797, 8, 8), whole numbers 0 to 16
        self.labels = digits.target.tolist()
        self.names = [str(i) for i in range(len(self.levels))]
        self.class_names = tuple(str(i) for i in range(10))

    def picture(self, index: int) -> Tensor:
        grey = self.levels[index] / 16
        if (self.frame.height, self.frame.width) != grey.shape:
            eight_bits = Image.fromarray(np.rint(grey * 255).astype(np.uint8))
            grey = np.asarray(fit(eight_bits, self.frame.height, self.frame.width)).astype(np.float32) / 255
        return torch.from_numpy(grey).repeat(self.frame.channels, 1, 1)

    def stamp(self, index: int) -> str:
        return hashlib.sha256(self.levels[index].tobytes()).hexdigest()


class PictureFiles(Collection):
    def __init__(
        self, source: _Files, frame: Frame, cache: bool, captions: bool = True, column: str | None = None
    ):  # fmt: skip
        self.source, self.frame = source, frame
        listing = Listing(source, "data.path", captions, column)
        self.root, self.names, self.captions = listing.root, listing.names, listing.captions
        self.class_names, self.labels = listing.class_names, listing.labels
        self.keep = cache and len(self.names) * frame.channels * frame.height * frame.width <= CACHE_BYTES
        self.kept: dict[int, Tensor] = {}

    def picture(self, index: int) -> Tensor:
        pixels = self.kept.get(index)
        if pixels is None:
            name = self.root + self.names[index]
            pixels = decode(self.source.read(name), self.frame, self.source.where(name))
            if self.keep:
                self.kept[index] = pixels
        return pixels.float() / 255

    def stamp(self, index: int) -> str:
        return self.source.stamp(self.root + self.names[index])


class View(Dataset):
    """Some of a collection's pictures: (C, H, W) float32 in [0, 1], with {"labels": int} where there are classes, and
    {"prompts": str} where there are captions: the first of each picture's, or one of them by its position."""

    def __init__(self, collection: Collection, indices: Sequence[int]):
        self.collection, self.indices = collection, indices
        self.facts: dict[str, dict[str, Any]] = {}
        if collection.labels is not None:
            self.facts["labels"] = {"class_names": collection.class_names}
        if collection.captions is not None:
            self.facts[ARGUMENT] = texts.facts(collection.captions, self._few(texts.SHOWN))

    def _few(self, count: int) -> list[int]:
        """At most so many of the collection's indices, spread evenly."""
        count = min(count, len(self.indices))
        return [int(self.indices[place * len(self.indices) // count]) for place in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self._sample(index, lambda captions: captions[0])

    def view(self, index: int, position: int) -> tuple[Tensor, dict[str, Any]]:
        return self._sample(index, lambda captions: texts.chosen(captions, index, position))

    def values(self, index: int) -> dict[str, Any]:
        """Without the picture being opened."""
        return self._values(self.indices[index], lambda captions: captions[0])

    def _sample(self, index: int, choose: Callable[[tuple[str, ...]], str]) -> tuple[Tensor, dict[str, Any]]:
        at = self.indices[index]
        values = self._values(at, choose)
        return self.collection.picture(at), values

    def _values(self, at: int, choose: Callable[[tuple[str, ...]], str]) -> dict[str, Any]:
        labels, captions = self.collection.labels, self.collection.captions
        values: dict[str, Any] = {} if labels is None else {"labels": labels[at]}
        if captions is not None:
            values[ARGUMENT] = choose(captions[at])
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and, where they are known without reading, contents; and of what pictures are cropped to."""
        digest = hashlib.sha256(repr(self.collection.frame).encode())
        for at in self.indices:
            stamps = [self.collection.names[at], self.collection.stamp(at)]
            stamps += [] if self.collection.captions is None else [self.collection.captions.stamp(at)]
            digest.update("".join(f"{stamp}\0" for stamp in stamps).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def splits(config: ImageData, frame: Frame) -> Splits:
    """Training and held-out pictures; ValueError names the path, what is wrong with it and the way out."""
    collection: Collection
    if config.path is None:
        raise ValueError(f"data.path: not set; give a folder or .zip of pictures, or {DIGITS!r} for the embedded ones")
    if config.path.startswith(HUB):
        from .hub import splits as hub_splits

        return hub_splits(config, frame)
    if config.path == SCENES:
        from .scenes import splits as scenes

        return scenes(frame, config.num_samples, config.held_out)
    if config.path == DIGITS:
        collection = _Digits(frame)
    elif is_npz(config.path):
        from .arrays import Pictures

        collection = Pictures(Path(config.path).expanduser(), frame, "data.path")
    else:
        source = locate(Path(config.path), "data.path")
        wanted = config.captions and not config.templates
        collection = PictureFiles(source, frame, config.cache, wanted, config.caption_column)
    return divide(with_names(collection, config), config.held_out)


def with_names(collection: Collection, config: ImageData) -> Collection:
    """The collection, its classes called as the configuration says, and with captions made of their names where it has
    templates."""
    collection.class_names = called(collection.class_names, config)
    if config.templates:
        named = config.class_names_file is not None
        collection.captions = texts.Templates(config.templates, collection.class_names, collection.labels, named)
    return collection


def called(found: tuple[str, ...], config: ImageData) -> tuple[str, ...]:
    """Names of these classes; ValueError where there are to be captions of codes."""
    if config.class_names_file is not None:
        return read_class_names(config.class_names_file, found)
    if config.templates and config.path != DIGITS:  # whose numbers are what the pictures show
        refuse_codes(found)
    return found


def divide(collection: Collection, held_out: float) -> Splits:
    """`held_out` pictures (below 1: a share) against the rest; ValueError when nothing would be left."""
    total = len(collection.names)
    indices = held_out_indices(collection.names, collection.labels or [0] * total, held_out_count(held_out, total))
    kept_out = set(indices)
    return Splits(View(collection, [i for i in range(total) if i not in kept_out]), View(collection, indices))


def held_out_count(held_out: float, total: int) -> int:
    """How many of `total` pictures are held out; ValueError when none is left to train on."""
    count = round(held_out * total) if held_out < 1 else int(held_out)
    if count >= total:
        raise ValueError(f"data.held_out: {held_out:g}, but there are only {total} pictures; hold out fewer")
    return count


def held_out_indices(names: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """The `count` samples to hold out, in order: class by class in turn, in each those of the smallest hash of name.

    Adding samples therefore moves few others between the splits. A class's last sample is held out last of all.
    """
    sizes, seen = Counter(labels), Counter[int]()
    turns = []
    for index in sorted(range(len(names)), key=lambda i: seed_of("held_out", names[i])):
        label = labels[index]
        seen[label] += 1
        turns.append((seen[label] == sizes[label], seen[label], label, index))
    return sorted(turn[-1] for turn in sorted(turns)[:count])


def class_root(names: Sequence[str]) -> str:
    """The folder that holds the class folders, as a prefix: down while there is one folder and no picture."""
    root = ""
    while True:
        folders = {name[len(root) :].partition("/")[::2] for name in names}  # (first part, rest); rest "" at a picture
        tops = {first for first, _ in folders}
        if len(tops) > 1 or any(not rest for _, rest in folders):
            return root
        root += tops.pop() + "/"


def class_names(names: Sequence[str], where: Path, field: str) -> tuple[str, ...]:
    """The folders that pictures lie in, sorted; none where the pictures lie side by side."""
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return ()
    if loose:
        raise ValueError(
            f"{field}: {where} holds {len(loose)} pictures ({loose[0]}, ...) beside its class folders; "
            "move them into class folders, or give a folder of pictures alone"
        )
    found = sorted({name.split("/", 1)[0] for name in names})
    if SPLIT_NAMES.issuperset(name.lower() for name in found):
        raise ValueError(f"{field}: {where} holds {', '.join(found)}, which are no classes; give one of them alone")
    return tuple(found)


# ---- plain reading -------------------------------------------------------------------------------------------------


def read(path: Path, frame: Frame, batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches (B, C, H, W) in [0, 1] of all pictures below a folder, in a zip or of one file, and their names.

    Sorted by name. ValueError at once when there are none, and at its turn when a picture cannot be read.
    """
    assert batch_size >= 1, batch_size
    path = path.expanduser()
    if is_npz(path):
        from .arrays import Pictures

        return in_batches(Pictures(path, frame, "input"), batch_size)
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return _batches(_Folder(path.parent), [path.name], frame, batch_size)
    source = locate(path, "input")
    return _batches(source, picture_names(source, "input"), frame, batch_size)


def _batches(source: _Files, names: list[str], frame: Frame, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    for start in range(0, len(names), size):
        batch = names[start : start + size]
        pictures = [decode(source.read(name), frame, source.where(name)) for name in batch]
        yield torch.stack(pictures).float() / 255, batch


def in_batches(collection: Collection, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """The same, of any collection."""
    for start in range(0, len(collection.names), size):
        batch = range(start, min(start + size, len(collection.names)))
        yield torch.stack([collection.picture(i) for i in batch]), [collection.names[i] for i in batch]
