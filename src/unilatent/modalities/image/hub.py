"""Pictures from Hugging Face data sets, through the library `datasets`: a table with random access, or a stream.

Only formats that hold data are opened (parquet, arrow, folders of pictures): no loading script, no pickle.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...maths.streams import generator
from ..base import BadSample, Dataset, Splits, Stream
from . import captions as texts
from .captions import ARGUMENT, Captions, Templates
from .data import CACHE_BYTES, HUB, Collection, Frame, ImageData, View, called, decode, divide, with_names

FORMATS = ("parquet", "arrow", "imagefolder")
PIECES = 1024
"""Into how many pieces a stream's files are put together at most; lanes are dealt pieces."""
LANES = 64
ROWS = 1 << 32
"""A stream's picture has the number piece * ROWS + row."""

Sample = tuple[Tensor, dict[str, Any]]


def splits(config: ImageData, frame: Frame) -> Splits:
    """Training and held-out pictures; ValueError names the field, what is wrong with it and the way out."""
    if config.held_out_split is not None and not config.held_out:
        raise ValueError(
            f"data.held_out: 0, but data.held_out_split is {config.held_out_split!r}; say how many of its pictures"
        )
    if config.streaming:
        return _stream_splits(config, frame)
    table = Table(_Source(config, config.split), frame, config.cache)
    collection = with_names(table, config)
    if config.held_out_split is None:
        return divide(collection, config.held_out)
    other = Table(_Source(config, config.held_out_split), frame, config.cache)
    with_names(other, config)
    _same_classes(table.source.class_names, other.source.class_names, config)
    total = len(other.names)
    count = round(config.held_out * total) if config.held_out < 1 else int(config.held_out)
    held_out = View(other, range(total)) if count == total else divide(other, count).held_out
    return Splits(View(collection, range(len(collection.names))), held_out)


def _stream_splits(config: ImageData, frame: Frame) -> Splits:
    train = Rows(_Source(config, config.split), config, frame)
    if not config.held_out:
        return Splits(train, Kept([], train.facts))
    if config.held_out_split is None:
        raise ValueError(
            f"data.held_out: {config.held_out:g}, but a stream cannot leave pictures out of the split it trains on; "
            "name another one with data.held_out_split, or set data.held_out=0"
        )
    if config.held_out < 1:
        raise ValueError(f"data.held_out: {config.held_out:g}, a share, but streams are not counted; give a number")
    other = Rows(_Source(config, config.held_out_split), config, frame)
    _same_classes(train.source.class_names, other.source.class_names, config)
    return Splits(train, Kept(first(other, int(config.held_out)), train.facts))


def _same_classes(train: Sequence[str], held_out: Sequence[str], config: ImageData) -> None:
    if tuple(train) != tuple(held_out):
        raise ValueError(
            f"data.held_out_split: {config.held_out_split!r} has other classes than {config.split!r}; choose another"
        )


# ---- opening -------------------------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.path: {HUB}... is read by the library `datasets`, which is not installed; "
            'pip install "unilatent[data]"'
        ) from error
    return datasets


class _Source:
    """A split of a data set, its columns and the files it comes from."""

    def __init__(self, config: ImageData, split: str):
        assert config.path is not None
        self.path, self.config, self.split = config.path.removeprefix(HUB), config, split
        self.files: list[str] = []
        self.counted = False
        """Whether the files are parquet, whose footers say how many rows they have."""
        self.size: int | None = None
        """Rows, where they are known without looking."""
        self.rows = self._opened()
        image = self._column("image_column", "Image", config.image_column)
        self.label = self._column("label_column", "ClassLabel", config.label_column)
        if image is None:
            raise ValueError(
                f"data.image_column: {config.path} has no column of pictures, only {self._columns()}; "
                "give another data.path, or the data set the feature type Image"
            )
        self.image: str = image
        features = self.rows.features
        self.text = self._text_column() if config.captions and not config.templates else None
        kept = [column for column in (self.image, self.label, self.text) if column is not None]
        self.class_names: tuple[str, ...] = tuple(features[self.label].names) if self.label else ()
        undecoded = _library().Image(decode=False)  # so that decoding, and the naming of what fails, is ours
        self.rows = self.rows.select_columns(kept).cast_column(self.image, undecoded)

    def where(self, number: object, path: str | None) -> str:
        """For messages."""
        return f"{number} of {self.split} in {self.config.path}" + (f" ({path})" if path else "")

    def _opened(self) -> Any:
        """A datasets.Dataset, or an IterableDataset when streaming."""
        folder = Path(self.path).expanduser()
        if self.path.startswith((".", "/", "~")) and not folder.is_dir():
            raise ValueError(
                f"data.path: {folder} is no folder; give one of parquet or arrow files, or {HUB}OWNER/NAME"
            )
        try:
            found = self._saved(folder) or self._built(folder)
        except ValueError as error:
            if str(error).startswith("data."):
                raise
            raise self._closed(error) from error
        except Exception as error:  # OSError, ConnectionError, pyarrow's and the hub's own
            raise self._closed(error) from error
        if self.split not in found:
            fields = {self.config.split: "data.split", self.config.held_out_split: "data.held_out_split"}
            known = ", ".join(map(str, found))
            raise ValueError(f"{fields[self.split]}: {self.split!r} is not in {self.config.path}; it has {known}")
        return found[self.split]

    def _closed(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return ValueError(
            f"data.path: {self.config.path} cannot be opened ({type(error).__name__}: {reason}); check its name, "
            f"data.revision and the network, or download it and give {HUB}FOLDER"
        )

    def _saved(self, folder: Path) -> dict[str, Any] | None:
        """What `save_to_disk` wrote."""
        whole, several = (folder / "state.json").is_file(), (folder / "dataset_dict.json").is_file()
        if not (whole or several):
            return None
        loaded = _library().load_from_disk(str(folder))
        found = {self.split: loaded} if whole else dict(loaded)
        if self.split in found:
            table = found[self.split]
            self.files, self.size = [file["filename"] for file in table.cache_files], len(table)
            if self.config.streaming:
                found[self.split] = table.to_iterable_dataset(num_shards=max(1, min(LANES, len(table))))
        return found

    def _built(self, folder: Path) -> dict[str, Any]:
        name = str(folder) if folder.is_dir() else self.path
        builder = _library().load_dataset_builder(name, revision=self.config.revision)
        if builder.name not in FORMATS:
            raise ValueError(
                f"data.path: {self.config.path} is in the format {builder.name}; read are {', '.join(FORMATS)}"
            )
        files = dict(builder.config.data_files or {})
        self.files = list(map(str, files.get(self.split, [])))
        self.counted = builder.name == "parquet"
        if self.config.streaming:
            found = dict(builder.as_streaming_dataset())
            known = (builder.info.splits or {}).get(self.split)
            self.size = known.num_examples if known and known.num_examples else None
            return found
        builder.download_and_prepare()
        return dict(builder.as_dataset())

    def _columns(self) -> str:
        return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in self.rows.features.items())

    def _column(self, field: str, kind: str, given: str | None) -> str | None:
        """The column given, or the only one of that feature type (None without any)."""
        if self.rows.features is None:
            raise ValueError(
                f"data.path: {self.config.path} does not say which columns it has; leave data.streaming out"
            )
        found = [name for name, feature in self.rows.features.items() if type(feature).__name__ == kind]
        if given is not None and given not in found:
            raise ValueError(f"data.{field}: {given!r} is no column of type {kind}; there are {self._columns()}")
        if given is None and len(found) > 1:
            raise ValueError(f"data.{field}: not set, and there are {', '.join(found)}; name one")
        return given or (found[0] if found else None)

    def _text_column(self) -> str | None:
        """The column given, or the first of the usual names that holds texts."""
        found = [name for name, feature in self.rows.features.items() if _holds_texts(feature)]
        given = self.config.caption_column
        if given is not None and given not in found:
            raise ValueError(f"data.caption_column: {given!r} is no column of texts; there are {self._columns()}")
        return given or next(filter(texts.COLUMNS.fullmatch, found), None)


def _holds_texts(feature: Any) -> bool:
    """A text, or a list of texts, in the several ways in which versions of the library write one."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _content(cell: dict[str, Any] | None, where: Callable[[str | None], str]) -> bytes:
    """The bytes of a picture that a table holds, or names."""
    path = (cell or {}).get("path")
    raw = (cell or {}).get("bytes")
    if raw is not None:
        return bytes(raw)
    if path is None:
        raise BadSample(f"picture {where(None)}: the row has none; remove it")
    try:
        if "://" in path:
            import fsspec

            with fsspec.open(path, "rb") as remote:
                return bytes(remote.read())
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"picture {where(path)}: {error.strerror or error}; make it readable or remove it") from error


# ---- random access -------------------------------------------------------------------------------------------------


class Table(Collection):
    """A split with random access; names are its row numbers."""

    def __init__(self, source: _Source, frame: Frame, cache: bool):
        self.source, self.frame = source, frame
        rows = len(source.rows)
        if not rows:
            raise ValueError(f"data.path: {source.config.path} holds no pictures in {source.split}; choose another")
        self.names = [str(row) for row in range(rows)]
        self.class_names = source.class_names
        self.labels = None if source.label is None else list(source.rows.select_columns(source.label)[:][source.label])
        without = sum(label is None or label < 0 for label in self.labels or ())
        if without:
            raise ValueError(
                f"data.label_column: {without:,} rows of {source.split} have no {source.label}; choose another split"
            )
        if source.text is not None:
            cells = source.rows.select_columns(source.text)[:][source.text]
            self.captions = texts.Listed(cells, lambda row: source.where(f"row {row}", None))
        self.keep = cache and rows * frame.channels * frame.height * frame.width <= CACHE_BYTES
        self.kept: dict[int, Tensor] = {}

    def picture(self, index: int) -> Tensor:
        pixels = self.kept.get(index)
        if pixels is None:
            cell = self.source.rows[index][self.source.image]
            where = partial(self.source.where, f"row {index}")
            pixels = decode(_content(cell, where), self.frame, where((cell or {}).get("path")))
            if self.keep:
                self.kept[index] = pixels
        return pixels.float() / 255

    def stamp(self, index: int) -> str:
        """Name and length of the file, and the label."""
        return self._stamps[index]

    @cached_property
    def _stamps(self) -> list[str]:
        """Read from the table's offsets, not from the pictures."""
        import pyarrow.compute as pc

        column = self.source.rows.with_format("arrow")[:][self.source.image]
        lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        paths = pc.struct_field(column, "path").to_pylist()
        labels: Sequence[int | None] = self.labels or [None] * len(lengths)
        return [
            f"{_file_size(path) if length is None else length} {Path(path or '').name} {label}"
            for length, path, label in zip(lengths, paths, labels, strict=True)
        ]


def _file_size(path: str | None) -> int | None:
    return os.path.getsize(path) if path and os.path.isfile(path) else None


# ---- streams -------------------------------------------------------------------------------------------------------


class Rows(Stream):
    """A split that is read in order.

    Its files are put together into at most 1,024 pieces. In every epoch the pieces are dealt anew to the lanes, in an
    order of (seed, epoch); a lane reads its pieces one after the other and shuffles each block of shuffle_buffer /
    lanes rows. All of that is drawn here and not by the library, whose versions shuffle unlike each other, and whose
    buffer is lost on resuming. A lane goes to its next epoch when its own pieces end; over a whole epoch of all lanes
    every row comes once.
    """

    def __init__(self, source: _Source, config: ImageData, frame: Frame):
        self.source, self.frame = source, frame
        self.class_names = called(source.class_names, config)
        self.facts: dict[str, dict[str, Any]] = {}
        if source.label:
            self.facts["labels"] = {"class_names": self.class_names}
        self.templates = config.templates
        if self.templates:
            Templates(self.templates, self.class_names, [] if source.label else None)  # which refuses what has none
        if self.templates or source.text:
            self.facts[ARGUMENT] = {"examples": self._first_captions(texts.SHOWN)}
        shards = source.rows.num_shards
        self.pieces = min(shards, PIECES)
        self.lanes = config.lanes or 1 << (min(self.pieces, LANES).bit_length() - 1)
        if self.lanes > self.pieces:
            raise ValueError(
                f"data.lanes: {self.lanes} are more than the {self.pieces} files of {config.path}; set fewer"
            )
        self.block = max(1, config.shuffle_buffer // self.lanes)
        self.by_file = source.counted and shards == self.pieces == len(source.files)
        self.sizes: dict[int, int] = {}
        local = self.by_file and all("://" not in file for file in source.files)
        counted = sum(map(self._size, range(self.pieces))) if local else None
        self.size = config.num_samples or source.size or counted

    def read(self, seed: int, lane: int, place: int) -> Iterator[tuple[int, Callable[[], Sample]]]:
        epoch, barren = 0, 0
        while True:
            order = torch.randperm(self.pieces, generator=generator("pieces", seed, epoch)).tolist()[lane :: self.lanes]
            if place and (rows := sum(map(self._size, order))) <= place:  # an epoch that is over is not read again
                place -= rows
                epoch += 1
                continue
            number, place = divmod(place, self.block)
            raw = self._raw(order, number * self.block)
            found = False
            while block := list(islice(raw, self.block)):
                found = True
                key = ("buffer", seed, epoch, lane, number)
                for row in torch.randperm(len(block), generator=generator(*key)).tolist()[place:]:
                    index, cell = block[row]
                    yield index, partial(self._sample, index, cell, epoch)
                number, place = number + 1, 0
            barren = 0 if found else barren + 1
            if barren > self.pieces:
                raise ValueError(f"data.path: {self.source.config.path} holds no pictures in {self.source.split}")
            epoch += 1

    def _raw(self, order: list[int], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of some pieces from a place on, with their numbers, undecoded."""
        for piece in order:
            if start and start >= (size := self._size(piece)):
                start -= size
                continue
            row = start
            for table in self._tables(piece, start):
                for cell in table.to_pylist():
                    yield piece * ROWS + row, cell
                    row += 1
            self.sizes[piece], start = row, 0

    def _tables(self, piece: int, start: int, rows: int = 16) -> Iterator[Any]:
        """By `iter`: the plain iterator of the library would leave rows out in a data worker."""
        part = self.source.rows.shard(num_shards=self.pieces, index=piece, contiguous=False)
        part = part.skip(start) if start else part
        yield from part.with_format("arrow").iter(batch_size=rows)

    def _size(self, piece: int) -> int:
        """Rows of a piece: from the footer of a parquet file, else by reading it once."""
        if piece not in self.sizes:
            if self.by_file:
                import fsspec
                import pyarrow.parquet as parquet

                with fsspec.open(self.source.files[piece], "rb") as file:
                    self.sizes[piece] = parquet.ParquetFile(file).metadata.num_rows
            else:
                self.sizes[piece] = sum(len(table) for table in self._tables(piece, 0, 1024))
        return self.sizes[piece]

    def _sample(self, index: int, cell: dict[str, Any], epoch: int) -> Sample:
        where = partial(self.source.where, "row {1} of file {0}".format(*divmod(index, ROWS)))
        picture = cell[self.source.image]
        pixels = decode(_content(picture, where), self.frame, where((picture or {}).get("path")))
        values: dict[str, Any] = {}
        if self.source.label is not None:
            label = cell[self.source.label]
            if label is None or label < 0:
                raise BadSample(f"picture {where(None)}: has no {self.source.label}; remove it")
            values["labels"] = label
        if (captions := self._captions(cell, where(None))) is not None:
            values[ARGUMENT] = texts.chosen(captions[0], index, epoch)
        return pixels.float() / 255, values

    def _captions(self, cell: dict[str, Any], where: str) -> Captions | None:
        """Of that row alone."""
        if self.templates:
            assert self.source.label is not None
            return Templates(self.templates, self.class_names, [cell[self.source.label]])
        return None if self.source.text is None else texts.Listed([cell[self.source.text]], lambda _: where)

    def _first_captions(self, count: int) -> tuple[str, ...]:
        """Of the first classes, or of the first rows of the first file."""
        source = self.source
        if self.templates:
            found: Captions = Templates(self.templates, self.class_names, range(len(self.class_names)))
            return texts.facts(found, range(min(count, len(self.class_names))))["examples"]
        tables = source.rows.select_columns(source.text).with_format("arrow").iter(batch_size=count)
        cells = [cell[source.text] for cell in next(iter(tables)).to_pylist()]
        return texts.facts(texts.Listed(cells, str), range(len(cells)))["examples"]

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names, and their sizes where they are at hand (names on the hub hold the commit); of the
        columns, the lanes, the buffer and what pictures are cropped to."""
        s = self.source
        files = [file if "://" in file else f"{Path(file).name} {_file_size(file)}" for file in s.files]
        parts = [self.frame, s.split, s.image, s.label, s.class_names, self.pieces, self.lanes, self.block, files]
        parts += [s.text, self.templates] if ARGUMENT in self.facts else []
        parts += [self.class_names] if self.class_names != s.class_names and self.templates else []
        return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()


class Kept(Dataset):
    """Samples in memory, in 8 bits."""

    def __init__(self, samples: Sequence[Sample], facts: dict[str, dict[str, Any]]):
        self.samples = [((data * 255).round().to(torch.uint8), values) for data, values in samples]
        self.facts = facts

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        pixels, values = self.samples[index]
        return pixels.float() / 255, values

    def values(self, index: int) -> dict[str, Any]:
        return self.samples[index][1]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pixels, values in self.samples:
            digest.update(pixels.numpy().tobytes() + repr(values).encode())
        return digest.hexdigest()


def first(stream: Rows, count: int) -> list[Sample]:
    """The first usable samples in the order of seed 0, lane by lane in turn; ValueError when there are fewer."""
    lanes = [stream.read(0, lane, 0) for lane in range(stream.lanes)]
    found: list[Sample] = []
    seen: set[int] = set()
    done: set[int] = set()
    while len(found) < count:
        if len(done) == stream.lanes:
            raise ValueError(
                f"data.held_out: {count}, but data.held_out_split has only {len(found)} usable pictures; hold out fewer"
            )
        for lane in sorted(set(range(stream.lanes)) - done):
            index, load = next(lanes[lane])
            if index in seen:
                done.add(lane)  # its next epoch
                continue
            seen.add(index)
            try:
                found.append(load())
            except BadSample:
                continue
            if len(found) == count:
                break
    return found
