"""What a report shows beside the numbers: samples nobody chose, reconstructions, the run's curves, searches."""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..files import read_json
from ..methods.base import LatentModel
from ..sampling import reconstruct, sample_batches
from ..training.batches import collate
from ..training.curves import Panel, Points, draw_curves, panels, read_points
from ..types import count, join_values, take
from .evaluate import Evaluation, Evaluator
from .search import At

SAMPLES = 64
PAIRS = 16
WIDE = 10
"""Columns of a grid, or a few less: a multiple of the number of classes, where that is small."""
MOST_POINTS = 1000


@dataclass(frozen=True)
class Picture:
    """A sample as the modality draws it (PNG), what it was asked to be, and its place in the judged set."""

    png: bytes
    caption: str
    place: int


@dataclass(frozen=True)
class Grid:
    """Pictures of single samples, and the same as one (PNG)."""

    pictures: list[Picture]
    png: bytes
    columns: int


@dataclass(frozen=True)
class Point:
    """A number of a search: the setting searched over, the value and the metric's full name."""

    at: At
    value: float
    key: str


@dataclass(frozen=True)
class Search:
    """Evaluations of one model that differ in one setting, `over`, in its order; cautions: what must be said of all."""

    metric: str
    over: str
    points: list[Point]
    cautions: tuple[str, ...]

    @property
    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """(x, value) of each curve by its name: a single one, or of intervals one for each low end over the high."""
        found: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            name, x = (f"from {point.at[0]:g}", point.at[1]) if isinstance(point.at, tuple) else ("", point.at)
            found.setdefault(name, []).append((x, point.value))
        return found


@dataclass(frozen=True)
class Contents:
    """All of a report. facts: (name, value) about the model and how this was made. notes: what is missing, and why."""

    title: str
    facts: list[tuple[str, str]]
    evaluation: Evaluation
    seed: int
    command: str
    samples: Grid | None
    reconstructions: Grid | None
    curves: list[Panel]
    curves_png: bytes | None
    searches: list[Search]
    notes: list[str]


def gather(evaluator: Evaluator, evaluation: Evaluation, title: str, source: str | None) -> Contents:
    """Draws the first samples and reconstructions of an evaluation again, and reads what lies beside it."""
    notes: list[str] = []
    metrics = Path(source or "") / "metrics.jsonl"
    curves = [_thinned(panel) for panel in panels(read_points(metrics)) if _has_line(panel)] if source else []
    searches = find_searches(evaluator.folder.parent, evaluator.fingerprint, notes)
    return Contents(
        title=title,
        facts=_facts(evaluator, source),
        evaluation=evaluation,
        seed=evaluator.request.seed,
        command=command(evaluator, source),
        samples=draw_samples(evaluator) if evaluator.request.num_samples and evaluator.made is None else None,
        reconstructions=draw_reconstructions(evaluator, evaluation),
        curves=curves,
        curves_png=_drawn(lambda path: draw_curves(metrics, path)) if curves else None,
        searches=searches,
        notes=notes,
    )


def command(evaluator: Evaluator, source: str | None) -> str:
    """The line that makes these numbers again."""
    request, s = evaluator.request, evaluator.sampling
    words = ["unilatent", "evaluate", source or "MODEL", "--num", str(request.num_samples)]
    words += ["--num-reference", str(request.num_reference)]
    if request.num_held_out is not None:
        words += ["--num-held-out", str(request.num_held_out)]
    if request.metrics:
        words += ["--metrics", ",".join(request.metrics)]
    for option, text in evaluator.sources.items():
        if text is not None:
            words += [option, text]
    if request.num_samples and evaluator.made is None:
        conditions = {condition.argument: condition for condition in evaluator.model.conditions.all}
        for key, value in evaluator.given.items():
            if value is not None:
                own = conditions.get(key)
                words += own.options(value) if own else [f"--{key.replace('_', '-')}", str(value)]
        words += ["--solver", s.solver, "--steps", str(s.num_inference_steps)]
        words += ["--guidance-scale", str(s.guidance_scale)]
        words += ["--guidance-interval", *map(str, s.guidance_interval), "--guidance-norm", s.guidance_norm]
    for key, value in (evaluator.decoding or {}).items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--seed", str(request.seed), "--precision", request.precision])


@torch.no_grad()
def draw_samples(evaluator: Evaluator) -> Grid:
    """The first of the judged samples: whole batches of the same size are made, as some solvers look at all of one."""
    model, request = evaluator.model, evaluator.request
    data: list[Any] = []
    values: list[dict[str, Tensor]] = []
    made = 0
    with evaluator.autocast():
        for part in sample_batches(
            model, request.num_samples, seed=request.seed, batch_size=request.batch_size, **evaluator.settings
        ):
            data.append(part.data)
            values.append(part.values)
            made += part.count
            if made >= SAMPLES:
                break
    shown = take(model.modality.join(data), slice(SAMPLES))
    asked = {key: join_values([part[key] for part in values]) for key in (values[0] if values else {})}
    columns = model.conditions.columns
    columns *= max(1, WIDE // columns)
    return _grid(model, [shown], captions(model, asked, count(shown)), range(SAMPLES), columns)


@torch.no_grad()
def draw_reconstructions(evaluator: Evaluator, evaluation: Evaluation) -> Grid | None:
    """The first of the judged held-out samples, each above its reconstruction; None if none were."""
    held_out, model, request = evaluation.evidence.held_out, evaluator.model, evaluator.request
    if held_out is None or not len(held_out) or evaluator.splits is None:
        return None
    dataset = evaluator.splits.held_out
    places = [i * len(dataset) // len(held_out) for i in range(min(PAIRS, len(held_out)))]
    batch = collate([dataset[place] for place in places], model.modality)
    with evaluator.autocast():
        made = reconstruct(
            model, batch.data, seed=request.seed, batch_size=request.batch_size, **(evaluator.decoding or {})
        )
    return _grid(model, [batch.data, made], captions(model, batch.values, len(places)), places, PAIRS // 2)


def captions(model: LatentModel, values: dict[str, Tensor], rows: int) -> list[str]:
    """What each sample was asked to be, by every condition; empty where a model has none."""
    return model.conditions.captions({key: value[:rows] for key, value in values.items()}) or [""] * rows


def find_searches(folder: Path, fingerprint: str, notes: list[str]) -> list[Search]:
    """Every search.json in a folder or a level below that can be drawn; `notes` is told of the others."""
    found = []
    for path in sorted([*folder.glob("search*.json"), *folder.glob("*/search*.json")]):
        name = path.relative_to(folder).as_posix()
        try:
            content = read_json(path, "search again")
            if content.get("fingerprint", fingerprint) != fingerprint:
                notes.append(f"{name} is left out: it searched another model")
                continue
            over = str(content["over"])
            points = [Point(_place(p[over]), float(p["value"]), str(p["key"])) for p in content["points"]]
            finite = [point for point in points if all(map(math.isfinite, (*_ends(point.at), point.value)))]
            cautions = tuple(map(str, content["cautions"]))
            search = Search(str(content["metric"]), over, sorted(finite, key=lambda p: _ends(p.at)), cautions)
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{name} is left out: it is no search that can be drawn")
            continue
        if search.points:
            found.append(search)
    return found


def _place(at: Any) -> At:
    """A value of a setting as a search wrote it."""
    if not isinstance(at, list):
        return float(at)
    low, high = at
    return float(low), float(high)


def _ends(at: At) -> tuple[float, ...]:
    return at if isinstance(at, tuple) else (at,)


def _facts(evaluator: Evaluator, source: str | None) -> list[tuple[str, str]]:
    model = evaluator.model
    parameters = sum(p.numel() for p in model.parameters())
    facts = [("model", f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters")]
    if source is not None:
        facts.append(("from", source))
    return [
        *facts,
        ("fingerprint", evaluator.fingerprint),
        ("made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("with", f"unilatent {__version__}, torch {torch.__version__}, {model.device.type}"),
    ]


def _grid(model: LatentModel, rows: Sequence[Any], asked: list[str], places: Sequence[int], columns: int) -> Grid:
    modality = model.modality
    pictures = [
        Picture(_png(modality, [take(row, slice(i, i + 1)) for row in rows], None), text, place)
        for i, (text, place) in enumerate(zip(asked, places, strict=False))
    ]
    return Grid(pictures, _png(modality, rows, columns), columns)


def _png(modality: Any, rows: Sequence[Any], columns: int | None) -> bytes:
    return _drawn(lambda path: modality.draw_grid(rows, path, columns))


def _drawn(draw: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.png"
        draw(path)
        return path.read_bytes()


def _has_line(panel: Panel) -> bool:
    return any(len(steps) > 1 for steps, _ in panel.points.values())


def _thinned(panel: Panel) -> Panel:
    """With the least and the largest value of each stretch in place of more points than a screen can show."""
    points: Points = {}
    for key, (steps, values) in panel.points.items():
        kept: Sequence[int] = range(len(values))
        if len(values) > MOST_POINTS:
            width = 2 * len(values) / MOST_POINTS
            kept = []
            for k in range(MOST_POINTS // 2):
                stretch = range(int(k * width), int((k + 1) * width))
                ends = {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
                kept.extend(sorted(ends))
        points[key] = ([steps[i] for i in kept], [values[i] for i in kept])
    return Panel(panel.title, points, panel.log, panel.least)
