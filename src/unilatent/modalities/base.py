"""The contract of a modality. The rest of the package reads and writes samples only through these classes.

To add a modality, create `modalities/NAME/__init__.py` with one subclass of `Modality`. A good order of work:

1. Configuration: `Config` (what a sample is, stored with every model) and `DataConfig` (where samples come from), each
   with a `small()` that trains in seconds: the contract tests build every modality from it.
2. Data: a `Dataset` for `splits`, then `collate`, `check`, `augment`. `Data` below is the batch that `collate` returns.
3. Tokens: `channels`, `max_tokens`, `axes`, `pack`, `unpack`, `finish`, `sample_layout` (`types.Tokens` holds values
   (B, N, C), `types.Layout` their positions and padding).
4. Loss: `reconstruction_loss`, and `ideal` where the best prediction is not `pack(data)`.
5. Files: `read`, `write`, `draw_grid`, `arrays`.
6. Evaluation: `errors`, `preprocessing`, `resolution`, then feature extractors (`spaces`) and `metrics`.

`Modality` declares its members in this order. Abstract members are required; all others have a default that suits a
modality without the feature. `tests/contracts/test_modality.py` checks each promise, with one random stream per sample
(`maths.streams.Streams`) where one is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..config import Config as Settings
from ..controls import Control
from ..listings import ALONE, Listings
from ..maths.streams import Streams, generator
from ..nets.fields import TokenField
from ..processes import Processes
from ..progress import Progress, no_progress
from ..records import Rows
from ..types import Given, Layout, Tokens, count, join, move, take

# ---- data ----------------------------------------------------------------------------------------------------------


class BadSample(ValueError):
    """A sample that cannot be used. The message has its path and the reason; training counts and replaces it."""


class NothingFound(ValueError):
    """A folder or archive that holds no samples of a modality."""


Skipped = Callable[[str], object]
"""Called with what is wrong with a sample that is left out."""


class CountedBatches(Iterator[tuple[Any, list[str]]]):
    """Batches of data with the names of their samples, and how many samples there are, unusable ones included."""

    def __init__(self, total: int, batches: Iterator[tuple[Any, list[str]]]):
        self.total, self.batches = total, batches

    def __next__(self) -> tuple[Any, list[str]]:
        return next(self.batches)

    @staticmethod
    def total_of(batches: Iterator[tuple[Any, list[str]]]) -> int | None:
        """Return the number of samples, None if nobody counted them."""
        return batches.total if isinstance(batches, CountedBatches) else None


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> list[int]:
    """Return a uniformly random order of the samples of an epoch."""
    return torch.randperm(size, generator=generator("order", seed, epoch)).tolist()


class Dataset(ABC):
    """A map-style data set. A sample is a pure function of its index; augmentation happens later, on batches."""

    facts: dict[str, dict[str, Any]]
    """What the data knows about each condition it has values for: argument (e.g. "labels") -> keyword arguments of
    `ConditionConfig.with_data` (e.g. `class_names`)."""

    hints: Mapping[str, str] = {}
    """Why the data may have no values for a condition although their owner thinks so: argument -> what was found."""

    columns: tuple[str, ...] = ()
    """Names of the numbers that `numbers_of` returns, whether or not a model is conditioned on them."""

    notes: Sequence[str] = ()
    """What was found with the samples and is not used (files that are not read, say), one line each."""

    details: Mapping[str, str] = {}
    """How samples are chosen from what lies at the source, in words: part of the protocol of a number."""

    @abstractmethod
    def __len__(self) -> int: ...

    def numbers_of(self, index: int) -> dict[str, float]:
        """Return a sample's known numbers by column; NaN where one is unknown. Only called if there are `columns`."""
        raise AssertionError(f"{type(self).__name__} has no columns")

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Return one sample without a batch axis, as `Modality.collate` takes it, and its condition values by argument.

        BadSample if this sample cannot be used.
        """

    def index_at(self, seed: int, position: int) -> int:
        """Return the index of the sample at a position: a global sample index over an infinite sequence of epochs.

        Each epoch is a new permutation; batches cross the ends of epochs and nothing is dropped. A pure function. An
        override may keep neighbouring positions close on disk.
        """
        epoch, place = divmod(position, len(self))
        return permutation(seed, epoch, len(self))[place]

    def view(self, index: int, position: int) -> tuple[Any, dict[str, Any]]:
        """Return a sample as training uses it at a position; an override may choose by it (e.g. a clip of a video)."""
        return self[index]

    def values(self, index: int) -> dict[str, Any]:
        """Return a sample's condition values; BadSample if they cannot be read.

        An override may leave the sample itself unread; then it does not detect samples that cannot be used.
        """
        return self[index][1]

    def some_values(self, argument: str, count: int) -> list[Any]:
        """Return values of one condition in up to `count` samples, read without the samples; none if that cannot be."""
        return []

    def adopt(self, argument: str, stored: dict[str, Any]) -> None:
        """Give a condition's values the meaning that its stored configuration has, where the data leave a choice (the
        order of classes). Default: nothing."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the samples or their order change."""


class Stream(Dataset):
    """A data set that can only be read in order, as `lanes`: interleaved shard streams that are read in parallel.

    Each lane is infinite. Position p is place p // lanes of lane p % lanes. The number of lanes belongs to the data and
    never depends on the number of processes. A process that reads every n-th position reads only lanes of its own if n
    divides the number of lanes; otherwise it skips over the samples of other processes.
    """

    lanes: int
    size: int | None
    """Number of samples of an epoch; None if unknown."""

    @abstractmethod
    def read(self, seed: int, lane: int, place: int) -> Iterator[tuple[int, Callable[[], tuple[Any, dict[str, Any]]]]]:
        """Yield the samples of a lane from a place on, without end; a pure function of the arguments.

        Each comes as a number that identifies the sample across epochs, and a function that loads it as `__getitem__`
        would (and may raise BadSample), so that skipping a sample is cheap.
        """

    def __len__(self) -> int:
        if self.size is None:
            raise ValueError(
                "data.num_samples: not set, and the stream does not say how many samples an epoch has; give "
                "data.num_samples=NUMBER, or "
                "count in steps (training.steps, training.schedule.unit=steps)"
            )
        return self.size

    def index_at(self, seed: int, position: int) -> int:
        """Return the position itself: a stream has no random access, so no other index."""
        return position

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        raise TypeError("a stream is read in order")


@dataclass(frozen=True)
class Splits:
    """Training samples, and held-out samples that no training step uses (possibly none)."""

    train: Dataset
    held_out: Dataset

    @property
    def shown(self) -> Dataset:
        """The samples that are drawn and analysed: held-out ones, or training samples if none are held out."""
        return self.held_out if len(self.held_out) else self.train


@dataclass(frozen=True)
class CheckedRecords:
    """What `Modality.verify` found: the number of records, what is wrong with each bad one, remarks on others, and the
    files that may hold samples of this or another modality and were not read."""

    total: int
    bad: Sequence[str]
    notes: Sequence[str]
    unread: frozenset[str]


class Raw(ABC):
    """The files of a folder or archive, to be verified or written to shards (a `shards.writing.RawSamples`)."""

    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    notes: Sequence[str] = ()
    """What was found with the samples and is not used, one line each."""

    @abstractmethod
    def check(self, number: int) -> str:
        """ValueError if the sample cannot be used. Returns a remark on a usable one; "" without."""

    @abstractmethod
    def encode(self, number: int) -> tuple[str, bytes]:
        """Return the suffix and content of a sample as stored in a shard; ValueError if it cannot be used."""

    def beside(self, number: int) -> Sequence[tuple[str, bytes]]:
        """Return suffix and content of a sample's other files in a shard (e.g. its captions); ValueError if one cannot
        be used. Default: none."""
        return ()

    def adopt(self, class_names: Sequence[str]) -> None:
        """Number the classes as shards that exist already, where these are the same. Default: nothing."""
        return None

    @abstractmethod
    def stamp(self, number: int) -> str:
        """Return what identifies the file's version without reading it (e.g. size and modification time)."""


# ---- evaluation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A metric result: one number of an evaluation.

    key: its short identifier ("fid"). name: its name in tables. better: "higher", "lower" or "same" (closer to the
    baselines is better). beside: baselines to compare it with, name -> number. spread: its standard error or, where the
    metric is published so, a standard deviation; None if it is not known. headline: whether the short table in the
    terminal has it. parts: the numbers that it is the mean of, name -> number; empty if it is no such mean.
    """

    key: str
    name: str
    value: float
    unit: str = ""
    better: str = "higher"
    beside: dict[str, float] = field(default_factory=dict)
    spread: float | None = None
    headline: bool = True
    parts: dict[str, float] = field(default_factory=dict)


class Space(ABC):
    """A feature extractor: turns each sample into the tensors that metrics read. Independent of the evaluated model."""

    name: ClassVar[str]
    weights: str | None = None
    """SHA-256 of its weights, set by `prepare` and `fit`; None without weights. Numbers are comparable only where it
    is equal."""
    needs_download: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    """Whether it is slow or lacks an installed package: used only if one of its metrics is requested by name."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the extractors, listed before this one, whose tensors `fit` reads."""
    silent: bool = False
    """Whether `fit` found that it has no output for this data; then no set is run through it."""
    compares: ClassVar[bool] = False
    """Whether its only output is that of `against`, for pairs of a reconstruction and its original."""
    details: Mapping[str, str] = {}
    """What its features depend on besides data and weights, in words: part of the protocol of its numbers."""
    loaded: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold the networks `prepare` loads. With several processes, the first one loads them."""
    fitted: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold what `fit` finds: networks on the CPU, plain data. The first process fits for all."""
    progress: Progress = staticmethod(no_progress)
    """Called during a batch that takes long; an exception of it, such as that of a stop, ends the batch."""

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` does anything."""
        return type(self).fit is not Space.fit

    def prepare(self, device: torch.device) -> None:
        """Load the weights before first use; ValueError names what is missing. Default: nothing."""
        return None

    def fit(self, train: Rows) -> None:
        """Fit to the tensors that earlier extractors returned for real training samples. Default: nothing."""
        return None

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what `prepare` (names: `loaded`) or `fit` (`fitted`) has set, for `adopt` in other processes."""
        return {name: getattr(self, name, None) for name in ("weights", "silent", *names)}

    def adopt(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take the `state` of another process, in place of `prepare` or `fit`."""
        self.device = device
        for name, value in state.items():
            setattr(self, name, value.to(device) if name in self.loaded else value)

    @abstractmethod
    def __call__(self, data: Any) -> dict[str, Tensor]:
        """Return the features of a batch of Data on any device: name -> (B, ...) on the CPU.

        A sample's features do not depend on its batch, up to rounding. Empty if there is no output for this data.
        ValueError if samples hold NaN.
        """

    def against(self, made: Any, data: Any) -> dict[str, Tensor]:
        """Return features (B,) of reconstructions (`made`) paired with their originals. Default: none."""
        return {}

    def controls(self, data: Any) -> dict[str, Tensor]:
        """Return features of samples spoiled in a known way, for baselines. Called with held-out real samples only.
        Names differ from those of `__call__`. Default: none."""
        return {}


@dataclass(frozen=True)
class Evidence:
    """Metric inputs: the features of up to four sets of samples, with condition values as tensors by argument.

    train: real samples, the reference of distances. held_out: real samples that no training step used. samples:
    generated ones. reconstructions: of `held_out`, in its order, with `Modality.errors` as tensors. unconditional:
    generated without any condition, where a metric needs them (`Metric.needs_unconditional`). None: not available.
    train_total: number of samples that `train` was chosen from; None if unknown. columns: argument of a condition ->
    the column of the data that its values are. progress: for metrics that take long; it may raise an exception.
    """

    train: Rows | None = None
    held_out: Rows | None = None
    samples: Rows | None = None
    reconstructions: Rows | None = None
    train_total: int | None = None
    unconditional: Rows | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = no_progress

    def compared(self, track: str) -> tuple[Rows | None, Rows | None]:
        """Return the set that a track is about, and the real samples that it is compared with."""
        return (self.samples, self.train) if track == "generation" else (self.reconstructions, self.held_out)

    def describe_train(self, what: str) -> str:
        """Describe the size of `train` for the name of a row: "the 300 training molecules", "200 of the 300 ..."."""
        used, total = len(self.train or ()), self.train_total
        if total is None:
            return f"{used:,} training {what}"
        return f"{'' if used >= total else f'{used:,} of '}the {total:,} training {what}"


class Metric(ABC):
    """Computes one kind of number from features. Returns no row for what the inputs do not allow to compute."""

    space: str | None = None
    """Name of the Space whose features it reads; None: only `Modality.errors`, or several (`spaces`)."""
    gives: tuple[str, ...] = ()
    """Keys of the rows it can return."""
    track: str = "generation"
    """"generation" or "reconstruction"."""
    details: Mapping[str, str] = {}
    """What its numbers depend on besides its Space, in words: part of their protocol."""
    needs_held_out: bool = False
    """Whether held-out real samples are its baseline: they are passed through its Space even if that is a large one."""
    most_samples: int | None = None
    """It reads at most this many samples, the first ones; None: all."""
    most_reference: int | None = None
    """The same for real samples."""
    relative: bool = False
    """Whether its numbers are relative to those of held-out real samples, or without any to those of a half of the
    reference, which are then part of their protocol."""

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of all Spaces whose features it reads. Default: `space`."""
        return () if self.space is None else (self.space,)

    def used(self, evidence: Evidence) -> tuple[int, int]:
        """Return how many samples its numbers are computed from, and with how many real ones these are compared."""
        rows, real = evidence.compared(self.track)
        return _count(rows, self.most_samples), _count(real, self.most_reference)

    def needs_unconditional(self, columns: Mapping[str, str]) -> bool:
        """Whether samples without any condition are a baseline of it, if conditions have values of these columns
        (argument -> column). Default: no."""
        return False

    @abstractmethod
    def __call__(self, evidence: Evidence) -> list[Row]: ...


def _count(rows: Rows | None, most: int | None) -> int:
    count = 0 if rows is None else len(rows)
    return count if most is None else min(count, most)


# ---- the modality --------------------------------------------------------------------------------------------------


class Modality(ABC):
    """A kind of sample: conversion to and from tokens, loss, drawing, files, data sets and metrics. Has no weights.

    `Data` is a batch of samples in this modality's own form (images: (B, C, H, W) float32 in [0, 1]).
    """

    # ---- configuration

    Config: ClassVar[type[Settings]]
    DataConfig: ClassVar[type[Settings]]

    hub_tasks: ClassVar[tuple[str, str]] = ("", "")
    """The hub's names for drawing samples, without and with a text to draw; "" if it has none."""

    metric_sources: ClassVar[tuple[str, ...]] = ()
    """Settings that name a file, a folder or a hub id of a network that only losses and metrics read."""

    compiles_losses = False
    """Whether networks of the loss run compiled; training sets it."""

    def __init__(self, config: Any):
        self.config = config

    def fitted(self, splits: Splits) -> Settings:
        """Return the configuration completed with statistics of the data (e.g. how often each size occurs). Default:
        unchanged."""
        return self.config

    def keeping(self, fitted: Any, stored: dict[str, Any]) -> Any:
        """Return a fitted configuration with the stored statistics of a checkpoint in place of those of the data, where
        the model can go on with them. stored: the checkpoint's configuration, plain. Default: unchanged."""
        return fitted

    # ---- data

    @classmethod
    def origin_of(cls, data: Any) -> str:
        """Return where the samples of a DataConfig come from, and under which licence, in words for a model card; "" if
        they are the user's own. Default: ""."""
        return ""

    @abstractmethod
    def splits(self, data: Any, listings: Listings = ALONE) -> Splits:
        """Open the data sets that a DataConfig describes; ValueError names the path and what to do.

        listings: who looks at files, and where it is kept. What is found out about files on the way (which there are,
        their sizes, what their tables say) comes from its `find` or `share`: with many processes, one of them looks.
        """

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """Collate samples of a Dataset to Data."""

    @abstractmethod
    def check(self, data: Any) -> Any:
        """Return the data if `pack` can take it, else ValueError: what it is and what is expected."""

    @abstractmethod
    def augment(self, data: Any, streams: Streams) -> Any:
        """Return a random view of each sample, drawn from its own stream."""

    @property
    def augmentation(self) -> dict[str, Any]:
        """Return the settings that determine `augment`, as plain data: stored latents of augmented samples carry them.

        Default: the whole configuration; an override keeps only those settings.
        """
        return self.config.plain()

    def join(self, parts: Sequence[Any]) -> Any:
        """Concatenate batches of Data; batches that are padded to different lengths need an override."""
        return join(parts)

    # ---- tokens

    @property
    @abstractmethod
    def channels(self) -> int:
        """C, channels of a token."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The largest N, tokens of a sample."""

    @property
    @abstractmethod
    def axes(self) -> int:
        """A, axes of a token's position."""

    @abstractmethod
    def pack(self, data: Any) -> Tokens:
        """Convert Data to tokens (B, N, C)."""

    @abstractmethod
    def unpack(self, tokens: Tokens) -> Any:
        """Convert tokens to Data; the inverse of `pack`."""

    @abstractmethod
    def finish(self, data: Any) -> Any:
        """Postprocess a network's output to valid samples (images: clamp to [0, 1]). Leaves valid samples unchanged."""

    @abstractmethod
    def sample_layout(self, streams: Streams, values: dict[str, Tensor] | None = None) -> Layout:
        """Draw the layout of one new sample per stream.

        values: condition values by argument and the result of `parse_layout`, which the layout may depend on.
        """

    token_shift: float = 0.0
    token_scale: float = 1.0
    """(tokens - shift) / scale has about zero mean and unit variance. Methods that add noise to data add it to this."""

    @property
    def token_settings(self) -> dict[str, Any]:
        """Settings that change the tokens of the same data, beside those that change their shape or scale; without
        those that are at their default."""
        return {}

    @property
    def fields(self) -> tuple[TokenField, ...]:
        """What the C channels of a token mean, in order, for encoders that embed them. Default: one linear field."""
        return (TokenField(self.channels),)

    def units(self, layout: Layout) -> dict[str, int | Tensor]:
        """Denominators of a bit rate: unit -> how many of them a sample of this layout has, (B,) where samples differ.

        Padding does not count. Default: token values.
        """
        return {"value": layout.real_tokens * self.channels}

    layout_arguments: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments of `sample` that set the layout of new samples (e.g. `num_atoms`). Default: none."""

    def parse_layout(self, n: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """Parse users' `layout_arguments` to tensors of n rows each, shorter lists cycled; ValueError on a bad one."""
        return {}

    def layout_control(self, argument: str) -> Control:
        """Return how a person is asked for one of `layout_arguments`. Default: a line of text for `parse_layout`."""
        return Control(argument.replace("_", " ").capitalize())

    def layout_of(self, mask: Tensor) -> Layout:
        """Return the layout of samples whose real tokens are where mask (B, N) is True; ValueError if none has it.

        Used by `LatentModel.decoder_inputs`. Only called if layouts have masks.
        """
        raise AssertionError(f"{type(self).__name__} has one layout")

    tokens_are_data: ClassVar[bool] = False
    """Whether a decoder predicts the packed data themselves, so that another network can read its prediction as it
    reads data."""

    # ---- given parts: a modality whose samples can be given in part has all of these

    given_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of parts that `draw_mask` draws. Default: none; then nothing in this section is called."""

    @property
    def given_frames_most(self) -> int | None:
        """The most frames that can be given of a sample; None if samples have no frames. Default: None."""
        return None

    @property
    def mask_channels(self) -> int:
        """M, values per token of a packed mask."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def draw_mask(self, data: Any, streams: Streams, kinds: Sequence[str]) -> Tensor:
        """Return for each sample a random part of one of these kinds: the mask of a `Given`, on the data's device."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def pack_mask(self, mask: Tensor) -> Tensor:
        """Convert the mask of a `Given` to tokens (B, N, M) of 0 and 1, float32."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def fill(self, given: Given) -> Any:
        """Return Data for an encoder: something likely where data are not given, which depends on nothing else."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def put_back(self, data: Any, given: Given) -> Any:
        """Return the data with the given parts, exactly."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    @property
    def completes_in_evaluation(self) -> bool:
        """Whether an evaluation completes parts of held-out samples in place of drawing whole ones. Default: false."""
        return False

    def given_in_evaluation(self, data: Any) -> Given:
        """Return what an evaluation gives of held-out samples."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def scored(self, made: Any, given: Given, reconstruct: Callable[[Any], Any]) -> Any:
        """Return completed samples as metrics see them. Default: with the given parts as they are."""
        return made

    def errors_of_rest(self, made: Any, data: Any, given: Given) -> dict[str, list[float]]:
        """Return the errors of completed samples (`made`) against the true ones where nothing was given, and, as
        `filled_...`, those of `fill`."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def check_given(self, given: Given) -> Given:
        """Return given parts if the modality can use them, else ValueError: what they are and what is expected."""
        raise AssertionError(f"{type(self).__name__} has no parts that can be given")

    def check_length(self, length: int, overlap: int | None) -> None:
        """ValueError unless `lengthen` can make samples of this length with this overlap."""
        raise ValueError(f"length: samples of {self.config.name} have no length; leave it out")

    def lengthen(self, data: Any, length: int, overlap: int, complete: Callable[[Given, int], Any]) -> Any:
        """Return samples of a greater length, made window by window: `complete` takes the last `overlap` of what there
        is, as the given part of the next window, and its number, from 1 on. Called after `check_length`."""
        raise AssertionError(f"{type(self).__name__} has no length")

    def read_given(self, path: Path, mask: Path | None, first: int | None) -> Given:
        """Read the given part of one sample from files; ValueError names the option that is missing or wrong.

        mask: where it is not given, as an image. first: of samples that have a length, how much of it is given from
        its beginning on.
        """
        raise ValueError(f"--given: no part of a sample of {self.config.name} can be given; leave it out")

    # ---- loss

    @abstractmethod
    def reconstruction_loss(self, prediction: Tokens, data: Any) -> dict[str, Tensor]:
        """Return named scalar terms, already weighted, that sum to the loss. The minimum is at `ideal(data)`."""

    def ideal(self, data: Any) -> Tokens:
        """Return the decoder's best prediction, which unpacks to `data`. Default: `pack(data)`.

        Override it where the decoder predicts scores (logits) in some channels.
        """
        return self.pack(data)

    def prepare(self, device: torch.device, processes: Processes | None = None) -> None:
        """Load what the loss needs (e.g. pretrained weights); ValueError names what is missing. Default: nothing.

        processes: all call this; the first one reads for all.
        """
        return None

    # ---- files

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes, without the dot, of files that hold one sample, for `unilatent data`. Default: none."""

    @property
    def readable(self) -> tuple[str, ...]:
        """Suffixes, with the dot, of single files that `read` takes, for file dialogs. Default: those of `suffixes`."""
        return tuple(f".{suffix}" for suffix in self.suffixes)

    @abstractmethod
    def read(self, path: Path, batch_size: int, skipped: Skipped | None = None) -> Iterator[tuple[Any, list[str]]]:
        """Read a folder, archive or file in order: batches of Data and the names of their samples.

        skipped: called with the reason for each sample that cannot be used, which is left out; None: ValueError.
        """

    def notes(self, path: Path) -> list[str]:
        """Return what lies at a path and is not read by `read` (files of other kinds), one line each. Default: none."""
        return []

    @abstractmethod
    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        """Write one file per sample, numbered from `start`, to `folder` or a subfolder of it."""

    def pictures(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        """Write one picture for each sample that a browser shows (PNG, or an animated WebP), numbered from `start`, to
        `folder`. Default: each drawn by `draw_grid` alone."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{start + i:06d}.png" for i in range(count(data))]
        for i, path in enumerate(paths):
            self.draw_grid([take(data, slice(i, i + 1))], path)
        return paths

    def drawable(self, data: Any) -> Any:
        """Return a batch on the CPU with no more than `draw_grid` needs (images: 8 bits), to be sent to the process
        that draws it. Default: all of it."""
        return move(data, "cpu")

    @abstractmethod
    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Draw one image: each element of `rows` (Data of equal B, or `drawable` of it) is a row of samples, wrapped
        after `columns`.

        captions: one text per sample, drawn under it (with several rows, under the last).
        """

    def viewer(
        self, data: Any, captions: Sequence[str] | None = None, title: str = "", moving: bool = False
    ) -> str | None:  # fmt: skip
        """Return one HTML page, without references to anything outside it, on which samples can be looked at from all
        sides; None if pictures show all there is. Default: None.

        captions: one text per sample. moving: the samples are moments of one, shown one after the other.
        """
        return None

    @abstractmethod
    def arrays(self, data: Any) -> dict[str, np.ndarray]:
        """Return the arrays that other evaluation code reads (images: `arr_0`, uint8 (B, H, W, C))."""

    @classmethod
    def raw(cls, source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
        """Open a folder or archive of sample files for `unilatent data`. Only called if there are `suffixes`."""
        raise AssertionError(f"{cls.__name__} has no suffixes")

    @classmethod
    def verify(cls, source: Path) -> CheckedRecords | None:
        """Read every record of a file, folder or archive for `unilatent data verify`; None if it holds none.

        Default: None, for modalities with `suffixes`, whose files are checked one by one (`raw`).
        """
        return None

    # ---- evaluation

    @abstractmethod
    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        """Return the usual errors of each reconstruction (`made`) against its original (images: PSNR)."""

    @property
    @abstractmethod
    def preprocessing(self) -> str:
        """How files become samples; begins with one word that names it ("adm centre crop, ..."). Part of the protocol
        of a number."""

    @property
    @abstractmethod
    def resolution(self) -> tuple[int, ...]:
        """The size of a sample (images: height, width, channels)."""

    @abstractmethod
    def spaces(self) -> list[Space]:
        """Return all feature extractors of this modality's metrics; each is prepared only when it is needed."""

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """Return all metrics.

        Those whose Space needs no download and is not `on_request` are computed by default and after training.
        """

    @classmethod
    def of_resolution(cls, resolution: tuple[int, ...]) -> Self | None:
        """Build the modality without a model, for samples of this size; ValueError on an impossible size.

        Default: None, where the size does not define the modality.
        """
        return None

    @classmethod
    def resolution_of(cls, source: Path) -> tuple[int, ...] | None:
        """Return the size of the first externally generated sample in `source`; None if its format is unknown."""
        return None

    def made(self, source: Path) -> Dataset:
        """Open externally generated samples, each exactly as stored.

        ValueError, never BadSample, names a sample of another size or in a lossy format.
        """
        raise ValueError(f"--samples {source}: this modality cannot read externally generated samples; leave it out")
