"""Evaluate a model with the metrics of its modality: generate, reconstruct and extract features in batches.

The features of each sample are stored on disk in chunks (`records`). So memory does not grow with their number, an
interrupted evaluation is completed by running it again, and neither the batch size nor the number of processes changes
a sample. Several processes share the chunks; a sharded model they run together, batch by batch. Only features and 8-bit
pixels leave a process, and no picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..batches import collate, spread_evenly
from ..config import Config, suggestion
from ..devices import float32_products
from ..methods.base import LatentModel
from ..modalities.base import Dataset, Evidence, Metric, Modality, Row, Space, Splits, Stream
from ..model_config import SamplingConfig, follow
from ..plain_text import count_of
from ..pretrained import cache_folder
from ..processes import Processes
from ..progress import Progress, no_progress
from ..records import Joined, Moments, Records, Rows, Statistics, open_records, remove_records
from ..sampling import (
    SampleBatch,
    check_given,
    decoder_rows,
    reconstruct,
    refuse_given,
    sample_batches,
    sample_rows,
    split_settings,
)
from ..sharding import is_sharded
from ..types import Batch, Given, join_values
from .condition_values import values_from_data
from .protocol import Balance, Protocol

UNCONDITIONAL = 256
"""Most samples without a condition, of metrics that have them as a baseline."""


class Interrupted(Exception):
    """A stop was requested. Finished chunks are stored; the same call resumes from them."""


class EvaluationRequest(Config):
    """What to evaluate, apart from the sampling settings.

    metrics: keys of rows ("fid", "psnr"); empty for all that need no download. num_samples: generated samples; 0 leaves
    out generation. num_reference: real training samples to compute distances to, spread evenly over the data.
    num_held_out: held-out samples to reconstruct; None for all. batch_size affects only memory and speed.
    precision: what the model computes in; features and metrics are float32 and float64 in any case.
    """

    metrics: tuple[str, ...] = ()
    num_samples: int = 1000
    num_reference: int = 50_000
    num_held_out: int | None = None
    seed: int = 0
    batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class SampleSet:
    """A set of samples to compare with, or to evaluate: its name, a hash, and what is known about it.

    moments: (mean, covariance) by tensor, where these are given. Without a dataset they are all there is, computed from
    `size` samples (0: unknown). preprocessing, resolution: None if unknown.
    """

    name: str
    data_hash: str
    dataset: Dataset | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    size: int = 0
    preprocessing: str | None = None
    resolution: tuple[int, ...] | None = None

    @property
    def notes(self) -> Sequence[str]:
        """What was found with the samples and is not used, one line each."""
        return () if self.dataset is None else self.dataset.notes


@dataclass(frozen=True)
class EvaluatedMetric:
    """A metric result and the protocol it was computed with."""

    row: Row
    protocol: Protocol

    @property
    def key(self) -> str:
        """The metric's full name."""
        return self.protocol.key(self.row.key)


@dataclass(frozen=True)
class Evaluation:
    """All results of one evaluation, and the metric inputs they were computed from.

    missing: keys of requested metrics that could not be computed from these inputs.
    """

    numbers: list[EvaluatedMetric]
    evidence: Evidence = field(repr=False)
    missing: tuple[str, ...] = ()

    def find(self, metric: str) -> EvaluatedMetric:
        """Return the result with a short key ("fid"); ValueError if there is none."""
        for result in self.numbers:
            if result.row.key == metric:
                return result
        computed = ", ".join(result.row.key for result in self.numbers)
        if not computed:
            raise ValueError(
                f"metric: {metric!r} cannot be measured of these samples and data; choose another one, or give the "
                "folder of the run, whose data have held-out samples"
            )
        raise ValueError(f"metric: {metric!r} was not computed; available are {computed}")


class Completed(NamedTuple):
    """Held-out samples that were completed."""

    scored: Any
    """The data as metrics see them."""
    made: SampleBatch
    batch: Batch
    given: Given


class Evaluator:
    """Prepares the metric inputs in a folder of records, and computes the metrics."""

    def __init__(
        self, model: LatentModel | None, splits: Splits | None, folder: Path, request: EvaluationRequest, *,
        modality: Modality | None = None, samples: SampleSet | None = None, reference: SampleSet | None = None,
        processes: Processes | None = None, progress: Progress = no_progress,
        stop: Callable[[], bool] = lambda: False,
        sources: Mapping[str, str | None] | None = None, **settings: Any,
    ):  # fmt: skip
        """splits: the data the model was trained on; None if unknown. settings: as for `sample`.

        modality: used instead of the model's own, from which it differs only in evaluation settings. samples: evaluated
        instead of newly generated ones, all of them; the model may then be None. reference: used instead of the
        training samples. processes: share the work by chunks; all create the Evaluator and call its methods. stop:
        called between batches; once it returns True in any process, all raise Interrupted. sources: option of
        `unilatent evaluate` -> what was given for it, for the command line in a report. ValueError if a metric is
        unknown, or its data or weights are missing.
        """
        assert model is not None or (modality is not None and samples is not None)
        if splits is None and reference is None:
            raise ValueError("reference: the model's training data is unknown; give --reference or --data")
        self._model, self.external_samples = model, samples
        self.modality: Modality = modality or self.model.modality
        self.splits, self.folder, self.request, self.reference = splits, folder, request, reference
        self.processes, self.sources = processes or Processes.alone(), dict(sources or {})
        self.in_lock_step = model is not None and any(is_sharded(weight) for weight in model.parameters())
        self.stop, self.progress, self.settings = stop, progress, settings
        self.sampling, self.condition_arguments = split_settings(
            model.config.sampling if model else SamplingConfig(), settings
        )
        if model is not None:
            if splits is not None:
                follow(model.config.conditions, splits)
            num = 0 if samples is not None else request.num_samples
            if num and self.processes.world > 1:
                model.conditions.prepare(self.processes)  # here, where the first process can read for all
            model.conditions.parse(max(num, 1), self.condition_arguments, all_used=num > 0)
            if samples is None:
                self.settings = {**settings, **self._condition_values()}
        self.notes: list[str] = []
        """What of the request is not as it was asked for, one line each."""
        if self.modality.completes_in_evaluation:
            self._refuse_no_completions()
            if splits is not None and samples is None and (there := len(splits.held_out)) < request.num_samples:
                self.notes.append(
                    f"{count_of(request.num_samples, 'sample')} asked for, but only {count_of(there, 'sample')} held "
                    "out to be completed, each once"
                )
        self.metrics = choose_metrics(self.modality, request.metrics)
        self.spaces = _with_needs(self.modality.spaces(), _read_by(self.metrics))
        if self.processes.world == 1:  # in one of several processes, a stop inside a batch would leave the others
            for space in self.spaces:
                space.progress = self._within
        self.decoding: dict[str, Any] | None = None
        if model is not None and model.stepped_decoder is not None:
            s = self.sampling
            self.decoding = {"decoder_solver": s.decoder_solver, "decoder_steps": s.decoder_steps}
        runs_on = model or processes
        self.device = torch.device("cpu") if runs_on is None else runs_on.device
        prepare(self.spaces, self.device, self.processes)
        self.fingerprint = samples.data_hash if model is None and samples is not None else self.model.fingerprint()

    def _refuse_no_completions(self) -> None:
        """ValueError if held-out samples cannot be completed, before anything is computed."""
        refuse_given(self._model)
        if self.splits is None or not len(self.splits.held_out):
            raise ValueError("data.held_out: 0, but held-out samples are needed to give parts of; set it, or --data")
        if chosen := [key for key, value in self.condition_arguments.items() if value is not None]:
            raise ValueError(f"{chosen[0]}: completed samples have the values of the held-out ones; leave it out")

    def _condition_values(self) -> dict[str, Tensor]:
        """Return the condition values that the data supplies, the same in all processes."""

        def read() -> dict[str, Tensor]:
            return values_from_data(
                self.model.conditions.all, self.condition_arguments, self.splits, self.request.num_samples
            )

        return self.processes.from_main(read)

    @property
    def model(self) -> LatentModel:
        """The evaluated model. Must not be used if only external samples are evaluated."""
        assert self._model is not None
        return self._model

    @property
    def identity(self) -> str:
        """A hash of everything that determines the numbers, except the model."""
        request = {key: value for key, value in self.request.plain().items() if key != "batch_size"}
        data = self.splits and [self.splits.train.fingerprint, self.splits.held_out.fingerprint]
        external = [source and source.data_hash for source in (self.reference, self.external_samples)]
        about = [request, self.sampling.plain(), str(self.condition_arguments), data, external]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def run(self) -> Evaluation:
        """Compute all metrics. Call it in every process; the first computes them from the records of all."""
        generation, reconstruction = (self._spaces_of(track) for track in ("generation", "reconstruction"))
        light = [space for space in self.spaces if not _is_heavy(space)]
        generates = bool(self.external_samples or self.request.num_samples) and "generation" in self._tracks
        train = self._reference([s for s in self.spaces if s in generation or s in light]) if generates else None
        beside = _read_by(metric for metric in self.metrics if metric.needs_held_out)
        held_out = self._held_out([s for s in self.spaces if s in reconstruction or s in light or s.name in beside])
        samples = self._samples(generation) if generates else None
        unconditional = self._unconditional() if generates else None
        reconstructs = self._model is not None and held_out is not None and "reconstruction" in self._tracks
        reconstructions = self._reconstructions(len(held_out), reconstruction) if reconstructs and held_out else None
        evidence = Evidence(
            train, held_out, samples, reconstructions, self._train_total, unconditional, self._columns, self._within
        )  # fmt: skip
        results = self.processes.from_main(lambda: self._results_unless_stopped(evidence))
        if results is None:
            raise Interrupted("the metrics")
        computed = {result.row.key for result in results}
        return Evaluation(results, evidence, tuple(key for key in self.request.metrics if key not in computed))

    def clear(self, *sets: str) -> None:
        """Delete the records of these sets ("samples", "reconstructions", "unconditional"), which finished numbers no
        longer need."""
        for name in sets:
            for folder in self.folder.glob(f"{name}-*"):
                remove_records(folder)

    # ---- results

    def _results(self, evidence: Evidence) -> list[EvaluatedMetric]:
        for_generation = evidence if not self._only_one_set else replace(evidence, held_out=None)
        results = []
        for metric in self.metrics:
            self._check_stop()
            seen = for_generation if metric.track == "generation" else evidence
            protocol = self._protocol(metric, seen)
            requested = self.request.metrics or metric.gives
            results += [EvaluatedMetric(row, protocol) for row in metric(seen) if row.key in requested]
        return results

    def _results_unless_stopped(self, evidence: Evidence) -> list[EvaluatedMetric] | None:
        try:
            return self._results(evidence)
        except Interrupted:
            return None

    @property
    def _only_one_set(self) -> bool:
        """Whether the reconstructed samples are also the reference: then there are no held-out ones to compare with."""
        s = self.splits
        return self.reference is None and s is not None and s.train.fingerprint == s.held_out.fingerprint

    @property
    def _dataset_details(self) -> Mapping[str, str]:
        """`Dataset.details` of the reference, or else of the run's own data."""
        if self.reference is not None:
            return self.reference.dataset.details if self.reference.dataset is not None else {}
        return self.splits.train.details if self.splits is not None else {}

    @property
    def _tracks(self) -> set[str]:
        return {metric.track for metric in self.metrics}

    def _spaces_of(self, track: str) -> list[Space]:
        return _with_needs(self.spaces, _read_by(metric for metric in self.metrics if metric.track == track))

    # ---- the four sets of samples

    @property
    def _train_total(self) -> int | None:
        """Number of samples of the whole reference; None if unknown."""
        dataset = self.reference.dataset if self.reference else None
        if self.reference is None and self.splits is not None:
            dataset = self.splits.train
        return None if dataset is None or isinstance(dataset, Stream) else len(dataset)

    def _reference(self, spaces: list[Space]) -> Rows | None:
        reference = self.reference
        if reference is None:
            return self._real(self.splits.train, self.request.num_reference, spaces, fits=True) if self.splits else None
        if reference.dataset is None:
            return Statistics(reference.moments, reference.size)
        rows = self._real(reference.dataset, self.request.num_reference, spaces, fits=True)
        return Joined(rows.parts, len(rows), reference.moments)

    def _held_out(self, spaces: list[Space]) -> Rows | None:
        if self.splits is None or self._model is None or not len(self.splits.held_out):
            return None
        return self._real(self.splits.held_out, self.request.num_held_out, spaces, controls=True)

    def _real(
        self, dataset: Dataset, limit: int | None, spaces: list[Space], fits: bool = False, what: str = "real",
        controls: bool = False,
    ) -> Joined:  # fmt: skip
        """Return the features of at most `limit` samples of a data set, spread evenly over it.

        fits: whether extractors are fitted to it. controls: whether to add those of `Space.controls`, where an
        extractor has any.
        Column `replaced` is 1 where another sample replaces one that cannot be used.
        """
        size = dataset.size or limit if isinstance(dataset, Stream) else len(dataset)
        if size is None:
            raise ValueError(
                "data.num_samples: not set, and the stream does not say how many it has; give data.num_samples=NUMBER"
            )
        count = size if limit is None else min(limit, size)
        parts: dict[str, Rows] = {}
        waiting: list[Space] = []

        def extract() -> None:
            parts.update(self._extracted(dataset, size, count, waiting, what, controls))
            waiting.clear()

        for space in sorted(spaces, key=lambda space: fits and space.is_fitted):
            if fits and space.is_fitted:
                if {other.name for other in waiting} & set(space.needs):
                    extract()
                fit(space, Joined(list(parts.values()), count), self.device, self.processes)
            if not space.compares and not space.silent:
                waiting.append(space)
        extract()
        return Joined([parts[space.name] for space in spaces if space.name in parts], count)

    def _extracted(
        self, dataset: Dataset, size: int, count: int, spaces: Sequence[Space], what: str, controls: bool
    ) -> dict[str, Records]:
        """Return the features of each extractor. Extractors that lack the same chunks share one pass over the data."""
        found: dict[str, Records] = {}
        passes: dict[tuple[Any, ...], list[Space]] = {}
        for space in spaces:
            about = {"of": size, "space": space.name, "weights": space.weights,
                     "preprocessing": self.modality.preprocessing, **_details_of([space])}  # fmt: skip
            if controls and _has_controls(space):
                about["controls"] = True
            records, missing = self._open(self._root(space), what, count, about, dataset)
            found[space.name] = records
            passes.setdefault((records.chunk_size, *missing), []).append(space)

        for (_, *missing), together in passes.items():
            names = [space.name for space in together]

            def extract(rows: range, together: Sequence[Space] = together) -> Iterator[list[dict[str, Tensor]]]:
                for batch, replaced in self._batches(dataset, rows, count):
                    shared = {**batch.values, "replaced": replaced}
                    features = []
                    with float32_products():
                        for space in together:
                            controlled = space.controls(batch.data) if controls and _has_controls(space) else {}
                            features.append({**shared, **space(batch.data), **controlled})
                    yield features

            self._complete(f"{what}, {', '.join(names)}", [found[name] for name in names], missing, extract)
        return found

    def _root(self, space: Space) -> Path:
        """The folder for a space's records of real samples; those of large networks are cached for all runs."""
        return cache_folder() / "references" if space.needs_download else self.folder

    def _reconstructions(self, count: int, spaces: list[Space]) -> Records:
        """Reconstruct the held-out samples; `nfe` holds the decoder evaluations per sample of a decoder with steps."""
        assert self.splits is not None
        dataset = self.splits.held_out
        about = {"model": self.fingerprint, "of": len(dataset), **self._about(spaces)}
        decoding = self.decoding or {}
        records, missing = self._open(self.folder, "reconstructions", count, about, dataset)

        def make(rows: range) -> Iterator[list[dict[str, Tensor]]]:
            first = rows.start
            for batch, replaced in self._batches(dataset, rows, count):
                with decoder_rows(self.model) as decoded:
                    reconstructions = reconstruct(
                        self.model, batch.data, seed=self.request.seed, batch_size=self.request.batch_size,
                        start=first, precision=self.request.precision, **decoding,
                    )  # fmt: skip
                errors = self.modality.errors(reconstructions, batch.data)
                tensors = {key: torch.tensor(values) for key, values in errors.items()}
                with float32_products():
                    for space in spaces:
                        tensors |= space(reconstructions) | space.against(reconstructions, batch.data)
                if decoding:
                    tensors["nfe"] = torch.full((len(replaced),), decoded["rows"] / len(replaced))
                first += len(replaced)
                yield [tensors]

        def company() -> None:
            batch, _ = next(self._batches(dataset, range(1), count))
            reconstruct(self.model, batch.data, precision=self.request.precision, **decoding)

        self._complete("reconstructions", [records], missing, make, company)
        return records

    def _samples(self, spaces: list[Space]) -> Rows:
        """Generate samples; `nfe` holds the network evaluations per sample. Or read the external ones."""
        if self.external_samples is not None:
            assert self.external_samples.dataset is not None
            return self._real(self.external_samples.dataset, None, spaces, what="made")
        if self.modality.completes_in_evaluation:
            return self._completions(spaces)
        return self._drawn("samples", self.request.num_samples, spaces, self.settings)

    def _unconditional(self) -> Rows | None:
        """Generate the first samples once more, without any condition, if a metric needs them."""
        wanting = _read_by(metric for metric in self.metrics if metric.needs_unconditional(self._columns))
        if not wanting:
            return None
        settings = {**self.settings, "guidance_scale": 0.0, "guidance_interval": (0.0, 1.0)}
        num = min(self.request.num_samples, UNCONDITIONAL)
        return self._drawn("unconditional", num, _with_needs(self.spaces, wanting), settings)

    @property
    def _columns(self) -> dict[str, str]:
        """`Evidence.columns` of the samples that the model makes."""
        if self._model is None or self.external_samples is not None:
            return {}
        return {c.argument: c.column for c in self.model.conditions.all if c.column is not None}

    def _drawn(self, what: str, num: int, spaces: list[Space], settings: dict[str, Any]) -> Records:
        """Generate a set of samples."""
        sampling, arguments = split_settings(self.model.config.sampling, settings)
        values = self.model.conditions.parse(num, arguments)
        hashes = {key: hashlib.sha256(_bytes(value)).hexdigest() for key, value in values.items()}
        about = {"model": self.fingerprint, "sampling": sampling.plain(), "values": hashes, **self._about(spaces)}
        records, missing = self._open(self.folder, what, num, about)

        def batches(rows: range) -> Iterator[SampleBatch]:
            return sample_batches(
                self.model, num, seed=self.request.seed, batch_size=self.request.batch_size, start=rows.start,
                stop=rows.stop, precision=self.request.precision, to=self.model.device, **settings,
            )  # fmt: skip

        def make(rows: range) -> Iterator[list[dict[str, Tensor]]]:
            for batch in batches(rows):
                tensors = {**batch.values, "nfe": torch.full((batch.count,), batch.evaluations)}
                with float32_products():
                    for space in spaces:
                        tensors |= space(batch.data)
                yield [tensors]

        name = "samples" if what == "samples" else f"{what} samples"
        self._complete(name, [records], missing, make, lambda: next(batches(range(1))))
        return records

    def _completions(self, spaces: list[Space]) -> Rows:
        """Complete held-out samples from what the modality gives of them, each once and with its own condition values;
        with the errors of what was made against the truth."""
        assert self.splits is not None
        dataset, num = self.splits.held_out, self.completions
        about = {"model": self.fingerprint, "sampling": self.sampling.plain(), "given": self.modality.config.plain(),
                 **self._about(spaces)}  # fmt: skip
        records, missing = self._open(self.folder, "samples", num, about, dataset)

        def make(rows: range) -> Iterator[list[dict[str, Tensor]]]:
            for seen, made, batch, given in self.completed(rows):
                tensors = {**made.values, "nfe": torch.full((made.count,), made.evaluations)}
                errors = self.modality.errors_of_rest(seen, batch.data, given)
                tensors |= {key: torch.tensor(values) for key, values in errors.items()}
                filled = self.modality.fill(given)
                with float32_products():
                    for space in spaces:
                        tensors |= space(seen) | space.against(seen, batch.data)
                        control = space.against(filled, batch.data)
                        tensors |= {f"filled_{key}": value for key, value in control.items()}
                yield [tensors]

        self._complete("completed samples", [records], missing, make, lambda: next(self.completed(range(1))))
        return records

    @property
    def completions(self) -> int:
        """How many held-out samples are completed."""
        return 0 if self.splits is None else min(self.request.num_samples, len(self.splits.held_out))

    def completed(self, rows: range) -> Iterator[Completed]:
        """Complete the held-out samples with these numbers, of 0 to `completions`."""
        assert self.splits is not None
        seed, precision, num, first = self.request.seed, self.request.precision, self.completions, rows.start
        for batch, _ in self._batches(self.splits.held_out, rows, num):
            given = check_given(self.model, self.modality.given_in_evaluation(batch.data), num)
            assert given is not None
            at = range(first, first + len(given))
            made = sample_rows(self.model, at, batch.values, self.sampling, seed, precision, given=given)
            again = partial(reconstruct, self.model, seed=seed, start=at.start, precision=precision)
            yield Completed(self.modality.scored(made.data, given, again), made, batch, given)
            first = at.stop

    def _open(
        self, root: Path, what: str, count: int, about: dict[str, Any], data: Dataset | None = None
    ) -> tuple[Records, list[range]]:  # fmt: skip
        """Open or create records; also return the missing chunks, the same in all processes.

        data: what the rows were made of, whose fingerprint the first process alone computes.
        """

        def open_here() -> tuple[Path, int, list[range]]:
            made_by = {**about, "data": data.fingerprint} if data is not None else about
            name = hashlib.sha256(json.dumps({"rows": count, **made_by}, sort_keys=True).encode()).hexdigest()[:16]
            records = open_records(root / f"{what}-{name}", count, made_by, self.processes.world)
            return records.folder, records.chunk_size, records.missing()

        folder, chunk_size, missing = self.processes.from_main(open_here)
        if root != self.folder and self.processes.highest(not folder.is_dir()):  # the cache of another machine
            return self._open(self.folder, what, count, about, data)
        return Records(folder, count, chunk_size), missing

    def _complete(
        self, what: str, records: Sequence[Records], missing: list[range],
        make: Callable[[range], Iterator[list[dict[str, Tensor]]]], company: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """Write missing chunks, the same of all records; returns in every process once all of them are there.

        A process takes the next chunk when it has finished one. With a sharded model, whose processes work in lock
        step, each has an equal share instead.

        make: yields the tensors of rows batch by batch, a dict for each of the records. company: a smallest forward
        pass of the model that `make` runs; None if it runs none.
        """
        own, total = self.processes.shared(missing, fixed=self.in_lock_step), len(records[0])
        before = shown = total - sum(map(len, missing))
        self.progress(what, before, total)

        def turns() -> Iterator[None]:
            nonlocal shown
            for rows in own:
                batches: list[list[dict[str, Tensor]]] = []
                left = len(rows)
                for tensors in make(rows):
                    batches.append(tensors)
                    count = len(next(iter(tensors[0].values())))
                    left -= count
                    if not left:
                        for one, its in zip(records, zip(*batches, strict=True), strict=True):
                            one.add(rows, _concatenated(its))
                    done = before + own.add(count)
                    self.progress(what, done - shown, total)
                    shown = done
                    yield

        def stop() -> bool:
            if stopped := self.stop():
                own.stop()
            return stopped

        batches = sum(-(-len(rows) // self.request.batch_size) for rows in own.items) if self.in_lock_step else 0
        goes_on = self.processes.take_turns(turns(), batches, stop, company if self.in_lock_step else None)
        if not goes_on:
            raise Interrupted(what)

    def _check_stop(self) -> None:
        if self.stop():
            raise Interrupted

    def _within(self, what: str, more: int, total: int) -> None:
        """The progress of metrics, and of features within a batch."""
        if self.stop():
            raise Interrupted(what)
        self.progress(what, more, total)

    def _about(self, spaces: list[Space]) -> dict[str, Any]:
        weights = {space.name: space.weights for space in spaces}
        about = {"seed": self.request.seed, "precision": self.request.precision, "spaces": weights}
        about |= _details_of(spaces)
        return about if self.decoding is None else {**about, "decoding": self.decoding}

    def _batches(self, dataset: Dataset, rows: range, count: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield samples `rows` of `count` in batches, with a flag (B,) for those that replace one that is unusable."""
        samples = spread_evenly(dataset, rows, count)
        while items := list(islice(samples, self.request.batch_size)):
            replaced = torch.tensor([fault is not None for _, fault in items], dtype=torch.uint8)
            yield collate([example for example, _ in items], self.modality), replaced

    # ---- protocols

    def _protocol(self, metric: Metric, evidence: Evidence) -> Protocol:
        generation = metric.track == "generation"
        rows, against = evidence.compared(metric.track)
        real = self._real_set(generation)
        spaces = [space for space in self.spaces if space.name in metric.spaces]
        external = self.external_samples is not None
        num_samples, num_reference = metric.used(evidence)
        return Protocol(
            track="generation" if generation else "reconstruction",
            num_samples=num_samples,
            reference=real.name,
            reference_data=real.data_hash,
            reference_preprocessing=real.preprocessing,
            reference_resolution=real.resolution,
            num_reference=num_reference,
            replaced=int(against["replaced"].sum()) if against is not None and "replaced" in against else 0,
            preprocessing=self.modality.preprocessing,
            resolution=self.modality.resolution,
            space=", ".join(space.name for space in spaces) or None,
            weights=", ".join(filter(None, (space.weights for space in spaces))) or None,
            details={**self._dataset_details, **_merged(spaces), **metric.details},
            relative_to=self._relative_to(evidence) if metric.relative else None,
            balance=self._balance(evidence.samples) if generation and evidence.samples is not None else {},
            sampling=self.sampling.plain() if generation and not external else None,
            decoding=None if generation and external else self.decoding,
            nfe=float(rows.first("nfe", 1)) if rows is not None and "nfe" in rows else None,
            seed=self.request.seed,
            precision=self.request.precision,
        )

    def _relative_to(self, evidence: Evidence) -> str:
        """The real samples whose distance others are relative to, with the first digits of their hash."""
        if evidence.held_out is None or self.splits is None:
            return "half of the reference"
        return f"held-out data {self.splits.held_out.fingerprint[:12]}"

    def _real_set(self, generation: bool) -> SampleSet:
        """The real samples that samples or reconstructions are compared with."""
        if generation and self.reference is not None:
            return self.reference
        real = SampleSet("", "", preprocessing=self.modality.preprocessing, resolution=self.modality.resolution)
        if self.splits is None:
            return real
        part = self.splits.train if generation else self.splits.held_out
        name = "training data" if generation else "the held-out originals"
        return replace(real, name=name, data_hash=part.fingerprint)

    def _balance(self, samples: Rows) -> dict[str, Balance]:
        """How evenly each condition's values occur in the samples."""
        cycles: dict[str, int | None] = {}
        if self.external_samples is None:
            cycles = {condition.argument: condition.cycle for condition in self.model.conditions.all}
        elif self.external_samples.dataset is not None:
            cycles = dict.fromkeys(self.external_samples.dataset.facts)
        balance = {}
        for key, of in cycles.items():
            counts = samples[key].unique(dim=0, return_counts=True)[1]
            balance[key] = Balance(values=len(counts), smallest=int(counts.min()), largest=int(counts.max()), of=of)
        return balance


def prepare(spaces: Sequence[Space], device: torch.device, processes: Processes) -> None:
    """Load what extractors need; ValueError in all processes names what is missing.

    The first process reads weights, after it has downloaded what is missing, and sends them to the others.
    """
    light = [space for space in spaces if not space.needs_download]

    def prepare_light() -> None:
        for space in light:
            space.prepare(device)

    processes.on_main(prepare_light)
    if not processes.is_main:
        prepare_light()
    for space in spaces:
        if space.needs_download:
            _done_by_one(space, partial(space.prepare, device), space.loaded, device, processes)


def fit(space: Space, train: Rows, device: torch.device, processes: Processes) -> None:
    """Fit an extractor in the first process; the others take what it found."""
    if space.is_fitted:
        _done_by_one(space, partial(space.fit, train), space.fitted, device, processes)


def _done_by_one(
    space: Space, work: Callable[[], None], names: Sequence[str], device: torch.device, processes: Processes
) -> None:
    """Let the first process do work that sets these attributes of an extractor, and set them in the others."""

    def state() -> dict[str, Any]:
        work()
        return space.state(names)

    found = processes.share(state)
    if not processes.is_main:
        space.adopt(found, device)


def choose_metrics(modality: Modality, keys: Sequence[str]) -> list[Metric]:
    """Return the metrics that compute these keys; without keys, all that need no download and are not on request.

    ValueError on an unknown key.
    """
    metrics = modality.metrics()
    heavy = {space.name for space in modality.spaces() if _is_heavy(space)}
    if not keys:
        return [metric for metric in metrics if not heavy & set(metric.spaces)]
    known = [key for metric in metrics for key in metric.gives]
    for key in keys:
        if key not in known:
            raise ValueError(f"metrics: {key!r} is unknown here{suggestion(key, known)}; use one of {', '.join(known)}")
    return [metric for metric in metrics if set(metric.gives) & set(keys)]


def heavy_spaces(modality: Modality, metrics: Sequence[Metric]) -> list[Space]:
    """Return the feature extractors of these metrics that need a download or a package."""
    wanted = _with_needs(modality.spaces(), _read_by(metrics))
    return [space for space in wanted if _is_heavy(space)]


def _read_by(metrics: Iterable[Metric]) -> set[str]:
    """Return the names of the extractors that metrics read."""
    return {name for metric in metrics for name in metric.spaces}


def _with_needs(spaces: Sequence[Space], names: set[str]) -> list[Space]:
    """Return the named spaces and those they are fitted to, in order."""
    needed = {need for space in spaces if space.name in names for need in space.needs}
    return [space for space in spaces if space.name in names | needed]


def _details_of(spaces: Sequence[Space]) -> dict[str, Any]:
    """Return the details of the extractors that have any, for the identity of records."""
    details = {space.name: dict(space.details) for space in spaces if space.details}
    return {"details": details} if details else {}


def _merged(spaces: Sequence[Space]) -> dict[str, str]:
    return {name: text for space in spaces for name, text in space.details.items()}


def _has_controls(space: Space) -> bool:
    return type(space).controls is not Space.controls


def _is_heavy(space: Space) -> bool:
    return space.needs_download or space.on_request


def _concatenated(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    batches = list(batches)
    return {key: join_values([batch[key] for batch in batches]) for key in batches[0]}


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()
