"""Contents of a report apart from the numbers: uncurated samples, reconstructions, training curves, searches."""

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

from ..batches import collate
from ..files import read_json
from ..methods.base import LatentModel
from ..runs.curves import Panel, Points, draw_curves, panels, read_points
from ..sampling import reconstruct, sample_batches
from ..types import count, join_values, take
from ..version import __version__
from .evaluate import Evaluation, Evaluator
from .search import SettingValue

SAMPLES = 64
PAIRS = 16
WIDE = 10
"""Columns of a grid; fewer if the number of columns has to be a multiple of the number of classes."""
MOST_POINTS = 1000


@dataclass(frozen=True)
class DrawnSample:
    """A sample drawn by the modality (PNG), the conditions it was generated for, and its index in the evaluated set."""

    png: bytes
    caption: str
    place: int


@dataclass(frozen=True)
class SampleGrid:
    """Images of single samples, and all of them as one grid (PNG). about: what they are. viewer: the page of
    `Modality.viewer`."""

    images: list[DrawnSample]
    png: bytes
    columns: int
    about: str
    viewer: str | None = None


@dataclass(frozen=True)
class CurvePoint:
    """A point of a search: the value of the setting, the number and the metric's full name."""

    at: SettingValue
    value: float
    key: str


@dataclass(frozen=True)
class SearchCurve:
    """Evaluations of one model that differ in one setting, `over`, sorted by it. cautions: those that hold for all."""

    metric: str
    over: str
    points: list[CurvePoint]
    cautions: tuple[str, ...]

    @property
    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """(x, value) of each curve by its name: one curve, or for intervals one per low end, over the high ends."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            name, x = (f"from {point.at[0]:g}", point.at[1]) if isinstance(point.at, tuple) else ("", point.at)
            curves.setdefault(name, []).append((x, point.value))
        return curves


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report.

    facts: (name, value) about the model and the evaluation. notes: what is missing, and why.
    """

    title: str
    facts: list[tuple[str, str]]
    evaluation: Evaluation
    command: str
    samples: SampleGrid | None
    reconstructions: SampleGrid | None
    curves: list[Panel]
    curves_png: bytes | None
    searches: list[SearchCurve]
    notes: list[str]


def gather(evaluator: Evaluator, evaluation: Evaluation, title: str, source: str | None) -> ReportContents:
    """Draw the first samples and reconstructions of an evaluation, and read the run's curves and searches."""
    notes: list[str] = []
    metrics = Path(source or "") / "metrics.jsonl"
    curves = [_thinned(panel) for panel in panels(read_points(metrics)) if _has_line(panel)] if source else []
    searches = find_searches(evaluator.folder.parent, evaluator.fingerprint, notes)
    return ReportContents(
        title=title,
        facts=_facts(evaluator, source),
        evaluation=evaluation,
        command=command(evaluator, source),
        samples=_samples(evaluator) if evaluator.request.num_samples and evaluator.external_samples is None else None,
        reconstructions=draw_reconstructions(evaluator, evaluation),
        curves=curves,
        curves_png=_drawn(lambda path: draw_curves(metrics, path)) if curves else None,
        searches=searches,
        notes=notes,
    )


def command(evaluator: Evaluator, source: str | None) -> str:
    """Return the command line that reproduces these numbers."""
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
    if request.num_samples and evaluator.external_samples is None:
        conditions = {condition.argument: condition for condition in evaluator.model.conditions.all}
        for key, value in evaluator.condition_arguments.items():
            if value is not None:
                condition = conditions.get(key)
                words += condition.options(value) if condition else [f"--{key.replace('_', '-')}", str(value)]
        words += ["--solver", s.solver, "--steps", str(s.num_inference_steps)]
        words += ["--guidance-scale", str(s.guidance_scale)]
        words += ["--guidance-interval", *map(str, s.guidance_interval), "--guidance-norm", s.guidance_norm]
        words += ["--restarts", str(s.restarts)]
        if s.restarts:
            words += ["--restart-interval", *map(str, s.restart_interval)]
        words += ["--denoise-to-zero" if s.denoise_to_zero else "--no-denoise-to-zero"]
    for key, value in (evaluator.decoding or {}).items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--seed", str(request.seed), "--precision", request.precision])


def _samples(evaluator: Evaluator) -> SampleGrid:
    return (draw_completions if evaluator.modality.completes_in_evaluation else draw_samples)(evaluator)


@torch.no_grad()
def draw_completions(evaluator: Evaluator) -> SampleGrid:
    """Draw the first completed held-out samples: what is given of each, above it completed, above how it is."""
    model, request = evaluator.model, evaluator.request
    data, values = [], []
    for completed in evaluator.completed(range(min(request.batch_size, evaluator.completions))):
        data.append((model.modality.fill(completed.given), completed.made.data, completed.batch.data))
        values.append(completed.made.values)
    drawn = [take(model.modality.join(list(part)), slice(PAIRS)) for part in zip(*data, strict=True)]
    requested = {key: join_values([part[key] for part in values]) for key in values[0]}
    shown, total = count(drawn[0]), evaluator.completions
    about = (
        f"the first {shown} of {total:,} completed held-out samples, seed {request.seed}; from top to bottom what is "
        "given, the result and the truth"
    )
    return _grid(model, drawn, captions(model, requested, shown), range(shown), PAIRS // 2, about)


@torch.no_grad()
def draw_samples(evaluator: Evaluator) -> SampleGrid:
    """Draw the first evaluated samples; whole batches are generated again, as some solvers depend on the batch."""
    model, request = evaluator.model, evaluator.request
    data: list[Any] = []
    values: list[dict[str, Tensor]] = []
    generated = 0
    for part in sample_batches(
        model, request.num_samples, seed=request.seed, batch_size=request.batch_size, precision=request.precision,
        **evaluator.settings,
    ):  # fmt: skip
        data.append(part.data)
        values.append(part.values)
        generated += part.count
        if generated >= SAMPLES:
            break
    shown = take(model.modality.join(data), slice(SAMPLES))
    requested = {key: join_values([part[key] for part in values]) for key in (values[0] if values else {})}
    columns = model.conditions.columns
    columns *= max(1, WIDE // columns)
    about = f"the first {count(shown)} of {request.num_samples:,} evaluated samples, seed {request.seed}"
    return _grid(model, [shown], captions(model, requested, count(shown)), range(SAMPLES), columns, about)


@torch.no_grad()
def draw_reconstructions(evaluator: Evaluator, evaluation: Evaluation) -> SampleGrid | None:
    """Draw the first evaluated held-out samples, each above its reconstruction; None if there are none."""
    held_out, model, request = evaluation.evidence.held_out, evaluator.model, evaluator.request
    if held_out is None or not len(held_out) or evaluator.splits is None:
        return None
    dataset = evaluator.splits.held_out
    places = [i * len(dataset) // len(held_out) for i in range(min(PAIRS, len(held_out)))]
    batch = collate([dataset[place] for place in places], model.modality)
    reconstructions = reconstruct(
        model, batch.data, seed=request.seed, batch_size=request.batch_size, precision=request.precision,
        **(evaluator.decoding or {}),
    )  # fmt: skip
    about = f"the first {len(places)} evaluated held-out samples, each above its reconstruction"
    texts = captions(model, batch.values, len(places))
    return _grid(model, [batch.data, reconstructions], texts, places, PAIRS // 2, about)


def captions(model: LatentModel, values: dict[str, Tensor], rows: int) -> list[str]:
    """Return the conditions of each sample as text; empty texts if the model has none."""
    return model.conditions.captions({key: value[:rows] for key, value in values.items()}) or [""] * rows


def find_searches(folder: Path, fingerprint: str, notes: list[str]) -> list[SearchCurve]:
    """Read every search*.json in a folder or one level below; those that cannot be drawn are added to `notes`."""
    searches = []
    for path in sorted([*folder.glob("search*.json"), *folder.glob("*/search*.json")]):
        name = path.relative_to(folder).as_posix()
        try:
            content = read_json(path, "search again")
            if content.get("fingerprint", fingerprint) != fingerprint:
                notes.append(f"{name} is left out: it belongs to another model")
                continue
            over = str(content["over"])
            points = [CurvePoint(_place(p[over]), float(p["value"]), str(p["key"])) for p in content["points"]]
            finite = [point for point in points if all(map(math.isfinite, (*_ends(point.at), point.value)))]
            cautions = tuple(map(str, content["cautions"]))
            search = SearchCurve(str(content["metric"]), over, sorted(finite, key=lambda p: _ends(p.at)), cautions)
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{name} is left out: it cannot be read as a search")
            continue
        if search.points:
            searches.append(search)
    return searches


def _place(at: Any) -> SettingValue:
    """Parse a value of a setting from the file of a search."""
    if not isinstance(at, list):
        return float(at)
    low, high = at
    return float(low), float(high)


def _ends(at: SettingValue) -> tuple[float, ...]:
    return at if isinstance(at, tuple) else (at,)


def _facts(evaluator: Evaluator, source: str | None) -> list[tuple[str, str]]:
    model = evaluator.model
    parameters = sum(p.numel() for p in model.parameters())
    facts = [("model", f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters")]
    if source is not None:
        facts.append(("source", source))
    return [
        *facts,
        ("fingerprint", evaluator.fingerprint),
        ("created", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("software", f"unilatent {__version__}, torch {torch.__version__}, {model.device.type}"),
    ]


ROWS = {1: ("",), 2: ("original", "reconstruction"), 3: ("given", "completed", "true")}
"""Names of the rows of a grid, by their number."""


def _grid(
    model: LatentModel, rows: Sequence[Any], texts: list[str], places: Sequence[int], columns: int, about: str
) -> SampleGrid:
    modality = model.modality
    images = [
        DrawnSample(_png(modality, [take(row, slice(i, i + 1)) for row in rows], None), text, place)
        for i, (text, place) in enumerate(zip(texts, places, strict=False))
    ]
    turned = [", ".join(filter(None, (text, name))) for text in texts for name in ROWS[len(rows)]]
    each = modality.join([take(row, slice(i, i + 1)) for i in range(len(images)) for row in rows])
    viewer = modality.viewer(each, turned[: count(each)])
    return SampleGrid(images, _png(modality, rows, columns), columns, about, viewer)


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
    """Reduce long curves to the minimum and maximum of each stretch, so that peaks stay visible."""
    points: Points = {}
    for key, (steps, values) in panel.points.items():
        shown: Sequence[int] = range(len(values))
        if len(values) > MOST_POINTS:
            width = 2 * len(values) / MOST_POINTS
            shown = []
            for k in range(MOST_POINTS // 2):
                stretch = range(int(k * width), int((k + 1) * width))
                ends = {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
                shown.extend(sorted(ends))
        points[key] = ([steps[i] for i in shown], [values[i] for i in shown])
    return Panel(panel.title, points, panel.log, panel.least)
