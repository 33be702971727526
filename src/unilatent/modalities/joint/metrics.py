"""Each kind judged by its own modality: its spaces see the samples of that kind alone, its metrics the rows they gave.

A row of tensors is still one sample of either kind, zeros where a sample is of the other; what belongs to a part has
the part's name before it. Numbers keep the parts' keys, with the name of the kind before those that both have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...atoms.modality import AtomModality
from ...records import Rows
from ...types import take
from ..base import Evidence, Metric, Row, Space

PERIODIC = "periodic"
"""Which kind a sample is of, kept by `Kinds`."""


def spaces(parts: Sequence[AtomModality]) -> list[Space]:
    """Which kind each sample is of, and every space of every part."""
    return [Kinds(parts), *[OfPart(part, space) for part in parts for space in part.spaces()]]


def metrics(parts: Sequence[AtomModality]) -> list[Metric]:
    """Every metric of every part."""
    own = [(part, metric) for part in parts for metric in part.metrics()]
    counts = Counter(key for _, metric in own for key in metric.gives)
    return [
        OfKind(part, metric, {key: f"{name_of(part)}_{key}" for key in metric.gives if counts[key] > 1})
        for part, metric in own
    ]


def name_of(part: AtomModality) -> str:
    """Of its kind, as labels have it."""
    return part.config.name


def narrowed(data: dict[str, Tensor], part: AtomModality) -> dict[str, Tensor]:
    """Samples that are all of its kind, as the part holds them."""
    return {key: data[key] for key in part.keys}


def _own(data: dict[str, Tensor], part: AtomModality) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) which samples are of the part's kind, and those."""
    here = data[PERIODIC] == part.crystals
    return here, narrowed(take(data, here), part)


def _spread(found: dict[str, Tensor], here: Tensor, part: AtomModality) -> dict[str, Tensor]:
    """Tensors of a part's samples as those of all samples, zeros elsewhere."""
    here = here.cpu()
    spread = {}
    for key, own in found.items():
        spread[_within(part, key)] = wide = own.new_zeros(len(here), *own.shape[1:])
        wide[here] = own
    return spread


def _within(part: AtomModality, key: str) -> str:
    return f"{name_of(part)}.{key}"


class Kinds(Space):
    """`periodic` (B,) uint8, and of reconstructions each kind's own errors."""

    name = "kinds"

    def __init__(self, parts: Sequence[AtomModality]):
        self.parts = parts

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {PERIODIC: data[PERIODIC].cpu().to(torch.uint8)}

    def against(self, made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            here, own = _own(data, part)
            errors = part.errors(narrowed(take(made, here.to(made["types"].device)), part), own)
            found |= _spread({key: torch.tensor(row) for key, row in errors.items()}, here, part)
        return found


class OfPart(Space):
    """A part's space, which sees samples of its own kind alone."""

    def __init__(self, part: AtomModality, space: Space):
        self.part, self.space = part, space
        self.name = f"{name_of(part)}.{space.name}"  # type: ignore[misc]
        self.needs = (Kinds.name, *(f"{name_of(part)}.{need}" for need in space.needs))  # type: ignore[misc]
        self.needs_download, self.compares = space.needs_download, space.compares  # type: ignore[misc]
        self.on_request = space.on_request  # type: ignore[misc]

    def prepare(self, device: torch.device) -> None:
        self.space.prepare(device)
        self.weights, self.silent = self.space.weights, self.space.silent

    def fit(self, train: Rows) -> None:
        self.space.fit(Chosen(train, self.part))
        self.weights, self.silent = self.space.weights, self.space.silent

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        here, own = _own(data, self.part)
        return _spread(self.space(own), here, self.part)

    def against(self, made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        here, own = _own(data, self.part)
        return _spread(self.space.against(narrowed(take(made, here.to(made["types"].device)), self.part), own), here,
                       self.part)  # fmt: skip


class Chosen(Rows):
    """Of a set of both kinds, the samples of one, with what was kept of them under its own names."""

    def __init__(self, rows: Rows, part: AtomModality):
        self.here = rows[PERIODIC].bool() == part.crystals  # (number of all,)
        super().__init__(int(self.here.sum()))
        self.rows, self.prefix = rows, _within(part, "")

    @property
    def names(self) -> list[str]:
        return sorted({name.removeprefix(self.prefix) for name in self.rows.names})

    def pieces(self, name: str) -> Iterator[Tensor]:
        start, own = 0, self.prefix + name
        for piece in self.rows.pieces(own if own in self.rows else name):
            yield piece[self.here[start : start + len(piece)]]
            start += len(piece)


class OfKind(Metric):
    """A part's metric, before the samples of its own kind. renamed: keys that another part has too."""

    def __init__(self, part: AtomModality, metric: Metric, renamed: dict[str, str]):
        self.part, self.metric, self.renamed = part, metric, renamed
        self.space = Kinds.name if metric.space is None else f"{name_of(part)}.{metric.space}"
        self.gives = tuple(renamed.get(key, key) for key in metric.gives)
        self.track, self.most_samples, self.most_reference = metric.track, metric.most_samples, metric.most_reference

    def __call__(self, evidence: Evidence) -> list[Row]:
        chosen: Callable[[Rows | None], Rows | None] = self._chosen
        train, whole = chosen(evidence.train), evidence.train
        # of some of the training data, nobody has counted how many of each kind there are
        total = len(train) if train is not None and whole is not None and len(whole) == evidence.train_total else None
        own = Evidence(
            train, chosen(evidence.held_out), chosen(evidence.samples), chosen(evidence.reconstructions), total
        )
        kind = name_of(self.part)
        rows = self.metric(own)
        return [replace(row, key=self.renamed.get(row.key, row.key), name=f"{kind}: {row.name}") for row in rows]

    def _chosen(self, rows: Rows | None) -> Rows | None:
        """None where there are none of its kind, which is as if nobody had made any."""
        if rows is None or PERIODIC not in rows:
            return None
        chosen = Chosen(rows, self.part)
        return chosen if len(chosen) else None
