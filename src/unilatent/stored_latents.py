"""Clean latents of a training set on disk, which a generator is trained on in place of the data: each is encoded once.

header.json                         what determines the latents: fingerprints of tokenizer and data, number of views
rows_00000000_00004096.safetensors  of training samples [0, 4096), for each of V views:
    latents (n, V, K, D)            `LatentModel.clean_latents`, float32: without the noise that a decoder expects
    mask, positions                 (n, V, K), (n, V, K, A): of their layout, where samples differ in it
    values.labels, ...              (n, V) or (n, V, W): condition values, texts as bytes
    fault (n, V, W)                 why a sample cannot be used, as bytes; zeros if it can

View v of sample i is the sample as an epoch v would read it (one of its captions, say), augmented with random numbers
that are a function of (seed, i, v, V). Files are mapped to memory: a process reads only the rows that it uses.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import Example, collate, read_views, value_rows
from .config import ConfigError
from .files import read_json
from .maths.streams import Streams
from .methods.base import LatentModel
from .modalities.base import BadSample, Dataset, Modality, Skipped, Stream
from .processes import Processes, SharedItems
from .records import HEADER, OWN_FILE, Records, open_records, read_records
from .sampling import computing
from .types import LATENTS, Tokens, decode_texts, encode_texts, move

FORMAT = 1
FAULT, VALUES = "fault", "values."
LAYOUT = ("mask", "positions")
FIELD = "training.latents"


def is_file_of_latents(name: str) -> bool:
    """Return whether a file of this name belongs to a folder of stored latents."""
    return OWN_FILE.fullmatch(name) is not None


# ---- writing ---------------------------------------------------------------------------------------------------------


class ViewStreams(Streams):
    """Random streams of views of samples. Uniform numbers of a sample's V views are 1/V apart (a Cranley-Patterson
    rotation), so that they cover [0, 1) evenly: two views of an image that is mirrored at random are its two
    orientations. Each number by itself is as random as any."""

    def __init__(self, seed: int, rows: Sequence[int], views: Sequence[int], count: int, device: torch.device):
        """rows, views: numbers of samples and of their views. count: V."""
        numbers = [row * count + view for row, view in zip(rows, views, strict=True)]
        super().__init__(("view", seed), numbers, device)
        self.of_samples = Streams(("views", seed), rows, device)
        self.shift = move(torch.tensor(views, dtype=torch.float32) / count, device)

    def uniform(self, *shape: int) -> Tensor:
        numbers = self.of_samples.uniform(*shape) + self.shift.view(-1, *[1] * len(shape))
        return numbers - numbers.floor()


def encode_views(
    model: LatentModel, train: Dataset, folder: Path, *, views: int, seed: int = 0, batch_size: int = 64,
    shard_size: int = 4096, precision: str, workers: int = 0, processes: Processes | None = None,
    progress: Callable[[int], None] | None = None, skipped: Skipped | None = None,
) -> int:  # fmt: skip
    """Encode `views` views of each training sample to a folder; shards that are there are not encoded again.

    Returns how many latents were there before. ValueError if the folder holds latents of another tokenizer, other data
    or other settings.

    precision: "fp32" or "bf16". workers: processes that read the data. processes: all call this; each takes the next
    shard when it reads the last samples of one, so that a slow process encodes fewer, and the others wait for no more
    than its last shard. A shard is the same whichever process encodes it. progress: called with the number of latents
    done so far in addition, by all processes; if it raises (a stop, say), this process ends there, and the others after
    the shards that they have begun. All open the folder together; then each works without a timeout, for which the
    others wait in `Processes.meet`. skipped: called with the reason for each sample that this process cannot use.
    """
    processes = processes or Processes.alone()
    if isinstance(train, Stream):
        raise ValueError(
            "data.streaming: a stream is read in another order in each epoch, so its samples cannot be stored by "
            "number; set it to false (data.streaming=false)"
        )
    if not len(train):
        raise ValueError("data.held_out: leaves no training sample to encode; hold out fewer")

    def open_here() -> tuple[Records, list[range]]:
        made_by = {
            "format": FORMAT, "tokenizer": model.tokenizer_fingerprint(), "data": train.fingerprint,
            "conditions": _digests(train), "augmentation": model.modality.augmentation, "views": views, "seed": seed,
            "precision": precision,
        }  # fmt: skip
        records = open_records(folder, len(train), made_by, chunk_size=shard_size)
        return records, records.missing()

    records, missing = processes.from_main(open_here)
    before = shown = views * (len(train) - sum(map(len, missing)))
    reading = _Reading(processes.shared(missing), views, len(train), batch_size)
    per_sample = model.modality.sample_layout(Streams(("layout",), [0, 1])).positions.shape[0] > 1
    reasons: set[str] = set()
    try:
        with processes.working(), closing(read_views(train, reading, workers)) as batches:
            if progress:
                progress(before)
            for examples in batches:
                shard, keys = reading.next()
                shard.add(keys, examples, model, seed, precision, per_sample)
                done = before + reading.shards.add(len(keys))
                if progress:
                    progress(done - shown)
                shown = done
                if not shard.is_complete:
                    continue
                for reason in shard.reasons:
                    if reason not in reasons and skipped:
                        skipped(reason)
                    reasons.add(reason)
                records.add(shard.rows, shard.tensors())
    except BaseException:
        reading.shards.stop()
        raise
    return before


class _Reading:
    """Batches of samples in the order in which they are read: those of the shards that this process takes.

    A shard is taken when its first batch is to be read, with workers a few batches before that is encoded.
    """

    def __init__(self, shards: SharedItems[range], views: int, size: int, batch_size: int):
        self.shards, self.views, self.size, self.batch_size = shards, views, size, batch_size
        self.coming: deque[tuple[_Shard, list[tuple[int, int]]]] = deque()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (index, position) of each batch; view v of sample i is read at its place in epoch v."""
        for rows in self.shards:
            keys = [(index, view * self.size + index) for index in rows for view in range(self.views)]
            shard = _Shard(rows, self.views)
            for start in range(0, len(keys), self.batch_size):
                batch = keys[start : start + self.batch_size]
                self.coming.append((shard, batch))
                yield batch

    def next(self) -> tuple[_Shard, list[tuple[int, int]]]:
        """Return the shard and the keys of the first batch that is not encoded yet."""
        return self.coming.popleft()


class _Shard:
    """The views of the samples `rows` while they are encoded."""

    def __init__(self, rows: range, views: int):
        self.rows, self.views = rows, views
        self.parts: dict[str, Tensor] = {}
        self.values: list[dict[str, Any]] = [{}] * (len(rows) * views)
        self.faults = [""] * (len(rows) * views)
        self.done = 0

    def add(
        self, keys: Sequence[tuple[int, int]], read: Sequence[Example | BadSample], model: LatentModel, seed: int,
        precision: str, per_sample: bool,
    ) -> None:  # fmt: skip
        """Encode a batch, which comes after those before it. per_sample: whether positions differ between samples."""
        places = range(self.done, self.done + len(keys))
        self.done += len(keys)
        usable = [(place, example) for place, example in zip(places, read, strict=True) if isinstance(example, tuple)]
        for place, error in zip(places, read, strict=True):
            if isinstance(error, BadSample):
                self.faults[place] = str(error) or "cannot be used"
        if not usable:
            return
        at = [place for place, _ in usable]
        rows, views = [self.rows[place // self.views] for place in at], [place % self.views for place in at]
        streams = ViewStreams(seed, rows, views, self.views, model.device)
        tokens = _encoded(model, collate([example for _, example in usable], model.modality).data, streams, precision)
        self._keep(LATENTS, at, tokens.values)
        if tokens.layout.mask is not None:
            self._keep("mask", at, tokens.layout.mask)
        if per_sample:
            self._keep("positions", at, tokens.layout.positions.expand(len(at), -1, -1))
        finite = tokens.values.isfinite().flatten(1).all(1).tolist()
        for (place, (_, values)), is_finite, row in zip(usable, finite, rows, strict=True):
            self.values[place] = values
            if not is_finite:
                self.faults[place] = f"training sample {row}: its latents are not finite"

    def _keep(self, name: str, at: list[int], values: Tensor) -> None:
        if name not in self.parts:
            self.parts[name] = torch.zeros(len(self.faults), *values.shape[1:], dtype=values.dtype)
        self.parts[name][at] = values.cpu()

    @property
    def is_complete(self) -> bool:
        return self.done == len(self.faults)

    @property
    def reasons(self) -> Iterator[str]:
        return (fault for fault in self.faults if fault)

    def tensors(self) -> dict[str, Tensor]:
        parts = {FAULT: encode_texts(self.faults), **self.parts}
        known = next((values for values in self.values if values), {})
        for name, instead in known.items():  # a sample that cannot be used has no values
            parts[VALUES + name] = value_rows([values.get(name, instead) for values in self.values])
        return {name: part.unflatten(0, (len(self.rows), self.views)) for name, part in parts.items()}


@torch.no_grad()
def _encoded(model: LatentModel, data: Any, streams: Streams, precision: str) -> Tokens:
    with computing(model, precision):
        data = model.modality.augment(move(data, model.device), streams)
        tokens = model.clean_latents(data, streams)
    return Tokens(tokens.values.float(), tokens.layout)


def _digests(data: Dataset) -> dict[str, str]:
    """A hash of what the data know about each condition, such as the order of the classes."""
    return {
        argument: hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        for argument, known in data.facts.items()
    }


# ---- reading ---------------------------------------------------------------------------------------------------------


class StoredLatents(Dataset):
    """Latents in place of the training set `data`, whose order they come in: epoch e reads view e modulo V.

    A sample is a dict as `types.is_encoded` describes it, without a batch axis.
    """

    def __init__(self, folder: Path, header: dict[str, Any], data: Dataset):
        self.records = Records(folder, header["rows"], header["piece"])
        self.header, self.data = header, data
        self.views: int = header["views"]
        self.facts, self.hints, self.notes = data.facts, data.hints, data.notes
        self.chunks: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self._sample(index, 0)

    def index_at(self, seed: int, position: int) -> int:
        return self.data.index_at(seed, position)

    def view(self, index: int, position: int) -> Example:
        return self._sample(index, position // len(self) % self.views)

    def adopt(self, argument: str, stored: dict[str, Any]) -> None:
        self.data.adopt(argument, stored)

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the latents: of data, tokenizer, views, seed and precision."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()

    def _sample(self, index: int, view: int) -> Example:
        number, row = divmod(index, self.records.chunk_size)
        tensors = self._chunk(number)
        if tensors[FAULT][row, view].any():
            raise BadSample(_value(tensors[FAULT][row, view]))
        data = {name: tensors[name][row, view] for name in (LATENTS, *LAYOUT) if name in tensors}
        values = {
            name.removeprefix(VALUES): _value(tensor[row, view])
            for name, tensor in tensors.items()
            if name.startswith(VALUES)
        }
        return data, values

    def _chunk(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped to memory; ValueError if it is missing or damaged."""
        if number not in self.chunks:
            rows = self.records.ranges[number]
            tensors = self.records.tensors(rows)
            shapes = {name: tuple(tensor.shape[:2]) for name, tensor in tensors.items()}
            if FAULT not in shapes or set(shapes.values()) != {(len(rows), self.views)}:
                raise ValueError(f"{self.records.folder}: shard {number} does not hold {self.views} views of its rows")
            self.chunks[number] = tensors
        return self.chunks[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "chunks": {}}  # a worker maps the files itself


def _value(value: Tensor) -> Any:
    """A condition value as a data set gives it: a number or a text."""
    if value.ndim == 1 and value.dtype == torch.uint8:
        return decode_texts(value[None])[0]
    return value.tolist()


def read_header(folder: Path, train: Dataset, modality: Modality, precision: str) -> dict[str, Any]:
    """Return the header of stored latents after everything is checked that needs no model.

    train: the data of the run. precision: "fp32" or "bf16", what the run computes in.
    ConfigError unless the latents are complete, of these data, with these conditions and this augmentation.
    """

    again = "encode them again with `unilatent encode --views`, in another folder"
    if isinstance(train, Stream):
        raise ConfigError(f"{FIELD}: set, but data that are streamed have no stored latents; leave it out")
    if not (folder / HEADER).is_file():
        occupied = folder.is_dir() and any(folder.iterdir())
        where = f"{folder}-views" if occupied else str(folder)
        other = "holds no latents to train on" if occupied else "is not there"
        raise ConfigError(
            f"{FIELD}: {folder} {other}; write them, then set {FIELD}={where}: "
            f"unilatent encode TOKENIZER --views 1 --out {where}, with the run or model of method.tokenizer"
        )
    try:
        header = read_json(folder / HEADER, again)
        records = read_records(folder)
    except ValueError as error:
        raise ConfigError(f"{FIELD}: {error}") from None
    if header.get("format") != FORMAT or type(header.get("views")) is not int or header["views"] < 1:
        raise ConfigError(f"{FIELD}: {folder} holds other records, or latents of another version; {again}")
    if header.get("data") != train.fingerprint or len(records) != len(train):
        raise ConfigError(
            f"{FIELD}: {folder} has latents of other data than data.path and data.held_out of this run give; set them "
            f"as they were, or {again}"
        )
    if header.get("conditions") != _digests(train):
        differing = sorted(set(_digests(train).items()) ^ set((header.get("conditions") or {}).items()))
        raise ConfigError(
            f"{FIELD}: {folder} was written with other {differing[0][0]} than this run reads (data.*); set data as "
            f"they were, or {again}"
        )
    now, then = modality.augmentation, header.get("augmentation")
    if now != then:
        name = next(key for key in now if not isinstance(then, dict) or now[key] != then.get(key))
        was = then.get(name) if isinstance(then, dict) else then
        raise ConfigError(
            f"modality.{name}: {now[name]!r}, but {folder} was written with {was!r}; set it so, or {again}"
        )
    if (header.get("precision"), precision) == ("bf16", "fp32"):
        raise ConfigError(
            f"{FIELD}: {folder} was encoded in bf16, but the run computes in fp32; set training.precision=bf16, or "
            "encode again with --precision fp32"
        )
    if missing := records.missing():
        raise ConfigError(
            f"{FIELD}: {folder} is incomplete, {len(missing)} of {len(records.ranges)} shards are missing; run the "
            "same `unilatent encode` command again, which goes on there"
        )
    return header


def refuse_other_tokenizer(latents: Dataset, model: LatentModel) -> None:
    """ConfigError if another tokenizer than the model's wrote the latents; other data sets pass. A collective call."""
    if not isinstance(latents, StoredLatents):
        return
    own, wrote = model.tokenizer_fingerprint(), str(latents.header.get("tokenizer"))
    if own != wrote:
        raise ConfigError(
            f"{FIELD}: {latents.records.folder} has latents of another tokenizer (fingerprint {wrote[:12]}, this run's "
            f"is {own[:12]}); give that one as method.tokenizer, or encode the data with this one"
        )
