"""Metrics of a mixed set: each part (modality of one kind) evaluates the samples of its kind.

The spaces of a part receive only these samples. Their tensors are stored for all samples, named "PART.NAME", with 0 for
samples of the other kind. Metric keys are those of the parts; a key that both parts have gets the prefix "PART_".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...records import Rows
from ...types import take
from .._atoms.modality import AtomModality
from ..base import Evidence, Metric, Row, Space

PERIODIC = "periodic"
"""Name of the tensor that says whether a sample is periodic, stored by `KindSpace`."""


def spaces(parts: Sequence[AtomModality]) -> list[Space]:
    """Return the space that stores each sample's kind, and every space of every part."""
    return [KindSpace(parts), *[PartSpace(part, space) for part in parts for space in part.spaces()]]


def metrics(parts: Sequence[AtomModality]) -> list[Metric]:
    """Return every metric of every part."""
    part_metrics = [(part, metric) for part in parts for metric in part.metrics()]
    counts = Counter(key for _, metric in part_metrics for key in metric.gives)
    return [
        PartMetric(part, metric, {key: f"{name_of(part)}_{key}" for key in metric.gives if counts[key] > 1})
        for part, metric in part_metrics
    ]


def name_of(part: AtomModality) -> str:
    """Return the name of a part, which is also the class name of its kind."""
    return part.config.name


def narrowed(data: dict[str, Tensor], part: AtomModality) -> dict[str, Tensor]:
    """Convert samples that are all of one kind to the data of that part."""
    return {key: data[key] for key in part.keys}


def _select(data: dict[str, Tensor], part: AtomModality) -> tuple[Tensor, dict[str, Tensor]]:
    """Return which samples (B,) bool are of the part's kind, and their data."""
    selected = data[PERIODIC] == part.has_periodic
    return selected, narrowed(take(data, selected), part)


def _scatter(tensors: dict[str, Tensor], selected: Tensor, part: AtomModality) -> dict[str, Tensor]:
    """Return tensors of the selected samples as tensors of all samples, with 0 elsewhere, under the part's names."""
    selected = selected.cpu()
    scattered = {}
    for key, values in tensors.items():
        scattered[_prefixed(part, key)] = wide = values.new_zeros(len(selected), *values.shape[1:])
        wide[selected] = values
    return scattered


def _prefixed(part: AtomModality, key: str) -> str:
    return f"{name_of(part)}.{key}"


class KindSpace(Space):
    """`periodic` (B,) uint8, and for reconstructions the errors by each part."""

    name = "kinds"

    def __init__(self, parts: Sequence[AtomModality]):
        self.parts = parts

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {PERIODIC: data[PERIODIC].cpu().to(torch.uint8)}

    def against(self, made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            selected, originals = _select(data, part)
            errors = part.errors(_same_samples(made, selected, part), originals)
            tensors |= _scatter({key: torch.tensor(values) for key, values in errors.items()}, selected, part)
        return tensors


def _same_samples(made: dict[str, Tensor], selected: Tensor, part: AtomModality) -> dict[str, Tensor]:
    """Return the reconstructions of the selected originals."""
    return narrowed(take(made, selected.to(made["types"].device)), part)


class PartSpace(Space):
    """A space of a part, applied to the samples of its kind."""

    def __init__(self, part: AtomModality, space: Space):
        self.part, self.space = part, space
        self.name = _prefixed(part, space.name)  # type: ignore[misc]
        self.needs = (KindSpace.name, *(_prefixed(part, need) for need in space.needs))  # type: ignore[misc]
        self.needs_download, self.compares = space.needs_download, space.compares  # type: ignore[misc]
        self.on_request = space.on_request  # type: ignore[misc]
        self.loaded, self.fitted = space.loaded, space.fitted  # type: ignore[misc]

    @property
    def is_fitted(self) -> bool:
        return self.space.is_fitted

    def prepare(self, device: torch.device) -> None:
        self.space.prepare(device)
        self.weights, self.silent = self.space.weights, self.space.silent

    def fit(self, train: Rows) -> None:
        self.space.fit(PartRows(train, self.part))
        self.weights, self.silent = self.space.weights, self.space.silent

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        return self.space.state(names)

    def adopt(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.space.adopt(state, device)
        self.weights, self.silent = self.space.weights, self.space.silent

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        selected, part_data = _select(data, self.part)
        self.space.progress = self.progress
        return _scatter(self.space(part_data), selected, self.part)

    def against(self, made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        selected, originals = _select(data, self.part)
        return _scatter(
            self.space.against(_same_samples(made, selected, self.part), originals), selected, self.part
        )  # fmt: skip


class PartRows(Rows):
    """The rows of a mixed set that are samples of one part, with the part's tensors under their names in the part."""

    def __init__(self, rows: Rows, part: AtomModality):
        self.selected = rows[PERIODIC].bool() == part.has_periodic  # (len(rows),)
        super().__init__(int(self.selected.sum()))
        self.rows, self.prefix = rows, _prefixed(part, "")

    @property
    def names(self) -> list[str]:
        return sorted({name.removeprefix(self.prefix) for name in self.rows.names})

    def chunks(self, name: str) -> Iterator[Tensor]:
        start, prefixed = 0, self.prefix + name
        for piece in self.rows.chunks(prefixed if prefixed in self.rows else name):
            yield piece[self.selected[start : start + len(piece)]]
            start += len(piece)


class PartMetric(Metric):
    """A metric of a part, applied to the samples of its kind. renamed: new names of keys that both parts have."""

    def __init__(self, part: AtomModality, metric: Metric, renamed: dict[str, str]):
        self.part, self.metric, self.renamed = part, metric, renamed
        self.gives = tuple(renamed.get(key, key) for key in metric.gives)
        self.track, self.most_samples, self.most_reference = metric.track, metric.most_samples, metric.most_reference
        self.needs_held_out, self.relative = metric.needs_held_out, metric.relative

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(_prefixed(self.part, name) for name in self.metric.spaces) or (KindSpace.name,)

    def needs_unconditional(self, columns: Mapping[str, str]) -> bool:
        return self.metric.needs_unconditional(columns)

    def __call__(self, evidence: Evidence) -> list[Row]:
        rows_of: Callable[[Rows | None], Rows | None] = self._part_rows
        train, mixed = rows_of(evidence.train), evidence.train
        # The number of training samples per kind is known only if all training samples are stored.
        total = len(train) if train is not None and mixed is not None and len(mixed) == evidence.train_total else None
        part_evidence = replace(
            evidence, train=train, held_out=rows_of(evidence.held_out), samples=rows_of(evidence.samples),
            reconstructions=rows_of(evidence.reconstructions), train_total=total,
            unconditional=rows_of(evidence.unconditional),
        )  # fmt: skip
        kind = name_of(self.part)
        rows = self.metric(part_evidence)
        return [replace(row, key=self.renamed.get(row.key, row.key), name=f"{kind}: {row.name}") for row in rows]

    def _part_rows(self, rows: Rows | None) -> Rows | None:
        """Return the rows of the part's kind; None if there are none."""
        if rows is None or PERIODIC not in rows:
            return None
        part_rows = PartRows(rows, self.part)
        return part_rows if len(part_rows) else None
