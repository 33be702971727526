"""Samples from Hugging Face data sets, read by the library `datasets`: a table with random access, or a stream.

Only parquet, arrow and folders of images or videos are opened: no loading scripts, no pickle.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...listings import ALONE, Listings
from ...maths.streams import generator
from ...plain_text import count_of
from ..base import BadSample, Dataset, Splits, Stream
from . import captions as texts
from .captions import ARGUMENT, Captions, TemplateCaptions
from .collection import (
    CollectionDataset,
    DatasetMaker,
    EncodedCollection,
    FileDecoder,
    configured_names,
    divide,
    with_names,
)
from .config import HUB, MediaData
from .pixels import Frame

FORMATS = ("parquet", "arrow", "imagefolder", "videofolder")
"""Supported builders of the library."""
CHUNKS = 1024
"""Largest number of chunks that a stream's files are grouped into; lanes are assigned chunks."""
FIRST = 256
"""Rows of a stream whose captions are looked at before training."""
LANES = 64
"""Default number of lanes, if there are enough files."""
ROWS = 1 << 32
"""The sample in row `row` of chunk `chunk` of a stream has the index chunk * ROWS + row."""

HubSample = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Column:
    """The kind of column that contains the samples.

    field: the setting that names the column, `NOUN_column`; feature: its feature type in `datasets`; decoder: of its
    bytes.
    """

    field: str
    feature: str
    decoder: FileDecoder

    @property
    def noun(self) -> str:
        """What messages call a sample."""
        return self.field.removesuffix("_column")


def splits(
    config: MediaData, column: Column, name: str | None, frame: Frame, make: DatasetMaker = CollectionDataset,
    streams: tuple[type[HubStream], type[HubStream]] | None = None, listings: Listings = ALONE,
) -> Splits:  # fmt: skip
    """Open the training and held-out samples; ValueError names the field, the problem and the fix.

    name: of the column; None: the only one of its feature type. make: builds a data set of some samples. streams:
    the classes of a stream of training and of held-out samples; None: HubStream.
    """
    if config.held_out_split is not None and not config.held_out:
        raise ValueError(
            f"data.held_out: 0, but data.held_out_split is {config.held_out_split!r}; set how many of its "
            f"{column.noun}s to hold out"
        )
    if config.streaming:
        return _stream_splits(config, column, name, frame, *(streams or (HubStream, HubStream)), listings)
    table = HubTable(_HubSplit(config, config.split, column, name, listings), frame, config.cache)
    collection = with_names(table, config)
    if config.held_out_split is None:
        return divide(collection, config.held_out, make)
    other = HubTable(_HubSplit(config, config.held_out_split, column, name, listings), frame, config.cache)
    with_names(other, config)
    _same_classes(table.source.class_names, other.source.class_names, config)
    total = len(other.names)
    count = round(config.held_out * total) if config.held_out < 1 else int(config.held_out)
    held_out = make(other, range(total)) if count == total else divide(other, count, make).held_out
    return Splits(make(collection, range(len(collection.names))), held_out)


def _stream_splits(
    config: MediaData, column: Column, name: str | None, frame: Frame, training: type[HubStream],
    evaluation: type[HubStream], listings: Listings,
) -> Splits:  # fmt: skip
    train = training(_HubSplit(config, config.split, column, name, listings), config, frame)
    if not config.held_out:
        return Splits(train, InMemory([], train.facts))
    if config.held_out_split is None:
        raise ValueError(
            f"data.held_out: {config.held_out:g}, but a stream cannot leave samples out of the split it trains on; "
            "name another split with data.held_out_split, or set data.held_out=0"
        )
    if config.held_out < 1:
        raise ValueError(
            f"data.held_out: {config.held_out:g}, a fraction, but the size of a stream is unknown; give a number"
        )
    other = evaluation(_HubSplit(config, config.held_out_split, column, name, listings), config, frame)
    _same_classes(train.source.class_names, other.source.class_names, config)
    held_out = listings.share(lambda: first_samples(other, int(config.held_out)))
    return Splits(train, InMemory(held_out, train.facts))


def _same_classes(train: Sequence[str], held_out: Sequence[str], config: MediaData) -> None:
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
            f'data.path: {HUB}... needs the library `datasets`, which is not installed; pip install "unilatent[data]"'
        ) from error
    return datasets


class _HubSplit:
    """One split of a data set: its rows, columns and files."""

    def __init__(
        self, config: MediaData, split: str, column: Column, name: str | None, listings: Listings = ALONE
    ):  # fmt: skip
        assert config.path is not None
        self.path, self.config, self.split = config.path.removeprefix(HUB), config, split
        self.column, self.listings = column, listings
        self.files: list[str] = []
        self.counted = False
        """Whether the files are parquet, whose footers contain their number of rows."""
        self.size: int | None = None
        """Number of rows, if known without reading."""
        self.rows = self._shared()
        data = self._find_column(column.field, column.feature, name)
        self.label = self._find_column("label_column", "ClassLabel", config.label_column)
        if data is None:
            raise ValueError(
                f"data.{column.field}: {config.path} has no column of {column.noun}s, only {self._columns()}; "
                f"give another data.path, or give the column the feature type {column.feature}"
            )
        self.data: str = data
        features = self.rows.features
        self.text = self._text_column() if config.captions and not config.templates else None
        used = [column for column in (self.data, self.label, self.text) if column is not None]
        self.class_names: tuple[str, ...] = tuple(features[self.label].names) if self.label else ()
        undecoded = getattr(_library(), column.feature)(decode=False)  # `decode` below also names what fails
        self.rows = self.rows.select_columns(used).cast_column(self.data, undecoded)

    def where(self, number: object, path: str | None) -> str:
        """Describe a row, for messages."""
        return f"{number} of {self.split} in {self.config.path}" + (f" ({path})" if path else "")

    def decode(self, cell: dict[str, Any] | None, frame: Frame, number: str) -> Tensor:
        """Decode the sample in a cell, uint8; BadSample names its row and its file."""
        return self.column.decoder(self.content(cell, number), frame, self.where(number, (cell or {}).get("path")))

    def content(self, cell: dict[str, Any] | None, number: str) -> bytes:
        """Return the bytes of the sample in a cell; BadSample names its row."""
        return _content(cell, self.column.noun, partial(self.where, number))

    def _shared(self) -> Any:
        """Open the split in the first process, which finds the files, and in the others what it opened.

        A table is a number of arrow files, which are mapped, if this machine has them; else this process opens the
        split itself. A stream is sent as it is.
        """
        opened: list[Any] = []

        def look() -> dict[str, Any]:
            rows = self._open()
            opened.append(rows)
            known = {"files": self.files, "counted": self.counted, "size": self.size}
            if self.config.streaming:
                return {**known, "stream": rows}
            whole = rows._indices is None and rows.cache_files
            return {**known, "arrow": [file["filename"] for file in rows.cache_files] if whole else []}

        found = self.listings.share(look)
        self.files, self.counted, self.size = found["files"], found["counted"], found["size"]
        if opened:
            return opened[0]
        if self.config.streaming:
            return found["stream"]
        if not found["arrow"] or not all(map(os.path.isfile, found["arrow"])):
            return self._open()
        library = _library()
        return library.concatenate_datasets([library.Dataset.from_file(file) for file in found["arrow"]])

    def _open(self) -> Any:
        """Open the split: a datasets.Dataset, or an IterableDataset when streaming."""
        folder = Path(self.path).expanduser()
        if self.path.startswith((".", "/", "~")) and not folder.is_dir():
            raise ValueError(
                f"data.path: {folder} is not a folder; give one of parquet or arrow files, or {HUB}OWNER/NAME"
            )
        try:
            splits = self._load_saved(folder) or self._build(folder)
        except ValueError as error:
            if str(error).startswith("data."):
                raise
            raise self._not_opened(error) from error
        except Exception as error:  # OSError, ConnectionError, errors of pyarrow and the hub
            raise self._not_opened(error) from error
        if self.split not in splits:
            fields = {self.config.split: "data.split", self.config.held_out_split: "data.held_out_split"}
            known = ", ".join(map(str, splits))
            raise ValueError(f"{fields[self.split]}: {self.split!r} is not in {self.config.path}; it has {known}")
        return splits[self.split]

    def _not_opened(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return ValueError(
            f"data.path: {self.config.path} cannot be opened ({type(error).__name__}: {reason}); check its name, "
            f"data.revision and the network, or download it and give {HUB}FOLDER"
        )

    def _load_saved(self, folder: Path) -> dict[str, Any] | None:
        """Load what `save_to_disk` wrote, by split; None if the folder is something else."""
        one, several = (folder / "state.json").is_file(), (folder / "dataset_dict.json").is_file()
        if not (one or several):
            return None
        loaded = _library().load_from_disk(str(folder))
        splits = {self.split: loaded} if one else dict(loaded)
        if self.split in splits:
            table = splits[self.split]
            self.files, self.size = [file["filename"] for file in table.cache_files], len(table)
            if self.config.streaming:
                splits[self.split] = table.to_iterable_dataset(num_shards=max(1, min(LANES, len(table))))
        return splits

    def _build(self, folder: Path) -> dict[str, Any]:
        """Open a data set on the hub, or a folder of files, by split."""
        name = str(folder) if folder.is_dir() else self.path
        builder = _library().load_dataset_builder(name, revision=self.config.revision)
        if builder.name not in FORMATS:
            raise ValueError(f"data.path: {self.config.path} is in the format {builder.name}; use {', '.join(FORMATS)}")
        files = dict(builder.config.data_files or {})
        self.files = list(map(str, files.get(self.split, [])))
        self.counted = builder.name == "parquet"
        if self.config.streaming:
            splits = dict(builder.as_streaming_dataset())
            known = (builder.info.splits or {}).get(self.split)
            self.size = known.num_examples if known and known.num_examples else None
            return splits
        builder.download_and_prepare()
        return dict(builder.as_dataset())

    def _columns(self) -> str:
        """List all columns, for messages."""
        return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in self.rows.features.items())

    def _find_column(self, field: str, kind: str, name: str | None) -> str | None:
        """Return the named column, or the only one of that feature type; None if there is none."""
        if self.rows.features is None:
            raise ValueError(
                f"data.path: the columns of {self.config.path} are unknown when streaming; leave data.streaming out"
            )
        columns = [column for column, feature in self.rows.features.items() if type(feature).__name__ == kind]
        if name is not None and name not in columns:
            raise ValueError(f"data.{field}: {name!r} is not a column of type {kind}; there are {self._columns()}")
        if name is None and len(columns) > 1:
            raise ValueError(f"data.{field}: not set, and there are {', '.join(columns)}; name one")
        return name or (columns[0] if columns else None)

    def _text_column(self) -> str | None:
        """Return the configured caption column, or the first text column with a usual name."""
        columns = [column for column, feature in self.rows.features.items() if _is_text(feature)]
        name = self.config.caption_column
        if name is not None and name not in columns:
            raise ValueError(f"data.caption_column: {name!r} is not a column of texts; there are {self._columns()}")
        return name or next(filter(texts.COLUMNS.fullmatch, columns), None)


def _is_text(feature: Any) -> bool:
    """Whether a feature is a text or a list of texts, in the notations of different versions of the library."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _content(cell: dict[str, Any] | None, noun: str, where: Callable[[str | None], str]) -> bytes:
    """Return the bytes in a cell, or of the file that the cell names."""
    path = (cell or {}).get("path")
    raw = (cell or {}).get("bytes")
    if raw is not None:
        return bytes(raw)
    if path is None:
        raise BadSample(f"{noun} {where(None)}: the cell is empty; remove the row")
    try:
        if "://" in path:
            import fsspec

            with fsspec.open(path, "rb") as remote:
                return bytes(remote.read())
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"{noun} {where(path)}: {error.strerror or error}; make it readable or remove it") from error


# ---- random access -------------------------------------------------------------------------------------------------


class HubTable(EncodedCollection):
    """A split with random access; its names are row numbers."""

    def __init__(self, source: _HubSplit, frame: Frame, cache: bool):
        rows = len(source.rows)
        super().__init__(rows, frame, cache)
        self.source, self.listings = source, source.listings
        if not rows:
            raise ValueError(
                f"data.path: {source.config.path} holds no {source.column.noun}s in {source.split}; choose another"
            )
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
            self.captions = texts.TableCaptions(cells, lambda row: source.where(f"row {row}", None))

    def decode(self, index: int) -> Tensor:
        cell = self.source.rows[index][self.source.data]
        return self.source.decode(cell, self.frame, f"row {index}")

    def content(self, index: int) -> bytes:
        return self.source.content(self.source.rows[index][self.source.data], f"row {index}")

    def where(self, index: int) -> str:
        return self.source.where(f"row {index}", None)

    def stamp(self, index: int) -> str:
        """Return size and name of the file, and the label."""
        return self._stamps[index]

    @cached_property
    def _stamps(self) -> list[str]:
        """All stamps. Sizes come from the table's offsets, without reading the samples."""
        import pyarrow.compute as pc

        column = self.source.rows.with_format("arrow")[:][self.source.data]
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


class HubStream(Stream):
    """A split that is read in order.

    Its files are grouped into at most 1,024 chunks. Each epoch assigns the chunks to the lanes in a new order, a
    function of (seed, epoch). A lane reads its chunks in sequence and shuffles each block of shuffle_buffer / lanes
    rows. The library's own shuffling is not used: it differs between versions, and its buffer is lost on resuming. A
    lane starts its next epoch when its chunks end; in an epoch of all lanes each row occurs once.
    """

    def __init__(self, source: _HubSplit, config: MediaData, frame: Frame):
        self.source, self.frame = source, frame
        self.class_names = configured_names(source.class_names, config, listings=source.listings)
        self.facts: dict[str, dict[str, Any]] = {}
        if source.label:
            self.facts["labels"] = {"class_names": self.class_names}
        self.templates = config.templates
        if self.templates:
            TemplateCaptions(self.templates, self.class_names, [] if source.label else None)  # checks for classes
        if self.templates or source.text:
            self.facts[ARGUMENT] = {"examples": source.listings.share(lambda: self._first_captions(texts.SHOWN))}
        shards = source.rows.num_shards
        self.chunks = min(shards, CHUNKS)
        self.lanes = config.lanes or 1 << (min(self.chunks, LANES).bit_length() - 1)
        if self.lanes > self.chunks:
            raise ValueError(
                f"data.lanes: {self.lanes}, but {config.path} has only {count_of(self.chunks, 'file')}; set fewer: "
                f"data.lanes={self.chunks}"
            )
        self.block = max(1, config.shuffle_buffer // self.lanes)
        """Rows of a lane that are shuffled together."""
        self.by_file = source.counted and shards == self.chunks == len(source.files)
        """Whether each chunk is one parquet file, whose footer contains its number of rows."""
        self.sizes: dict[int, int] = {}
        """Known numbers of rows, by chunk."""
        local = self.by_file and all("://" not in file for file in source.files)
        if local:
            self.sizes = source.listings.share(lambda: {chunk: self._size(chunk) for chunk in range(self.chunks)})
        counted = sum(self.sizes.values()) if local else None
        self.size = config.num_samples or source.size or counted

    def read(self, seed: int, lane: int, place: int) -> Iterator[tuple[int, Callable[[], HubSample]]]:
        epoch, empty_epochs = 0, 0
        while True:
            order = torch.randperm(self.chunks, generator=generator("pieces", seed, epoch)).tolist()[lane :: self.lanes]
            if place and (rows := sum(map(self._size, order))) <= place:  # finished epochs are not read again
                place -= rows
                epoch += 1
                continue
            number, place = divmod(place, self.block)
            raw = self._raw(order, number * self.block)
            empty = True
            while block := list(islice(raw, self.block)):
                empty = False
                key = ("buffer", seed, epoch, lane, number)
                for row in torch.randperm(len(block), generator=generator(*key)).tolist()[place:]:
                    index, cell = block[row]
                    yield index, partial(self._sample, index, cell, epoch)
                number, place = number + 1, 0
            empty_epochs = empty_epochs + 1 if empty else 0
            if empty_epochs > self.chunks:
                raise ValueError(
                    f"data.path: {self.source.config.path} holds no {self.source.column.noun}s in {self.source.split}"
                )
            epoch += 1

    def _raw(self, order: list[int], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows of some chunks from row `start` on: index and undecoded cells."""
        for chunk in order:
            if start and start >= (size := self._size(chunk)):
                start -= size
                continue
            row = start
            for table in self._tables(chunk, start):
                for cell in table.to_pylist():
                    yield chunk * ROWS + row, cell
                    row += 1
            self.sizes[chunk], start = row, 0

    def _tables(self, chunk: int, start: int, rows: int = 16) -> Iterator[Any]:
        """Read a chunk in tables. Uses `iter`, because the library's plain iterator skips rows in a data worker."""
        part = self.source.rows.shard(num_shards=self.chunks, index=chunk, contiguous=False)
        part = part.skip(start) if start else part
        yield from part.with_format("arrow").iter(batch_size=rows)

    def _size(self, chunk: int) -> int:
        """Return the number of rows of a chunk, from the footer of a parquet file or by reading it once."""
        if chunk not in self.sizes:
            if self.by_file:
                import fsspec
                import pyarrow.parquet as parquet

                with fsspec.open(self.source.files[chunk], "rb") as file:
                    self.sizes[chunk] = parquet.ParquetFile(file).metadata.num_rows
            else:
                self.sizes[chunk] = sum(len(table) for table in self._tables(chunk, 0, 1024))
        return self.sizes[chunk]

    def _sample(self, index: int, cell: dict[str, Any], epoch: int) -> HubSample:
        row = "row {1} of file {0}".format(*divmod(index, ROWS))
        sample = self._decoded(index, cell[self.source.data], row, epoch)
        where = self.source.where(row, None)
        values: dict[str, Any] = {}
        if self.source.label is not None:
            label = cell[self.source.label]
            if label is None or label < 0:
                raise BadSample(f"{self.source.column.noun} {where}: has no {self.source.label}; remove it")
            values["labels"] = label
        if (captions := self._captions(cell, where)) is not None:
            values[ARGUMENT] = texts.chosen(captions[0], index, epoch)
        return sample, values

    def _decoded(self, index: int, cell: dict[str, Any] | None, row: str, epoch: int) -> Tensor:
        """Return the sample in a cell, as training uses it in an epoch; BadSample if it cannot be decoded."""
        return self.source.decode(cell, self.frame, row).float() / 255

    def _captions(self, cell: dict[str, Any], where: str) -> Captions | None:
        """Return the captions of one row, as a collection of one sample."""
        if self.templates:
            assert self.source.label is not None
            return TemplateCaptions(self.templates, self.class_names, [cell[self.source.label]])
        return None if self.source.text is None else texts.TableCaptions([cell[self.source.text]], lambda _: where)

    def _first_captions(self, count: int) -> tuple[str, ...]:
        """Return captions of the first classes, or of the first rows of the first file."""
        source = self.source
        if self.templates:
            captions: Captions = TemplateCaptions(self.templates, self.class_names, range(len(self.class_names)))
            return texts.facts(captions, range(min(count, len(self.class_names))))["examples"]
        tables = source.rows.select_columns(source.text).with_format("arrow").iter(batch_size=count)
        cells = [cell[source.text] for cell in next(iter(tables)).to_pylist()]
        return texts.facts(texts.TableCaptions(cells, str), range(len(cells)))["examples"]

    def some_values(self, argument: str, count: int) -> list[Any]:
        """Return the different captions of the first rows; more of them would cost a download."""
        return list(self._first_captions(min(count, FIRST))) if argument == ARGUMENT and argument in self.facts else []

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the frame, the columns, the lanes, the buffer, and the files' names and local sizes.

        Names of files on the hub contain the commit.
        """
        s = self.source
        files = [file if "://" in file else f"{Path(file).name} {_file_size(file)}" for file in s.files]
        parts = [self.frame, s.split, s.data, s.label, s.class_names, self.chunks, self.lanes, self.block, files]
        parts += [s.text, self.templates] if ARGUMENT in self.facts else []
        parts += [self.class_names] if self.class_names != s.class_names and self.templates else []
        return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()


class InMemory(Dataset):
    """Samples in memory, in 8 bits; returned as they were given, in [0, 1] or as uint8."""

    def __init__(self, samples: Sequence[HubSample], facts: dict[str, dict[str, Any]]):
        self.eight_bits = any(data.dtype == torch.uint8 for data, _ in samples)
        self.samples = [
            (data if self.eight_bits else (data * 255).round().to(torch.uint8), values) for data, values in samples
        ]
        self.facts = facts

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        pixels, values = self.samples[index]
        return pixels.clone() if self.eight_bits else pixels.float() / 255, values

    def values(self, index: int) -> dict[str, Any]:
        return self.samples[index][1]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pixels, values in self.samples:
            digest.update(pixels.numpy().tobytes() + repr(values).encode())
        return digest.hexdigest()


def first_samples(stream: HubStream, count: int) -> list[HubSample]:
    """Return the first usable samples in the order of seed 0, taking lanes in turn; ValueError if there are fewer."""
    lanes = [stream.read(0, lane, 0) for lane in range(stream.lanes)]
    samples: list[HubSample] = []
    seen: set[int] = set()
    done: set[int] = set()
    while len(samples) < count:
        if len(done) == stream.lanes:
            raise ValueError(
                f"data.held_out: {count}, but data.held_out_split has only {len(samples)} usable samples; use fewer"
            )
        for lane in sorted(set(range(stream.lanes)) - done):
            index, load = next(lanes[lane])
            if index in seen:
                done.add(lane)  # the lane has started its next epoch
                continue
            seen.add(index)
            try:
                samples.append(load())
            except BadSample:
                continue
            if len(samples) == count:
                break
    return samples
