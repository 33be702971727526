"""Comparison of runs: rate against distortion, and rate against a distance of samples from the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.comparison import evaluations_of, read_evaluation
from ..evaluation.evaluate import EvaluatedMetric
from ..methods.base import LatentModel
from .analyze import Analysis
from .plots import draw_scatter

NO_RATE = (
    "its latents have no rate, which the curve is drawn over; analyse it without --compare, and compare with "
    "`unilatent evaluate --compare A.json B.json`"
)


@dataclass(frozen=True)
class ComparedRun:
    """A run: its analysis, the results of its last evaluation, and its tokenizer's settings by dotted key."""

    name: str
    analysis: Analysis
    numbers: list[EvaluatedMetric]
    settings: dict[str, Any]


def last_evaluation(run: Path) -> list[EvaluatedMetric]:
    """Return the results of a run's newest evaluation, preferably of generated samples; [] if there is none."""
    newest = [read_evaluation(path) for path in evaluations_of(run)]
    with_samples = (results for results in newest if any(m.protocol.track == "generation" for m in results))
    return next(with_samples, [*newest, []][0])


def settings_of(model: LatentModel) -> dict[str, Any]:
    """Return the settings, by dotted key, of the method that trained the tokenizer."""
    tokenizer = getattr(model, "tokenizer", None) or model
    return _flat(tokenizer.config.plain()["method"], "method.")


def refuse_no_rate(model: LatentModel, name: str) -> None:
    """ValueError if the latents of a model have no rate."""
    if type(model).costs is LatentModel.costs:
        raise ValueError(f"--compare: {name}: {NO_RATE}")


def sample_distance(runs: dict[str, list[EvaluatedMetric]], key: str | None) -> str | None:
    """Return the metric that all runs use as distance of samples from the data: `key`, or the first they all have.

    runs: name -> results of the last evaluation. None if no key is given and they have none in common. ValueError if a
    run lacks the metric, or the protocols differ.
    """
    names = list(runs)
    distances = [
        [m for m in numbers if m.protocol.track == "generation" and m.row.better == "lower"]
        for numbers in runs.values()
    ]
    if key is None:
        first_keys = [m.row.key for m in distances[0] if "distance" in m.row.name.lower() or "fid" in m.row.key.lower()]
        key = next((k for k in first_keys if all(k in [m.row.key for m in results] for results in distances)), None)
        if key is None:
            return None
    for name, results in zip(names, distances, strict=True):
        if key not in [m.row.key for m in results]:
            raise ValueError(f"--distance {key}: {name} has no such number in its eval folder; evaluate it first")
    first = next(m for m in distances[0] if m.row.key == key)
    for name, results in zip(names[1:], distances[1:], strict=True):
        differing = first.protocol.differences(next(m for m in results if m.row.key == key).protocol)
        if differing:
            field, a, b = differing[0]
            raise ValueError(
                f"--distance {key}: {field} is {a!r} in {names[0]} and {b!r} in {name}; evaluate all the same "
                "way, or choose another metric"
            )
    return key


def compare_runs(runs: list[ComparedRun], distance: str | None, path: Path) -> tuple[Table, list[dict[str, Any]]]:
    """Draw the curve, and return the table and its rows by increasing rate; ValueError if a run has no rate."""
    for run in runs:
        if run.analysis.rate is None:
            raise ValueError(f"--compare: {run.name}: {NO_RATE}")
    key = sample_distance({run.name: run.numbers for run in runs}, distance)
    differing = _differing(runs)
    error = next(iter(runs[0].analysis.errors or ()))
    rows: list[dict[str, Any]] = []
    for run in runs:
        rate, errors = run.analysis.rate, run.analysis.errors
        assert rate is not None and errors is not None
        row = {"run": run.name, **{name: run.settings.get(name) for name in differing}}
        row |= {name: bits.mean for name, bits in rate.bits.items()}
        row |= {error: errors[error], "use": rate.use}
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


def _differing(runs: list[ComparedRun]) -> list[str]:
    """Return the keys of settings that differ between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
