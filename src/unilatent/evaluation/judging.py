"""A model's reconstructions and samples before the judges of its modality, and the table they fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from ..methods.base import LatentModel
from ..modalities.base import Evidence, Row, Splits
from ..sampling import Progress, reconstruct, sample_batches
from ..training.batches import whole
from ..types import join


def judge(
    model: LatentModel,
    splits: Splits,
    num_samples: int,
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
    **settings: Any,
) -> list[Row]:
    """Every row of every metric of the modality; needs held-out data.

    num_samples: how many are drawn, conditions spread evenly; settings: as for `sample`. Samples of the data that
    cannot be used are left out, and named to `say`.
    """
    if not len(splits.held_out):
        raise ValueError("data.held_out: 0, so nothing is left to judge on; set it to a few hundred samples")
    modality = model.modality
    held_out = whole(splits.held_out, modality, say=say)
    train = whole(splits.train, modality, limit=20_000, say=say)
    parts = list(sample_batches(model, num_samples, seed=seed, batch_size=250, progress=progress, **settings))
    values = join([part.values for part in parts]) if parts[0].values else {}
    evidence = Evidence(
        train=(train.data, train.values),
        held_out=(held_out.data, held_out.values),
        reconstructions=reconstruct(model, held_out.data, seed=seed, batch_size=250),
        samples=(
            modality.join([part.data for part in parts]),
            values,
        ),
    )
    return [row for metric in modality.metrics() for row in metric(evidence)]


def table(rows: list[Row], title: str) -> Table:
    """For the terminal."""
    out = Table(title=title, title_justify="left")
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("beside it")
    for row in rows:
        beside = ", ".join(f"{name} {_number(value)}" for name, value in row.beside.items())
        out.add_row(f"{row.name} ({row.better} is better)", f"{_number(row.value)} {row.unit}".rstrip(), beside)
    return out


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """For files."""
    return [{"name": r.name, "value": r.value, "unit": r.unit, "better": r.better, "beside": r.beside} for r in rows]
