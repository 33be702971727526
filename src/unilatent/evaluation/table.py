"""The results of an evaluation as a table for the terminal and as a JSON file."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..files import write_json
from ..modalities.base import Row
from ..version import __version__
from .evaluate import EvaluatedMetric, Evaluation
from .protocol import Protocol

FORMAT = 1
ARROWS = {"higher": "↑", "lower": "↓", "same": "="}
LEGEND = "↑ higher is better, ↓ lower is better, = closer to the baselines is better"


def table(numbers: list[EvaluatedMetric], title: str) -> Group:
    """Return a table for the terminal: each number with its cautions, and below it each protocol once."""
    rows = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rows.add_column("metric")
    rows.add_column("value", justify="right", no_wrap=True)
    rows.add_column("baselines")
    rows.add_column("protocol", no_wrap=True)
    protocols = distinct_protocols(numbers)
    for result in numbers:
        name = Text(f"{ARROWS[result.row.better]} {result.row.name}")
        if cautions := result.protocol.cautions():
            name.append("\n" + ", ".join(cautions), style="yellow")
        place = Text(f"[{protocols.index(result.protocol) + 1}]")
        rows.add_row(name, Text(format_value(result.row)), Text(format_baselines(result.row)), place)
    below = [Text(f"[{i}] {outline(protocol)}") for i, protocol in enumerate(protocols, 1)]
    return Group(rows, *below, Text(LEGEND, style="dim"))


def format_value(row: Row) -> str:
    """Return the number with its spread and unit."""
    spread = "" if row.spread is None else f" ± {format_number(row.spread)}"
    return f"{format_number(row.value)}{spread} {row.unit}".rstrip()


def format_baselines(row: Row) -> str:
    """Return the baselines to compare a number with."""
    return ", ".join(f"{name} {format_number(value)}" for name, value in row.beside.items())


def distinct_protocols(numbers: list[EvaluatedMetric]) -> list[Protocol]:
    """Return each protocol once, in order."""
    distinct: list[Protocol] = []
    for result in numbers:
        if result.protocol not in distinct:
            distinct.append(result.protocol)
    return distinct


def format_counts(protocol: Protocol) -> str:
    """Return how many samples a number was computed from, and with what they were compared."""
    return f"n = {protocol.num_samples:,} against {protocol.num_reference:,} of {protocol.reference}"


def outline(protocol: Protocol) -> str:
    """Return a summary of a protocol in one line; the JSON file has all of it."""
    parts = [f"{protocol.track}: {format_counts(protocol)}", protocol.preprocessing.split(",")[0]]
    if protocol.sampling is not None or protocol.decoding is not None:
        parts.append("/".join(protocol.key("").split("/")[2:]))
    if protocol.nfe is not None:
        parts.append(f"{protocol.nfe:g} evaluations of {_networks(protocol)} per sample")
    if protocol.space is not None:
        parts.append(f"features: {protocol.space}")
    return "; ".join([*parts, f"seed {protocol.seed}", protocol.precision])


def _networks(protocol: Protocol) -> str:
    """Return the networks whose evaluations are counted."""
    networks = [] if protocol.sampling is None else ["the denoiser"]
    return " and ".join(networks if protocol.decoding is None else [*networks, "the decoder"])


def is_better(row: Row, other: float) -> bool:
    """Whether a result beats another value of its metric; ValueError if the metric has no better direction."""
    if row.better == "same":
        raise ValueError(
            f"training.best: {row.key!r} has no better direction (neither higher nor lower); choose another metric"
        )
    return row.value > other if row.better == "higher" else row.value < other


def format_number(value: float) -> str:
    """Format with four significant digits."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def write_evaluation(evaluation: Evaluation, path: Path, about: dict[str, Any], seconds: float) -> None:
    """Write a JSON file: every number with its protocol, the model (`about`) and versions.

    Only `seconds` differs between two evaluations of the same model.
    """
    content = {
        "format_version": FORMAT,
        **about,
        "versions": {"unilatent": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
                     "python": platform.python_version()},
        "numbers": [as_json(result) for result in evaluation.numbers],
        "seconds": round(seconds, 2),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def as_json(result: EvaluatedMetric) -> dict[str, Any]:
    """Return a result with its protocol as plain data."""
    row = result.row
    return {
        "key": result.key, "metric": row.key, "name": row.name, "value": row.value, "spread": row.spread,
        "unit": row.unit, "better": row.better, "beside": row.beside, "cautions": result.protocol.cautions(),
        "protocol": result.protocol.plain(),
    }  # fmt: skip


def from_json(content: dict[str, Any]) -> EvaluatedMetric:
    """Invert `as_json`."""
    fields = {key: content[key] for key in ("name", "value", "unit", "better", "beside", "spread")}
    return EvaluatedMetric(Row(key=content["metric"], **fields), Protocol.parse(content["protocol"]))
