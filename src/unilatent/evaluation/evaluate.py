"""A model before the metrics of its modality: samples and reconstructions are made and looked at in a stream.

What is kept of each sample lies on disk in pieces (`records`), so that memory does not grow with their number, an
interrupted evaluation is completed by running it again, and neither batch size nor number of processes changes a set.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..methods.base import LatentModel
from ..modalities.base import Dataset, Evidence, Metric, Modality, Row, Space, Splits
from ..pretrained import cache_folder
from ..records import Joined, Records, Rows, Statistics, open_records
from ..sampling import reconstruct, sample_batches, split_settings
from ..training.batches import collate
from ..training.processes import Processes
from ..types import Batch
from .protocol import Balance, Protocol

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many more are done, and how many there will be."""


def silent(what: str, more: int, total: int) -> None:
    """No progress."""


class Interrupted(Exception):
    """Asked to stop: what was finished is kept, and the same call goes on from there."""


class Request(Config):
    """What is to be evaluated and how, apart from the sampling settings.

    metrics: keys of rows ("fid", "psnr"); empty for all that need no download. num_samples: 0 leaves out generation.
    num_reference: real training samples that distances are taken to, evenly over the data; num_held_out: real
    ones that are reconstructed, None for all.
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
    """Real samples from elsewhere in place of the training data: their name, a hash, and what is known of them."""

    name: str
    data_hash: str
    dataset: Dataset | None = None
    statistics: Statistics | None = None


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
    """Every number of one evaluation; evidence: what they were computed from."""

    numbers: list[Measured]
    evidence: Evidence = field(repr=False)

    def find(self, metric: str) -> Measured:
        """The number with a short key ("fid"); ValueError if there is none."""
        for measured in self.numbers:
            if measured.row.key == metric:
                return measured
        raise ValueError(f"metric: {metric!r} was not measured; there are {', '.join(m.row.key for m in self.numbers)}")


class Evaluator:
    """Makes the sets that metrics look at, in a folder of records."""

    def __init__(
        self, model: LatentModel, splits: Splits | None, folder: Path, request: Request, *,
        reference: Reference | None = None, processes: Processes | None = None, progress: Progress = silent,
        stop: Callable[[], bool] = lambda: False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, **settings: Any,
    ):  # fmt: skip
        """splits: the data the model was trained on, None where it is not known; settings: as for `sample`.

        processes: share the work, each making some of the pieces. stop: asked between batches; once any process says
        yes, all raise Interrupted. ValueError if a metric is unknown, or asks for data or weights that are not there.
        """
        self.model, self.modality, self.splits = model, model.modality, splits
        self.folder, self.request, self.reference = folder, request, reference
        self.rank = processes.rank if processes else 0
        self.world = processes.world if processes else 1
        self.highest: Callable[[int], int] = processes.highest if processes else int
        self.stop, self.progress, self.autocast, self.settings = stop, progress, autocast, settings
        self.sampling, self.given = split_settings(model.config.sampling, settings)
        self.metrics = choose_metrics(self.modality, request.metrics)
        wanted = {metric.space for metric in self.metrics}
        self.spaces = [space for space in self.modality.spaces() if space.name in wanted]
        for space in self.spaces:
            space.prepare(model.device)
        self.fingerprint = model.fingerprint()

    @property
    def identity(self) -> str:
        """A hash of everything that decides the numbers, the model apart."""
        data = self.splits and [self.splits.train.fingerprint, self.splits.held_out.fingerprint]
        reference = self.reference and self.reference.data_hash
        about = [self.request.plain(), self.sampling.plain(), str(self.given), data, reference]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def run(self) -> Evaluation:
        """Every number; each process computes all of them from the same records."""
        train = self._reference()
        held_out = self._real(self.splits.held_out, self.request.num_held_out) if self.splits else None
        reconstructs = any(metric.track == "reconstruction" for metric in self.metrics)
        reconstructions = self._reconstructions(held_out) if reconstructs and held_out else None
        samples, nfe = self._samples() if self.request.num_samples else (None, None)
        evidence = Evidence(train, held_out, samples, reconstructions)
        numbers = []
        for metric in self.metrics:
            protocol = self._protocol(metric, evidence, nfe)
            wanted = self.request.metrics or metric.gives
            numbers += [Measured(row, protocol) for row in metric(evidence) if row.key in wanted]
        return Evaluation(numbers, evidence)

    def clear(self, *sets: str) -> None:
        """Removes what lies on disk of these sets: nothing needs it once the numbers are known."""
        for name in sets:
            for folder in self.folder.glob(f"{name}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    # The four sets.

    def _reference(self) -> Rows | None:
        if self.reference is not None and self.reference.statistics is not None:
            return self.reference.statistics
        if self.reference is not None and self.reference.dataset is not None:
            return self._real(self.reference.dataset, self.request.num_reference, fit=True)
        return self._real(self.splits.train, self.request.num_reference, fit=True) if self.splits else None

    def _real(self, dataset: Dataset, limit: int | None, fit: bool = False) -> Rows:
        """What each space keeps of at most `limit` real samples, evenly over the data set."""
        size = len(dataset)
        count = size if limit is None else min(limit, size)
        parts: list[Rows] = []
        for space in self.spaces:
            if fit and parts:
                space.fit(Joined(parts))
            about = {"data": dataset.fingerprint, "of": size, "space": space.name, "weights": space.weights,
                     "preprocessing": self.modality.preprocessing}  # fmt: skip
            root = cache_folder().parent / "references" if space.needs_download else self.folder
            records = self._open(root, "real", count, about)

            def make(rows: range, space: Space = space) -> dict[str, Tensor]:
                return _joined(self._look(space, batch) for batch in self._batches(dataset, rows, size, count))

            self._complete(f"real, {space.name}", records, make)
            parts.append(records)
        return Joined(parts)

    def _reconstructions(self, held_out: Rows) -> Records:
        assert self.splits is not None
        dataset, count = self.splits.held_out, len(held_out)
        about = {"model": self.fingerprint, "data": dataset.fingerprint, "of": len(dataset), **self._about()}
        records = self._open(self.folder, "reconstructions", count, about)

        def make(rows: range) -> dict[str, Tensor]:
            parts, first = [], rows.start
            for batch in self._batches(dataset, rows, len(dataset), count):
                with self.autocast():
                    made = reconstruct(
                        self.model, batch.data, seed=self.request.seed, batch_size=self.request.batch_size, start=first
                    )
                errors = {key: torch.tensor(row) for key, row in self.modality.errors(made, batch.data).items()}
                for space in self.spaces:
                    errors |= space(made) | space.against(made, batch.data)
                parts.append(errors)
                first += len(next(iter(errors.values())))
            return _joined(parts)

        self._complete("reconstructions", records, make)
        return records

    def _samples(self) -> tuple[Records, float]:
        """New samples, and how often the denoiser looked at each."""
        num = self.request.num_samples
        values = self.model.conditions.parse(num, self.given)
        asked = {key: hashlib.sha256(_bytes(value)).hexdigest() for key, value in values.items()}
        about = {"model": self.fingerprint, "sampling": self.sampling.plain(), "values": asked, **self._about()}
        records = self._open(self.folder, "samples", num, about)

        def make(rows: range) -> dict[str, Tensor]:
            parts = []
            with self.autocast():
                for part in sample_batches(
                    self.model, num, seed=self.request.seed, batch_size=self.request.batch_size, start=rows.start,
                    stop=rows.stop, **self.settings,
                ):  # fmt: skip
                    tensors = dict(part.values)
                    tensors["nfe"] = torch.full((part.count,), part.evaluations)
                    for space in self.spaces:
                        tensors |= space(part.data)
                    parts.append(tensors)
                    self.progress("samples", part.count, num)
                    self._may_go_on()
            return _joined(parts)

        self._complete("samples", records, make, says=False)
        return records, float(records.first("nfe", 1))

    def _open(self, root: Path, what: str, count: int, about: dict[str, Any]) -> Records:
        name = hashlib.sha256(json.dumps({"rows": count, **about}, sort_keys=True).encode()).hexdigest()[:16]
        return open_records(root / f"{what}-{name}", count, about)

    def _complete(
        self, what: str, records: Records, make: Callable[[range], dict[str, Tensor]], says: bool = True
    ) -> None:
        """Every process comes here, and leaves when all pieces are there."""
        stopped = False
        try:
            for rows in records.missing(self.rank, self.world):
                records.add(rows, make(rows))
                if says:
                    self.progress(what, len(rows), len(records))
        except Interrupted:
            stopped = True
        if self.highest(stopped):
            raise Interrupted(what)

    def _may_go_on(self) -> None:
        if self.stop():
            raise Interrupted

    def _about(self) -> dict[str, Any]:
        spaces = {space.name: space.weights for space in self.spaces}
        return {"seed": self.request.seed, "precision": self.request.precision, "spaces": spaces}

    def _batches(self, dataset: Dataset, rows: range, size: int, count: int) -> Iterable[Batch]:
        for first in range(rows.start, rows.stop, self.request.batch_size):
            self._may_go_on()
            chosen = range(first, min(first + self.request.batch_size, rows.stop))
            yield collate([dataset[i * size // count] for i in chosen], self.modality)

    def _look(self, space: Space, batch: Batch) -> dict[str, Tensor]:
        return {**batch.values, **space(batch.data)}

    def _protocol(self, metric: Metric, evidence: Evidence, nfe: float | None) -> Protocol:
        generation = metric.track == "generation"
        rows = evidence.samples if generation else evidence.reconstructions
        against = evidence.train if generation else evidence.held_out
        held_out = self.splits.held_out.fingerprint if self.splits else ""
        own = (self.splits.train.fingerprint if self.splits else "") if generation else held_out
        name = "training data" if generation else "the held-out originals"
        space = next((space for space in self.spaces if space.name == metric.space), None)
        balance = {}
        if generation and evidence.samples is not None:
            for key in self.model.conditions.arguments:
                counts = evidence.samples[key].unique(dim=0, return_counts=True)[1]
                balance[key] = Balance(values=len(counts), smallest=int(counts.min()), largest=int(counts.max()))
        return Protocol(
            track="generation" if generation else "reconstruction",
            num_samples=0 if rows is None else len(rows),
            reference=self.reference.name if self.reference and generation else name,
            reference_data=self.reference.data_hash if self.reference and generation else own,
            num_reference=0 if against is None else len(against),
            preprocessing=self.modality.preprocessing,
            resolution=self.modality.resolution,
            space=space.name if space else None,
            weights=space.weights if space else None,
            balance=balance,
            sampling=self.sampling.plain() if generation else None,
            nfe=nfe if generation else None,
            seed=self.request.seed,
            precision=self.request.precision,
        )


def choose_metrics(modality: Modality, keys: Sequence[str]) -> list[Metric]:
    """The metrics that give these keys; without any, those that need no download. ValueError on an unknown key."""
    everything = modality.metrics()
    heavy = {space.name for space in modality.spaces() if space.needs_download}
    if not keys:
        return [metric for metric in everything if metric.space not in heavy]
    known = [key for metric in everything for key in metric.gives]
    for key in keys:
        if key not in known:
            raise ValueError(f"metrics: {key!r} is unknown here; there are {', '.join(known)}")
    return [metric for metric in everything if set(metric.gives) & set(keys)]


def _joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(parts)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()
