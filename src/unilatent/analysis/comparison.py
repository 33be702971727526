"""Several runs at once: what a bit buys. Rate against distortion, and against how far samples are from the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.comparison import read_evaluation
from ..evaluation.evaluate import Measured
from ..methods.base import LatentModel
from .analyze import Analysis
from .plots import draw_scatter


@dataclass(frozen=True)
class Compared:
    """A run: its analysis, its last evaluation's numbers, and the settings of its tokenizer, dotted."""

    name: str
    analysis: Analysis
    numbers: list[Measured]
    settings: dict[str, Any]


def last_evaluation(run: Path) -> list[Measured]:
    """The numbers of a run's newest evaluation, of new samples if there is such a one; none if there is none at all."""
    files = [path for kind in ("evaluation-*.json", "step_*.json") for path in (run / "eval").glob(kind)]
    newest = [read_evaluation(path) for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)]
    return next((own for own in newest if any(m.protocol.track == "generation" for m in own)), [*newest, []][0])


def settings_of(model: LatentModel) -> dict[str, Any]:
    """Dotted settings of the method that made the latents."""
    own = getattr(model, "tokenizer", None) or model
    return _flat(own.config.plain()["method"], "method.")


def sample_distance(runs: list[Compared], key: str | None) -> str | None:
    """The metric that says how far samples are from data in every run: the one asked for, or the first distance.

    ValueError if that is missing in some run, or was measured in different ways, which forbids a curve.
    """
    found = [[m for m in run.numbers if m.protocol.track == "generation" and m.row.better == "lower"] for run in runs]
    if key is None:
        shared = [m.row.key for m in found[0] if "distance" in m.row.name.lower() or "fid" in m.row.key.lower()]
        key = next((k for k in shared if all(k in [m.row.key for m in own] for own in found)), None)
        if key is None:
            return None
    for run, own in zip(runs, found, strict=True):
        if key not in [m.row.key for m in own]:
            raise ValueError(f"--distance {key}: {run.name} has no such number in its eval folder; evaluate it first")
    first = next(m for m in found[0] if m.row.key == key)
    for run, own in zip(runs[1:], found[1:], strict=True):
        differing = first.protocol.differences(next(m for m in own if m.row.key == key).protocol)
        if differing:
            field, a, b = differing[0]
            raise ValueError(
                f"--distance {key}: {field} is {a!r} in {runs[0].name} and {b!r} in {run.name}; evaluate all the same "
                "way, or name another number"
            )
    return key


def compare_runs(runs: list[Compared], distance: str | None, path: Path) -> tuple[Table, list[dict[str, Any]]]:
    """The table and its rows by increasing rate, and the curve drawn; ValueError if a run has no rate."""
    for run in runs:
        if run.analysis.rate is None:
            raise ValueError(f"--compare {run.name}: its latents have no rate to draw a curve over")
    key = sample_distance(runs, distance)
    differing = _differing(runs)
    error = next(iter(runs[0].analysis.errors))
    rows: list[dict[str, Any]] = []
    for run in runs:
        rate = run.analysis.rate
        assert rate is not None
        row = {"run": run.name, **{name: run.settings.get(name) for name in differing}}
        row |= {name: bits.mean for name, bits in rate.bits.items()}
        row |= {error: run.analysis.errors[error], "use": rate.use}
        if key is not None:
            row[key] = next(m.row.value for m in run.numbers if m.row.key == key)
        rows.append(row)
    unit = next(iter(runs[0].analysis.rate.bits))  # type: ignore[union-attr]
    rows.sort(key=lambda row: row[unit])
    curves = [error, *([key] if key else [])]
    draw_scatter([(row["run"], row[unit], {k: row[k] for k in curves}) for row in rows], unit.replace("_", " "), path)
    table = Table(*[name.replace("_", " ").removeprefix("method.") for name in rows[0]], title="rate and distortion")
    for row in rows:
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    return table, rows


def _differing(runs: list[Compared]) -> list[str]:
    """Settings that are not the same in all runs, where they are single values."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
