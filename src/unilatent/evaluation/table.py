"""An evaluation's numbers for the terminal and for files."""

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

from .. import __version__
from ..files import write_json
from ..modalities.base import Row
from .evaluate import Evaluation, Measured
from .protocol import Protocol

FORMAT = 1
ARROWS = {"higher": "↑", "lower": "↓", "same": "="}
LEGEND = "↑ higher is better, ↓ lower is better, = as what stands beside it"


def table(numbers: list[Measured], title: str) -> Group:
    """For the terminal: each number with what must be said of it, and below, each protocol once."""
    shown = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("measure")
    shown.add_column("value", justify="right", no_wrap=True)
    shown.add_column("beside it")
    shown.add_column("by", no_wrap=True)
    listed = protocols(numbers)
    for measured in numbers:
        name = Text(f"{ARROWS[measured.row.better]} {measured.row.name}")
        if cautions := measured.protocol.cautions():
            name.append("\n" + ", ".join(cautions), style="yellow")
        place = Text(f"[{listed.index(measured.protocol) + 1}]")
        shown.add_row(name, Text(value(measured.row)), Text(beside(measured.row)), place)
    below = [Text(f"[{i}] {outline(protocol)}") for i, protocol in enumerate(listed, 1)]
    return Group(shown, *below, Text(LEGEND, style="dim"))


def value(row: Row) -> str:
    """The number with its spread and unit."""
    spread = "" if row.spread is None else f" ± {number(row.spread)}"
    return f"{number(row.value)}{spread} {row.unit}".rstrip()


def beside(row: Row) -> str:
    """What a number is to be held against."""
    return ", ".join(f"{name} {number(value)}" for name, value in row.beside.items())


def protocols(numbers: list[Measured]) -> list[Protocol]:
    """Each once, in order."""
    found: list[Protocol] = []
    for measured in numbers:
        if measured.protocol not in found:
            found.append(measured.protocol)
    return found


def counts(protocol: Protocol) -> str:
    """How many samples a number is of."""
    return f"n = {protocol.num_samples:,} against {protocol.num_reference:,} of {protocol.reference}"


def outline(protocol: Protocol) -> str:
    """A protocol in a line; what it leaves out stands in the file of the evaluation."""
    parts = [f"{protocol.track}: {counts(protocol)}", protocol.preprocessing.split(",")[0]]
    if protocol.sampling is not None or protocol.decoding is not None:
        parts.append("/".join(protocol.key("").split("/")[2:]))
    if protocol.nfe is not None:
        parts.append(f"{protocol.nfe:g} evaluations of {_asked(protocol)} a sample")
    if protocol.space is not None:
        parts.append(f"seen by {protocol.space}")
    return "; ".join([*parts, f"seed {protocol.seed}", protocol.precision])


def _asked(protocol: Protocol) -> str:
    """The networks whose evaluations are counted."""
    own = [] if protocol.sampling is None else ["the denoiser"]
    return " and ".join(own if protocol.decoding is None else [*own, "the decoder"])


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
