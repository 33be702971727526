"""What every modality provides. The rest of the package knows samples only through this page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..config import Config as Settings
from ..maths.streams import Streams, generator
from ..nets.fields import TokenField
from ..records import Rows
from ..types import Layout, Tokens, join


class BadSample(ValueError):
    """A sample that cannot be used, named with its path and what is wrong: training counts it and takes another."""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> list[int]:
    """A uniform order of an epoch."""
    return torch.randperm(size, generator=generator("order", seed, epoch)).tolist()


class Dataset(ABC):
    """Samples by index, a pure function of it: augmentation is the modality's and happens on batches."""

    facts: dict[str, dict[str, Any]]
    """Condition argument ("labels", say) -> what the data knows about that condition (its `class_names`, say)."""

    columns: tuple[str, ...] = ()
    """Names of numbers that are known of samples (`numbers_of`), whether or not anything is conditioned on them."""

    @abstractmethod
    def __len__(self) -> int: ...

    def numbers_of(self, index: int) -> dict[str, float]:
        """What is known of one sample, by column; NaN where it is not known. Only with `columns`."""
        raise AssertionError(f"{type(self).__name__} has no columns")

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """One sample as its modality holds it, without a batch axis, and its condition values by argument.

        BadSample if this one cannot be used.
        """

    def index_at(self, seed: int, position: int) -> int:
        """The sample at a position of the endless row of epochs; batches run across their ends, nothing is dropped.

        A pure function. An override may keep neighbouring positions near each other on disk.
        """
        epoch, place = divmod(position, len(self))
        return permutation(seed, epoch, len(self))[place]

    def view(self, index: int, position: int) -> tuple[Any, dict[str, Any]]:
        """A sample as it is seen at a position of training; an override may choose by it (a clip of a video)."""
        return self[index]

    def values(self, index: int) -> dict[str, Any]:
        """Condition values of a sample alone; an override may leave the sample itself unread, and then tells nothing
        of whether it can be used. BadSample if they cannot be had."""
        return self[index][1]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the samples or their order do."""


class Stream(Dataset):
    """Samples that can only be read in order, in `lanes` rows side by side, each without end.

    Position p of the endless row of epochs is place p // lanes of lane p % lanes. The number of lanes belongs to the
    data and never depends on how many processes read them; one that reads every n-th position meets only its own
    lanes where n divides their number, and otherwise passes over what is not its own.
    """

    lanes: int
    size: int | None
    """Samples of an epoch, where somebody counted them."""

    @abstractmethod
    def read(self, seed: int, lane: int, place: int) -> Iterator[tuple[int, Callable[[], tuple[Any, dict[str, Any]]]]]:
        """A lane's samples from a place on, a pure function of its arguments: a number that stays the sample's own,
        and what makes the sample (and may raise BadSample), so that passing over one costs little."""

    def __len__(self) -> int:
        if self.size is None:
            raise ValueError(
                "data.num_samples: not set, and the stream does not say how many samples an epoch has; set it, or "
                "count in steps (training.steps, training.schedule.unit=steps)"
            )
        return self.size

    def index_at(self, seed: int, position: int) -> int:
        """A stream's samples are known by when they come."""
        return position

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        raise TypeError("a stream is read in order")


@dataclass(frozen=True)
class Splits:
    """Training samples, and samples no training step ever sees (possibly none)."""

    train: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class Row:
    """One number of an evaluation.

    key: its short name for machines ("fid"); name: its name for people. better: "higher", "lower" or "same" (as what
    stands beside it). beside: what to hold it against, name -> number. spread: standard deviation, where it has one.
    """

    key: str
    name: str
    value: float
    unit: str = ""
    better: str = "higher"
    beside: dict[str, float] = field(default_factory=dict)
    spread: float | None = None


class Space(ABC):
    """A fixed view of samples that evaluation keeps of each one. It never sees the model."""

    name: ClassVar[str]
    weights: str | None = None
    """SHA-256 of the weights that make it, known once it is prepared and fitted; numbers compare only where these are
    equal. None without any."""
    needs_download: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    """Whether it is slow, or a package for it is missing: left out unless a metric of it is asked for."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Spaces, listed before it, whose tensors it is fitted to."""
    silent: bool = False
    """Whether it has nothing to say of what it was fitted to, which then is not read for it."""
    compares: ClassVar[bool] = False
    """Whether it has something to say only of two sets side by side (`against`)."""

    def prepare(self, device: torch.device) -> None:
        """Loads its weights, before it is used; ValueError names what is missing. Default: nothing."""
        return None

    def fit(self, train: Rows) -> None:
        """Learns from what the spaces before it kept of real training samples. Default: nothing."""
        return None

    @abstractmethod
    def __call__(self, data: Any) -> dict[str, Tensor]:
        """A batch of Data, wherever it is, to what is kept of each sample: name -> (B, ...) on the CPU.

        A sample's values do not depend on its batch, rounding aside. Nothing where it has nothing to say. ValueError on
        samples that hold NaN.
        """

    def against(self, made: Any, data: Any) -> dict[str, Tensor]:
        """Named tensors (B,) of reconstructions beside their originals. Default: none."""
        return {}


@dataclass(frozen=True)
class Evidence:
    """What a metric judges: what spaces kept of four sets, with condition values as tensors under their argument.

    train: real samples, the reference of distances; held_out: real ones that no training step saw; samples: new ones;
    reconstructions: of `held_out`, row by row, with `Modality.errors` as tensors. Any of them may be missing.
    train_total: how many samples `train` was chosen from; None where nobody knows.
    """

    train: Rows | None = None
    held_out: Rows | None = None
    samples: Rows | None = None
    reconstructions: Rows | None = None
    train_total: int | None = None

    def looked_at(self, what: str) -> str:
        """Of `train`, for the name of a row: "the 300 training molecules", "200 of the 300 ..."."""
        seen, total = len(self.train or ()), self.train_total
        if total is None:
            return f"{seen:,} training {what}"
        return f"{'' if seen >= total else f'{seen:,} of '}the {total:,} training {what}"


class Metric(ABC):
    """Numbers of one kind, by something the model never saw. Silent about what the evidence cannot show."""

    space: str | None = None
    """The Space whose tensors it reads; None: only `Modality.errors`."""
    gives: tuple[str, ...] = ()
    """Keys of its rows, some of which may be left out."""
    track: str = "generation"
    most_samples: int | None = None
    most_reference: int | None = None
    """How many of the first samples, and of the first real ones, it looks at; None: all."""

    @abstractmethod
    def __call__(self, evidence: Evidence) -> list[Row]: ...


class Raw(ABC):
    """Samples in files as people have them, to be checked or brought into shards (`shards.writing.Samples`)."""

    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]

    @abstractmethod
    def check(self, number: int) -> None:
        """ValueError if the sample cannot be used."""

    @abstractmethod
    def encode(self, number: int) -> tuple[str, bytes]:
        """Suffix and content of a sample as it goes into a shard; ValueError if it cannot be used."""

    def beside(self, number: int) -> Sequence[tuple[str, bytes]]:
        """Suffix and content of what else goes into a shard with a sample (its captions, say); ValueError if it cannot
        be used. Default: nothing."""
        return ()

    @abstractmethod
    def stamp(self, number: int) -> str:
        """What is known of a sample without reading it."""


class Modality(ABC):
    """A kind of sample, without weights: to tokens and back, how wrong, how drawn, where it comes from.

    `Data` below is whatever a batch of samples is for this modality (pictures: (B, C, H, W) float32 in [0, 1]).
    """

    Config: ClassVar[type[Settings]]
    DataConfig: ClassVar[type[Settings]]
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of files that hold a sample, without the dot: what `unilatent data` works on. None where there are no such."""

    def __init__(self, config: Any):
        self.config = config

    @property
    @abstractmethod
    def channels(self) -> int:
        """C, channels of a token."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The largest N."""

    token_shift: float = 0.0
    token_scale: float = 1.0
    """(tokens - shift) / scale is about as wide as N(0, 1): what noise is added to, where it is added to data."""

    @property
    def fields(self) -> tuple[TokenField, ...]:
        """What the C channels of a token mean, in order: how an encoder looks at them. Default: all the same."""
        return (TokenField(self.channels),)

    def fitted(self, splits: Splits) -> Settings:
        """The configuration with what only data can tell filled in (how often each size occurs, say). Default: there
        is nothing of that kind."""
        return self.config

    @property
    def units(self) -> dict[str, int]:
        """What a rate is divided by: name -> how many of them the largest sample has. Default: values of tokens."""
        return {"value": self.max_tokens * self.channels}

    @property
    @abstractmethod
    def axes(self) -> int:
        """A, axes of a token's position."""

    @abstractmethod
    def check(self, data: Any) -> Any:
        """The data if it is what `pack` takes, else ValueError naming what it is and what it should be."""

    @abstractmethod
    def pack(self, data: Any) -> Tokens:
        """Data to tokens (B, N, C)."""

    @abstractmethod
    def unpack(self, tokens: Tokens) -> Any:
        """Tokens to data; the inverse of `pack`."""

    @abstractmethod
    def finish(self, data: Any) -> Any:
        """What a network made, as a valid sample (pictures: clamped to [0, 1])."""

    def prepare(self, device: torch.device) -> None:
        """Loads what the losses need (pretrained weights, say); ValueError says what is missing. Default: nothing."""
        return None

    def join(self, parts: Sequence[Any]) -> Any:
        """Batches of data as one; batches padded to different lengths need an override."""
        return join(parts)

    @abstractmethod
    def reconstruction_loss(self, prediction: Tokens, data: Any) -> dict[str, Tensor]:
        """Named scalar terms, already weighted, that sum to the loss; least when prediction = ideal(data)."""

    def ideal(self, data: Any) -> Tokens:
        """The best prediction of a decoder, which unpacks to `data`. Default: its tokens; not so where some channels
        are read as scores."""
        return self.pack(data)

    @abstractmethod
    def sample_layout(self, streams: Streams, values: dict[str, Tensor] | None = None) -> Layout:
        """A layout for each stream's new sample. values: what the samples are to be conditioned on, by argument, and
        what `parse_layout` gave; a modality may heed some of them."""

    layout_arguments: ClassVar[tuple[str, ...]] = ()
    """Keywords under which users say what layouts of new samples are to be like. Default: there is nothing to say."""

    def parse_layout(self, n: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """Users' values under those keywords, as n rows each, shorter lists cycled; ValueError names what is wrong."""
        return {}

    def layout_of(self, mask: Tensor) -> Layout:
        """The layout of samples whose real tokens are those where mask (B, N) is True; ValueError if none can be, as
        of `LatentModel.laid_out`. Only where layouts have masks."""
        raise AssertionError(f"{type(self).__name__} has one layout")

    @abstractmethod
    def augment(self, data: Any, streams: Streams) -> Any:
        """A random view of each sample, on its own stream."""

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """Samples of a Dataset to a batch of data."""

    @classmethod
    def raw(cls, source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
        """The samples of a folder or archive of files, as they are to be stored; only with `suffixes`."""
        raise AssertionError(f"{cls.__name__} has no suffixes")

    @abstractmethod
    def splits(self, data: Any) -> Splits:
        """The data that a DataConfig describes; ValueError names the path and the way out."""

    @classmethod
    def of_resolution(cls, resolution: tuple[int, ...]) -> Self | None:
        """One without a model, for samples of that size; ValueError on a size that none can have. None where a size
        does not say everything."""
        return None

    @classmethod
    def resolution_of(cls, source: Path) -> tuple[int, ...] | None:
        """The size of the first of samples that somebody made; None where they are of no kind it knows."""
        return None

    def made(self, source: Path) -> Dataset:
        """Samples that somebody made, each exactly as it lies there; ValueError, never BadSample, names one of another
        size, or in a format that loses something."""
        raise ValueError(f"--samples {source}: made samples of this modality cannot be read")

    @abstractmethod
    def spaces(self) -> list[Space]:
        """Every view of samples that metrics of this modality read; each is prepared only when it is asked for."""

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """Every metric; those whose space needs no download, and is not only there on request, run at the end of
        training."""

    @property
    @abstractmethod
    def preprocessing(self) -> str:
        """How samples from files are brought to the model, one word first ("adm centre crop, ..."): part of a
        number's protocol."""

    @property
    @abstractmethod
    def resolution(self) -> tuple[int, ...]:
        """The size of a sample (pictures: height, width, channels)."""

    @abstractmethod
    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        """How far each sample of `made` is from its original, in the modality's usual measures (pictures: PSNR)."""

    @abstractmethod
    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """One picture with every row's samples (Data of equal B) side by side; longer rows than `columns` wrap.

        captions: a text for each sample, under it (of several rows: under the last one's)."""

    @abstractmethod
    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        """One file a sample, numbered from `start`, in `folder` or one of its `subfolders`."""

    @property
    def subfolders(self) -> tuple[str, ...]:
        """Names of folders that `write` makes. Default: none."""
        return ()

    @abstractmethod
    def arrays(self, data: Any) -> dict[str, np.ndarray]:
        """Data as the arrays other people's evaluation code reads (pictures: `arr_0`, uint8 (B, H, W, C))."""

    @abstractmethod
    def read(self, path: Path, batch_size: int) -> Iterator[tuple[Any, list[str]]]:
        """The samples of a folder, archive or file in order, as batches of Data with their names."""
