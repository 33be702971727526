"""An evaluation's numbers for the terminal, for files and for a model card."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.table import Table

from .. import __version__
from ..files import write_json
from ..modalities.base import Row
from .evaluate import Evaluation, Measured
from .protocol import Protocol

FORMAT = 1


def table(numbers: list[Measured], title: str) -> Table:
    """For the terminal."""
    out = Table(title=title, title_justify="left")
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("beside it")
    out.add_column("protocol", overflow="fold")
    for measured in numbers:
        out.add_row(*cells(measured))
    return out


def cells(measured: Measured) -> tuple[str, str, str, str]:
    """Measure, value, what stands beside it, protocol with its cautions."""
    row = measured.row
    spread = "" if row.spread is None else f" ± {number(row.spread)}"
    beside = ", ".join(f"{name} {number(value)}" for name, value in row.beside.items())
    protocol = "; ".join([measured.key, *measured.protocol.cautions()])
    arrow = {"higher": " (higher is better)", "lower": " (lower is better)", "same": " (same is better)"}[row.better]
    return row.name + arrow, f"{number(row.value)}{spread} {row.unit}".rstrip(), beside, protocol


def markdown(numbers: list[Measured]) -> str:
    """For a model card."""
    lines = ["| measure | value | beside it | protocol |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(cells(measured)) + " |" for measured in numbers)]) + "\n"


def is_better(row: Row, other: float) -> bool:
    """Whether a number is better than another of its kind; ValueError where neither direction is."""
    if row.better == "same":
        raise ValueError(f"training.best: {row.key!r} is neither better high nor low; choose another metric")
    return row.value > other if row.better == "higher" else row.value < other


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def write(evaluation: Evaluation, path: Path, about: dict[str, Any], seconds: float) -> None:
    """One JSON file: every number with its protocol, what the model was, versions; `seconds` is its only field that
    a second evaluation would change."""
    content = {
        "format_version": FORMAT,
        **about,
        "versions": {"unilatent": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
                     "python": platform.python_version()},
        "numbers": [as_json(measured) for measured in evaluation.numbers],
        "seconds": round(seconds, 2),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def as_json(measured: Measured) -> dict[str, Any]:
    """A number with its protocol, as plain data."""
    row = measured.row
    return {
        "key": measured.key, "metric": row.key, "name": row.name, "value": row.value, "spread": row.spread,
        "unit": row.unit, "better": row.better, "beside": row.beside, "cautions": measured.protocol.cautions(),
        "protocol": measured.protocol.plain(),
    }  # fmt: skip


def from_json(content: dict[str, Any]) -> Measured:
    """The inverse of `as_json`."""
    fields = {key: content[key] for key in ("name", "value", "unit", "better", "beside", "spread")}
    return Measured(Row(key=content["metric"], **fields), Protocol.parse(content["protocol"]))
