"""A model before the metrics of its modality: samples and reconstructions are made and looked at in a stream.

What is kept of each sample lies on disk in pieces (`records`), so that memory does not grow with their number, an
interrupted evaluation is completed by running it again, and neither batch size nor number of processes changes a set.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conditions.base import Condition
from ..config import Config
from ..methods.base import LatentModel, SamplingConfig
from ..modalities.base import Dataset, Evidence, Metric, Modality, Row, Space, Splits, Stream
from ..pretrained import cache_folder
from ..records import Joined, Moments, Records, Rows, Statistics, open_records
from ..sampling import decoder_rows, reconstruct, sample_batches, split_settings
from ..training.batches import collate, spread_evenly, value_rows, values_of
from ..training.processes import Processes
from ..types import Batch, join_values
from .protocol import Balance, Protocol

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many more are done, and how many fall to this process."""


def silent(what: str, more: int, total: int) -> None:
    """No progress."""


class Interrupted(Exception):
    """Asked to stop: what was finished is kept, and the same call goes on from there."""


class Request(Config):
    """What is to be evaluated and how, apart from the sampling settings.

    metrics: keys of rows ("fid", "psnr"); empty for all that need no download. num_samples: 0 leaves out generation.
    num_reference: real training samples that distances are taken to, evenly over the data; num_held_out: real
    ones that are reconstructed, None for all. batch_size changes nothing but memory and speed.
    """

    metrics: tuple[str, ...] = ()
    num_samples: int = 1000
    num_reference: int = 50_000
    num_held_out: int | None = None
    seed: int = 0
    batch_size: int = 64
    precision: str = "fp32"


@dataclass(frozen=True)
class Reference:
    """A set of samples from elsewhere: its name, a hash, and what is known of it.

    moments: of tensors whose mean and covariance are given; without a dataset they are all there is, of `size` samples
    (0: nobody knows). preprocessing, resolution: None where they are not known.
    """

    name: str
    data_hash: str
    dataset: Dataset | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    size: int = 0
    preprocessing: str | None = None
    resolution: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """A number and its protocol."""

    row: Row
    protocol: Protocol

    @property
    def key(self) -> str:
        """The metric's full name."""
        return self.protocol.key(self.row.key)


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation; evidence: what they were computed from; missing: keys that were asked for and
    that the evidence cannot show."""

    numbers: list[Measured]
    evidence: Evidence = field(repr=False)
    missing: tuple[str, ...] = ()

    def find(self, metric: str) -> Measured:
        """The number with a short key ("fid"); ValueError if there is none."""
        for measured in self.numbers:
            if measured.row.key == metric:
                return measured
        raise ValueError(f"metric: {metric!r} was not measured; there are {', '.join(m.row.key for m in self.numbers)}")


class Evaluator:
    """Makes the sets that metrics look at, in a folder of records."""

    def __init__(
        self, model: LatentModel | None, splits: Splits | None, folder: Path, request: Request, *,
        modality: Modality | None = None, samples: Reference | None = None, reference: Reference | None = None,
        processes: Processes | None = None, progress: Progress = silent, stop: Callable[[], bool] = lambda: False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sources: Mapping[str, str | None] | None = None, **settings: Any,
    ):  # fmt: skip
        """splits: the data the model was trained on, None where it is not known; settings: as for `sample`.

        modality: in place of the model's own, where only its evaluation settings differ. samples: judged in place of
        new ones, all of them; then the model may be None. reference: in place of the training samples.
        processes: share the work, each making some of the pieces. stop: asked between batches; once any process says
        yes, all raise Interrupted. sources: option of `unilatent evaluate` -> the file or folder it named, for the line
        in a report that makes the numbers again. ValueError if a metric is unknown, or asks for data or weights that
        are not there.
        """
        assert model is not None or (modality is not None and samples is not None)
        if splits is None and reference is None:
            raise ValueError("reference: neither it nor the data of the model is known; give --reference or --data")
        self._model, self.made = model, samples
        self.modality: Modality = modality or self.model.modality
        self.splits, self.folder, self.request, self.reference = splits, folder, request, reference
        self.processes, self.sources = processes, dict(sources or {})
        self.rank = processes.rank if processes else 0
        self.world = processes.world if processes else 1
        self.stop, self.progress, self.autocast, self.settings = stop, progress, autocast, settings
        self.sampling, self.given = split_settings(model.config.sampling if model else SamplingConfig(), settings)
        if model is not None:
            model.conditions.parse(1, self.given)
            if samples is None:
                found = processes.from_main(self._asked_by_data) if processes else self._asked_by_data()
                self.settings = {**settings, **found}
        self.metrics = choose_metrics(self.modality, request.metrics)
        self.spaces = _with_needs(self.modality.spaces(), {metric.space for metric in self.metrics})
        self.decoding: dict[str, Any] | None = None
        if model is not None and model.stepped_decoder is not None:
            s = self.sampling
            self.decoding = {"decoder_solver": s.decoder_solver, "decoder_steps": s.decoder_steps}
        own = model or processes
        device = torch.device("cpu") if own is None else own.device
        for space in self.spaces:
            space.prepare(device)
        self.fingerprint = samples.data_hash if model is None and samples is not None else self.model.fingerprint()

    def _asked_by_data(self) -> dict[str, Tensor]:
        """Values of conditions that have no end of them (texts, numbers) and that the caller leaves open: those of
        held-out samples, spread evenly, or of training ones where none are held out. Values of all other open
        conditions come from the same samples, so that they belong together; where the caller gives some, only samples
        that have those are taken. ValueError where there are none."""
        conditions, num = self.model.conditions.all, self.request.num_samples
        open_ones = [c for c in conditions if self.given.get(c.argument) is None]
        if not num or self.splits is None or all(c.cycle is not None for c in open_ones):
            return {}
        dataset = self.splits.held_out if len(self.splits.held_out) else self.splits.train
        keys = [c.argument for c in open_ones if c.argument in dataset.facts]
        if not keys:
            return {}
        size = num if isinstance(dataset, Stream) else len(dataset)
        given = [c for c in conditions if c not in open_ones]
        wanted = self._agreeing(dataset, size, given, keys) if given else [row * size // num for row in range(num)]
        found = values_of(dataset, wanted)
        return {key: value_rows([values[key] for values in found]) for key in keys}

    def _agreeing(self, dataset: Dataset, size: int, given: list[Condition], keys: list[str]) -> list[int]:
        """For each new sample one of the data's that has the values the caller gives it, spread evenly over those."""
        num, way_out = self.request.num_samples, f"give {' and '.join(keys)} as well"
        for condition in given:
            if condition.argument not in dataset.facts:
                raise ValueError(
                    f"{condition.argument}: given, but the data has none, so nobody knows which {keys[0]} belong to "
                    f"them; {way_out}"
                )
        rows = {c.argument: c.parse(self.given[c.argument]) for c in given}
        asked = [tuple(_plain(rows[key][i % len(rows[key])]) for key in rows) for i in range(num)]
        having: dict[tuple[Any, ...], list[int]] = {}
        for index, values in enumerate(values_of(dataset, range(size))):
            having.setdefault(tuple(_plain(value_rows([values[key]])[0]) for key in rows), []).append(index)
        times, turn = Counter(asked), Counter[tuple[Any, ...]]()
        chosen = []
        for i, each in enumerate(asked):
            if each not in having:
                told = ", ".join(c.describe(rows[c.argument][[i % len(rows[c.argument])]])[0] for c in given)
                raise ValueError(f"{given[0].argument}: no sample of the data has {told}; {way_out}")
            chosen.append(having[each][turn[each] * len(having[each]) // times[each]])
            turn[each] += 1
        return chosen

    @property
    def model(self) -> LatentModel:
        """The one that is evaluated; where only samples are, there is none."""
        assert self._model is not None
        return self._model

    @property
    def identity(self) -> str:
        """A hash of everything that decides the numbers, the model apart."""
        request = {key: value for key, value in self.request.plain().items() if key != "batch_size"}
        data = self.splits and [self.splits.train.fingerprint, self.splits.held_out.fingerprint]
        others = [other and other.data_hash for other in (self.reference, self.made)]
        about = [request, self.sampling.plain(), str(self.given), data, others]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def run(self) -> Evaluation:
        """Every number. All processes come here; the first computes them from the records of all, and tells them."""
        generation, reconstruction = (self._spaces_of(track) for track in ("generation", "reconstruction"))
        light = [space for space in self.spaces if not _is_heavy(space)]
        judged = bool(self.made or self.request.num_samples) and "generation" in self._tracks
        train = self._reference([s for s in self.spaces if s in generation or s in light]) if judged else None
        held_out = self._held_out([s for s in self.spaces if s in reconstruction or s in light])
        samples = self._samples(generation) if judged else None
        rebuilds = self._model is not None and held_out is not None and "reconstruction" in self._tracks
        reconstructions = self._reconstructions(len(held_out), reconstruction) if rebuilds and held_out else None
        evidence = Evidence(train, held_out, samples, reconstructions, self._train_total)
        numbers = self._shared(lambda: self._numbers(evidence))
        found = {measured.row.key for measured in numbers}
        return Evaluation(numbers, evidence, tuple(key for key in self.request.metrics if key not in found))

    def clear(self, *sets: str) -> None:
        """Removes what lies on disk of these sets: nothing needs it once the numbers are known."""
        for name in sets:
            for folder in self.folder.glob(f"{name}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    # The numbers.

    def _numbers(self, evidence: Evidence) -> list[Measured]:
        unseen = evidence if not self._only_one_set else replace(evidence, held_out=None)
        numbers = []
        for metric in self.metrics:
            self._may_go_on()
            protocol = self._protocol(metric, evidence)
            wanted = self.request.metrics or metric.gives
            rows = metric(unseen if metric.track == "generation" else evidence)
            numbers += [Measured(row, protocol) for row in rows if row.key in wanted]
        return numbers

    def _shared(self, work: Callable[[], list[Measured]]) -> list[Measured]:
        """What the first process found, in all of them."""
        found: list[Measured] | None = []
        if self.rank == 0:
            try:
                found = work()
            except Interrupted:
                found = None
        if self.processes is not None:
            found = self.processes.gather(found)[0]
        if found is None:
            raise Interrupted("the numbers")
        return found

    @property
    def _only_one_set(self) -> bool:
        """Whether what is reconstructed is also what distances are taken to."""
        s = self.splits
        return self.reference is None and s is not None and s.train.fingerprint == s.held_out.fingerprint

    @property
    def _tracks(self) -> set[str]:
        return {metric.track for metric in self.metrics}

    def _spaces_of(self, track: str) -> list[Space]:
        return _with_needs(self.spaces, {metric.space for metric in self.metrics if metric.track == track})

    # The four sets.

    @property
    def _train_total(self) -> int | None:
        """Samples of the reference as a whole, where that is known."""
        given = self.reference.dataset if self.reference else None
        if self.reference is None and self.splits is not None:
            given = self.splits.train
        return None if given is None or isinstance(given, Stream) else len(given)

    def _reference(self, spaces: list[Space]) -> Rows | None:
        given = self.reference
        if given is None:
            return self._real(self.splits.train, self.request.num_reference, spaces, fit=True) if self.splits else None
        if given.dataset is None:
            return Statistics(given.moments, given.size)
        rows = self._real(given.dataset, self.request.num_reference, spaces, fit=True)
        return Joined(rows.parts, len(rows), given.moments)

    def _held_out(self, spaces: list[Space]) -> Rows | None:
        if self.splits is None or self._model is None or not len(self.splits.held_out):
            return None
        return self._real(self.splits.held_out, self.request.num_held_out, spaces)

    def _real(
        self, dataset: Dataset, limit: int | None, spaces: list[Space], fit: bool = False, what: str = "real"
    ) -> Joined:  # fmt: skip
        """What each space keeps of at most `limit` samples, evenly over the data set; `replaced` is 1 where one stands
        in for a sample that cannot be used."""
        size = dataset.size or limit if isinstance(dataset, Stream) else len(dataset)
        if size is None:
            raise ValueError("data.num_samples: not set, and the stream does not say how many it has; set it")
        count = size if limit is None else min(limit, size)
        parts: list[Rows] = []
        for space in spaces:
            if fit:
                space.fit(Joined(parts, count))
            if space.compares or space.silent:
                continue
            about = {"data": dataset.fingerprint, "of": size, "space": space.name, "weights": space.weights,
                     "preprocessing": self.modality.preprocessing}  # fmt: skip
            records = self._open(self._root(space), what, count, about)

            def make(rows: range, done: Callable[[int], None], space: Space = space) -> dict[str, Tensor]:
                parts = []
                for batch, replaced in self._batches(dataset, rows, count):
                    parts.append({**batch.values, "replaced": replaced, **space(batch.data)})
                    done(len(replaced))
                return _joined(parts)

            self._complete(f"{what}, {space.name}", records, make)
            parts.append(records)
        return Joined(parts, count)

    def _root(self, space: Space) -> Path:
        """Real samples through a large network are worth keeping for every run that is held against them."""
        return cache_folder() / "references" if space.needs_download else self.folder

    def _reconstructions(self, count: int, spaces: list[Space]) -> Records:
        assert self.splits is not None
        dataset = self.splits.held_out
        about = {"model": self.fingerprint, "data": dataset.fingerprint, "of": len(dataset), **self._about(spaces)}
        decoding = self.decoding or {}
        records = self._open(self.folder, "reconstructions", count, about)

        def make(rows: range, done: Callable[[int], None]) -> dict[str, Tensor]:
            parts, first = [], rows.start
            for batch, replaced in self._batches(dataset, rows, count):
                with self.autocast(), decoder_rows(self.model) as decoded:
                    made = reconstruct(
                        self.model, batch.data, seed=self.request.seed, batch_size=self.request.batch_size,
                        start=first, **decoding,
                    )  # fmt: skip
                tensors = {key: torch.tensor(row) for key, row in self.modality.errors(made, batch.data).items()}
                for space in spaces:
                    tensors |= space(made) | space.against(made, batch.data)
                if decoding:
                    tensors["nfe"] = torch.full((len(replaced),), decoded["rows"] / len(replaced))
                parts.append(tensors)
                first += len(replaced)
                done(len(replaced))
            return _joined(parts)

        self._complete("reconstructions", records, make)
        return records

    def _samples(self, spaces: list[Space]) -> Rows:
        """New samples, with how often the networks looked at each (`nfe`); or those that were made elsewhere."""
        if self.made is not None:
            assert self.made.dataset is not None
            return self._real(self.made.dataset, None, spaces, what="made")
        num = self.request.num_samples
        values = self.model.conditions.parse(num, split_settings(self.sampling, self.settings)[1])
        asked = {key: hashlib.sha256(_bytes(value)).hexdigest() for key, value in values.items()}
        about = {"model": self.fingerprint, "sampling": self.sampling.plain(), "values": asked, **self._about(spaces)}
        records = self._open(self.folder, "samples", num, about)

        def make(rows: range, done: Callable[[int], None]) -> dict[str, Tensor]:
            parts = []
            with self.autocast():
                for part in sample_batches(
                    self.model, num, seed=self.request.seed, batch_size=self.request.batch_size, start=rows.start,
                    stop=rows.stop, **self.settings,
                ):  # fmt: skip
                    tensors = {**part.values, "nfe": torch.full((part.count,), part.evaluations)}
                    for space in spaces:
                        tensors |= space(part.data)
                    parts.append(tensors)
                    done(part.count)
                    self._may_go_on()
            return _joined(parts)

        self._complete("samples", records, make)
        return records

    def _open(self, root: Path, what: str, count: int, about: dict[str, Any]) -> Records:
        name = hashlib.sha256(json.dumps({"rows": count, **about}, sort_keys=True).encode()).hexdigest()[:16]
        return open_records(root / f"{what}-{name}", count, about)

    def _complete(
        self, what: str, records: Records, make: Callable[[range, Callable[[int], None]], dict[str, Tensor]]
    ) -> None:  # fmt: skip
        """Every process comes here, and leaves when all pieces are there."""
        own, missing = records.ranges[self.rank :: self.world], records.missing(self.rank, self.world)
        total = sum(map(len, own))
        self.progress(what, total - sum(map(len, missing)), total)
        stopped = False
        try:
            for rows in missing:
                records.add(rows, make(rows, lambda count: self.progress(what, count, total)))
        except Interrupted:
            stopped = True
        if self.processes.highest(stopped) if self.processes is not None else stopped:
            raise Interrupted(what)

    def _may_go_on(self) -> None:
        if self.stop():
            raise Interrupted

    def _about(self, spaces: list[Space]) -> dict[str, Any]:
        weights = {space.name: space.weights for space in spaces}
        about = {"seed": self.request.seed, "precision": self.request.precision, "spaces": weights}
        return about if self.decoding is None else {**about, "decoding": self.decoding}

    def _batches(self, dataset: Dataset, rows: range, count: int) -> Iterator[tuple[Batch, Tensor]]:
        """Samples `rows` of `count`, and of each (B,) whether it stands in for another."""
        samples = spread_evenly(dataset, rows, count)
        while some := list(islice(samples, self.request.batch_size)):
            self._may_go_on()
            replaced = torch.tensor([fault is not None for _, fault in some], dtype=torch.uint8)
            yield collate([sample for sample, _ in some], self.modality), replaced

    def _protocol(self, metric: Metric, evidence: Evidence) -> Protocol:
        generation = metric.track == "generation"
        rows = evidence.samples if generation else evidence.reconstructions
        against = evidence.train if generation else evidence.held_out
        real = Reference("", "", preprocessing=self.modality.preprocessing, resolution=self.modality.resolution)
        if generation and self.reference is not None:
            real = self.reference
        elif self.splits is not None:
            part = self.splits.train if generation else self.splits.held_out
            name = "training data" if generation else "the held-out originals"
            real = replace(real, name=name, data_hash=part.fingerprint)
        space = next((space for space in self.spaces if space.name == metric.space), None)
        return Protocol(
            track="generation" if generation else "reconstruction",
            num_samples=_count(rows, metric.most_samples),
            reference=real.name,
            reference_data=real.data_hash,
            reference_preprocessing=real.preprocessing,
            reference_resolution=real.resolution,
            num_reference=_count(against, metric.most_reference),
            replaced=int(against["replaced"].sum()) if against is not None and "replaced" in against else 0,
            preprocessing=self.modality.preprocessing,
            resolution=self.modality.resolution,
            space=space.name if space else None,
            weights=space.weights if space else None,
            balance=self._balance(evidence.samples) if generation and evidence.samples is not None else {},
            sampling=self.sampling.plain() if generation and self.made is None else None,
            decoding=None if generation and self.made is not None else self.decoding,
            nfe=float(rows.first("nfe", 1)) if rows is not None and "nfe" in rows else None,
            seed=self.request.seed,
            precision=self.request.precision,
        )

    def _balance(self, samples: Rows) -> dict[str, Balance]:
        """Of every condition."""
        kinds: dict[str, int | None] = {}
        if self.made is None:
            kinds = {condition.argument: condition.cycle for condition in self.model.conditions.all}
        elif self.made.dataset is not None:
            kinds = dict.fromkeys(self.made.dataset.facts)
        balance = {}
        for key, of in kinds.items():
            counts = samples[key].unique(dim=0, return_counts=True)[1]
            balance[key] = Balance(values=len(counts), smallest=int(counts.min()), largest=int(counts.max()), of=of)
        return balance


def _with_needs(spaces: Sequence[Space], names: set[str | None]) -> list[Space]:
    """Those spaces, and those that they are fitted to, in order."""
    needed = {need for space in spaces if space.name in names for need in space.needs}
    return [space for space in spaces if space.name in names | needed]


def _is_heavy(space: Space) -> bool:
    return space.needs_download or space.on_request


def choose_metrics(modality: Modality, keys: Sequence[str]) -> list[Metric]:
    """The metrics that give these keys; without any, those that need neither download nor request. ValueError on an
    unknown key."""
    everything = modality.metrics()
    heavy = {space.name for space in modality.spaces() if _is_heavy(space)}
    if not keys:
        return [metric for metric in everything if metric.space not in heavy]
    known = [key for metric in everything for key in metric.gives]
    for key in keys:
        if key not in known:
            raise ValueError(f"metrics: {key!r} is unknown here; there are {', '.join(known)}")
    return [metric for metric in everything if set(metric.gives) & set(keys)]


def _count(rows: Rows | None, most: int | None) -> int:
    count = 0 if rows is None else len(rows)
    return count if most is None else min(count, most)


def _joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(parts)
    return {key: join_values([part[key] for part in parts]) for key in parts[0]}


def _plain(row: Tensor) -> Any:
    """One value, comparable; of a text without the zeros behind it."""
    return row.numpy().tobytes().rstrip(b"\0") if row.dtype == torch.uint8 else row.tolist()


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()
