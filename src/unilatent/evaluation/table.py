"""The results of an evaluation as a table for the terminal and as a JSON file."""

from __future__ import annotations

import platform
from collections.abc import Mapping
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
from ..tables import ARROWS, CAUTION, marked
from ..version import __version__
from .evaluate import EvaluatedMetric, Evaluation
from .protocol import Protocol

FORMAT = 1
HEADLINES, BASELINES = 12, 3
"""Rows of the table in the terminal, and baselines of a row."""
LEGEND = (
    f"↑ higher is better, ↓ lower is better, = closer to the baselines is better, {CAUTION} limits what a number says"
)


def table(numbers: list[EvaluatedMetric], title: str) -> Group:
    """Return a table for the terminal, readable at 80 columns: at most `HEADLINES` rows, each marked with its protocol.

    Below it: what all protocols share once, cautions first, then what is particular to each. The JSON file has the
    other rows.
    """
    protocols = distinct_protocols(numbers)
    shown = [result for result in numbers if result.row.headline][:HEADLINES]
    rows = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    rows.add_column("", no_wrap=True, min_width=3 if len(protocols) > 1 else 0)
    rows.add_column("metric", min_width=34)
    rows.add_column("value", justify="right", no_wrap=True)
    rows.add_column("baselines")
    for result in shown:
        place = f"[{protocols.index(result.protocol) + 1}]" if len(protocols) > 1 else ""
        name = Text(f"{ARROWS[result.row.better]} {result.row.name}")
        rows.add_row(Text(place), name, Text(format_value(result.row)), Text(format_baselines(result.row, BASELINES)))
    below = [Text(LEGEND, style="dim")]
    if rest := [result.row.key for result in numbers if not any(result is one for one in shown)]:
        below.append(Text(f"{len(rest)} more numbers are in the JSON file: {', '.join(rest)}", style="dim"))
    return Group(rows, *footnotes(protocols), *below)


def footnotes(protocols: list[Protocol]) -> list[Text]:
    """Return the line of what several protocols share, and a line of its own parts for each."""
    parts = [[*marked(protocol.cautions()), *outline(protocol).split("; ")] for protocol in protocols]
    shared = [part for part in parts[0] if all(part in others for others in parts)] if parts else []
    lines = [Text("; ".join(shared))] if shared else []
    if len(parts) > 1:
        own = ["; ".join(part for part in each if part not in shared) for each in parts]
        lines += [Text(f"[{i}] {line}") for i, line in enumerate(own, 1)]
    cautions = {caution for protocol in protocols for caution in marked(protocol.cautions())}
    for line in lines:
        line.highlight_words(sorted(cautions, key=len, reverse=True), style="yellow")
    return lines


def format_value(row: Row) -> str:
    """Return the number with its spread and unit."""
    spread = "" if row.spread is None else f" ± {format_number(row.spread)}"
    return f"{format_number(row.value)}{spread} {row.unit}".rstrip()


def format_baselines(row: Row, most: int | None = None) -> str:
    """Return the baselines to compare a number with, the first `most` or all, and what it is the mean of."""
    shown = [f"{name} {format_number(value)}" for name, value in list(row.beside.items())[:most]]
    baselines = ", ".join([*shown, "..."] if len(shown) < len(row.beside) else shown)
    return "; ".join(filter(None, (baselines, format_parts(row.parts))))


def format_parts(parts: Mapping[str, float]) -> str:
    """Return the numbers that one is the mean of; "" without any."""
    return "mean of " + ", ".join(f"{name} {format_number(value)}" for name, value in parts.items()) if parts else ""


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
    if protocol.sampling is not None or protocol.decoding is not None or protocol.details:
        parts.append("/".join(protocol.key("").split("/")[2:]))
    if protocol.nfe is not None:
        parts.append(f"{protocol.nfe:g} evaluations of {_networks(protocol)} per sample")
    if protocol.space is not None:
        parts.append(f"features: {protocol.space}")
    if protocol.relative_to is not None:
        parts.append(f"relative to as many samples of {protocol.relative_to}")
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
        "unit": row.unit, "better": row.better, "beside": row.beside, "parts": row.parts, "headline": row.headline,
        "cautions": result.protocol.cautions(), "outline": outline(result.protocol),
        "protocol": result.protocol.plain(),
    }  # fmt: skip


def from_json(content: dict[str, Any]) -> EvaluatedMetric:
    """Invert `as_json`."""
    fields = {key: content[key] for key in ("name", "value", "unit", "better", "beside", "spread")}
    row = Row(key=content["metric"], parts=content.get("parts", {}), **fields)
    return EvaluatedMetric(row, Protocol.parse(content["protocol"]))
