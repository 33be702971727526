"""Search for the best value of one sampling setting, or of the EMA length, by a metric of generated samples.

Every evaluated value is stored in one file, from which a restarted search resumes:

    search-<hash>.json   {"over", "metric", "better", "protocol", "points": [{OVER, "value", "spread", "key", ...}],
                          "best", "seconds"}

All values use the same seeds, so that two points differ by the setting and not by chance.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json
from ..outputs import in_shared_folder
from ..processes import Processes
from ..tables import marked
from .evaluate import EvaluatedMetric
from .protocol import Protocol
from .table import format_number, format_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
GOLDEN = (math.sqrt(5) - 1) / 2
DIGITS = 6
"""Decimals that settings are rounded to, so that 1.5 + 0.2 is 1.7."""

SettingValue = float | tuple[float, float]
"""A value of the searched setting; an interval is a pair."""
Objective = Callable[[SettingValue], float]
"""The function to minimise. It caches its values."""


@dataclass(frozen=True)
class Axis:
    """A setting that is one number: the start and step of a walk, and its range (low, high)."""

    start: float
    step: float
    low: float
    high: float
    whole: bool = False


AXES = {
    "guidance_scale": Axis(1.5, 0.2, 0.0, 20.0),
    "num_inference_steps": Axis(25, 5, 1, 1000, whole=True),
    "decoder_steps": Axis(25, 5, 1, 1000, whole=True),
    "ema": Axis(0.1, 0.02, 0.01, 0.28),
}
DECODER = "decoder_steps"
INTERVAL = "guidance_interval"
OVER = (*AXES, INTERVAL)


# ---- search methods: each calls `objective`, which stores the values


def walk(objective: Objective, axis: Axis, start: float, step: float) -> None:
    """Adaptive search of UNITE's authors: start, both neighbours, then further in the better one's direction while it
    improves. Ends one step after a local minimum."""
    assert step > 0

    def at(places: int) -> float:
        return objective(round(start + places * step, DIGITS))

    def is_inside(places: int) -> bool:
        return axis.low <= round(start + places * step, DIGITS) <= axis.high

    here = at(0)
    neighbours = {places: at(places) for places in (1, -1) if is_inside(places)}
    direction = min(neighbours, key=lambda places: neighbours[places], default=0)
    if not direction or not neighbours[direction] < here:
        return
    here, places = neighbours[direction], 2 * direction
    while is_inside(places) and at(places) < here:
        here, places = at(places), places + direction


def golden(objective: Objective, low: float, high: float, tolerance: float) -> None:
    """Golden-section search: each new value shrinks the interval to 62 %, until it is shorter than `tolerance`.

    Finds the minimum if there is only one between `low` and `high`.
    """
    assert low < high and tolerance > 0
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > tolerance:
        if objective(round(left, DIGITS)) <= objective(round(right, DIGITS)):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def grid(objective: Objective, values: Iterable[SettingValue]) -> None:
    """Evaluate each of the values."""
    for value in values:
        objective(value)


def intervals(lows: Sequence[float], highs: Sequence[float]) -> list[SettingValue]:
    """Return every pair of a low end and a higher high end; ValueError if there is none."""
    pairs: list[SettingValue] = [(low, high) for low, high in product(lows, highs) if 0 <= low < high <= 1]
    if not pairs:
        raise ValueError(f"--low {list(lows)}, --high {list(highs)}: no interval with 0 <= low < high <= 1 among them")
    return pairs


# ---- the objective


@dataclass(frozen=True)
class SearchPoint:
    """An evaluated value of the setting. key: full name of the metric. about: further facts to store, as plain data.
    parts: what the value is the mean of (`Row.parts`)."""

    at: SettingValue
    value: float
    spread: float | None
    key: str
    seconds: float
    about: dict[str, Any]
    parts: dict[str, float] = field(default_factory=dict)


class Search:
    """The objective of a search: evaluates a metric at values of a setting, and stores the points in a file."""

    def __init__(
        self, over: str, metric: str, about: dict[str, Any], folder: Path,
        evaluate: Callable[[SettingValue], tuple[EvaluatedMetric, dict[str, Any]]], processes: Processes | None = None,
        say: Callable[[str], object] = print,
    ):  # fmt: skip
        """about: everything that determines a number, except the setting, as plain data; it names the file in `folder`.
        ValueError if a file of that name is there that no search wrote, or that was changed since.

        evaluate: returns the result at a value, and further facts to store. processes: all call this together; the
        first one writes, and all use its results. ValueError if the file belongs to another search.
        """
        self.over, self.metric, self.evaluate, self.say = over, metric, evaluate, say
        self.processes = processes or Processes.alone()
        self.about = json.loads(json.dumps({"over": over, "metric": metric, **about}))
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"search-{name}.json"
        self.outputs = in_shared_folder(folder, "search")
        self.points: list[SearchPoint] = []
        self.better = ""
        self.protocol: dict[str, Any] = {}
        self.points, self.better, self.protocol = self.processes.from_main(self._open)

    def __call__(self, at: SettingValue) -> float:
        """Return the number at a value, negated if higher is better."""
        point = self.find(at)
        if point is None:
            point = self._measure(at)
        return point.value if self.better == "lower" else -point.value

    def find(self, at: SettingValue) -> SearchPoint | None:
        """Return the stored point of a value, if any."""
        return next((point for point in self.points if point.at == at), None)

    @property
    def best(self) -> SearchPoint:
        """The best of all points in the file, the first of equals."""
        return min(self.points, key=lambda point: point.value if self.better == "lower" else -point.value)

    @property
    def title(self) -> str:
        """The best number's full name with its cautions."""
        return "; ".join([self.best.key, *marked(self._cautions)])

    @property
    def _cautions(self) -> list[str]:
        return Protocol.parse(self.protocol).cautions()

    @property
    def at_the_end(self) -> bool:
        """Whether the best value is the lowest or highest one evaluated, so that a better one may lie beyond it."""
        values = sorted(point.at for point in self.points if isinstance(point.at, float))
        return len(values) > 1 and self.best.at in (values[0], values[-1])

    def _measure(self, at: SettingValue) -> SearchPoint:
        started = time.perf_counter()
        result, about = self.evaluate(at)
        row = result.row
        if row.better == "same":
            raise ValueError(
                f"--metric {self.metric}: has no better direction (neither higher nor lower); choose another"
            )
        seconds = round(time.perf_counter() - started, 2)
        point = SearchPoint(at, row.value, row.spread, result.key, seconds, about, row.parts)
        point = self.processes.from_main(lambda: point)
        if not math.isfinite(point.value):
            raise ValueError(
                f"--metric {self.metric}: {point.value} at {self.over} {format_setting(at)}; take more samples"
            )
        self._refuse_other(protocol := _shared(result.protocol, self.over))
        self.points.append(point)
        self.better, self.protocol = row.better, protocol
        if self.processes.is_main:
            self._write()
            number = format_number(point.value)
            spread = "" if point.spread is None else f" ± {format_number(point.spread)}"
            parts = f", {format_parts(point.parts)}" if point.parts else ""
            setting = f"{self.over} {format_setting(at)}"
            self.say(f"{setting}: {self.metric} {number}{spread}{parts}  ({point.seconds:.0f} s)")
        return point

    def _refuse_other(self, protocol: dict[str, Any]) -> None:
        """ValueError if the stored points were measured under another protocol (with other weights, say)."""
        if not self.points:
            return
        differing = Protocol.parse(self.protocol).differences(Protocol.parse(protocol))
        if differing:
            what, stored, now = differing[0]
            raise ValueError(
                f"{self.path}: its points have {what} {stored!r}, this one {now!r}; give what they were measured with, "
                "or delete it to start the search again"
            )

    def _write(self) -> None:
        content = {
            "format_version": FORMAT, **self.about, "better": self.better, "protocol": self.protocol,
            "points": [self._plain(point) for point in self.points], "best": self._plain(self.best),
            "cautions": self._cautions,
            "seconds": round(sum(point.seconds for point in self.points), 2),
        }  # fmt: skip
        with self.outputs.writing() as new:
            write_json(new / self.path.name, content)

    def _plain(self, point: SearchPoint) -> dict[str, Any]:
        return {
            self.over: point.at, "value": point.value, "spread": point.spread, "key": point.key,
            "seconds": point.seconds, **({"parts": point.parts} if point.parts else {}), **point.about,
        }  # fmt: skip

    def _open(self) -> tuple[list[SearchPoint], str, dict[str, Any]]:
        """Return what an earlier search of this file has found; ValueError if the file cannot be read or written."""
        if self.path.is_file():
            self._read()
        self.outputs.check(self.path.name, self.path.with_suffix(".png").name)
        return self.points, self.better, self.protocol

    def _read(self) -> None:
        way_out = "delete it to start the search again"
        content = read_json(self.path, way_out)
        point_keys = {self.over, "value", "spread", "key", "seconds", "parts"}
        try:
            if {key: content[key] for key in self.about} != self.about or content["format_version"] != FORMAT:
                raise ValueError(f"{self.path}: belongs to another search; {way_out}")
            self.better, self.protocol = content["better"], content["protocol"]
            for p in content["points"]:
                at = tuple(p[self.over]) if isinstance(p[self.over], list) else float(p[self.over])
                about = {key: value for key, value in p.items() if key not in point_keys}
                parts = {name: float(value) for name, value in p.get("parts", {}).items()}
                self.points.append(
                    SearchPoint(at, float(p["value"]), p["spread"], p["key"], float(p["seconds"]), about, parts)
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: damaged ({error}); {way_out}") from None


def _shared(protocol: Protocol, over: str) -> dict[str, Any]:
    """Return a point's protocol without the fields that differ between points."""
    plain = protocol.plain()
    for part in ("sampling", "decoding"):
        if plain[part] is not None:
            plain[part] = {key: value for key, value in plain[part].items() if key != over}
    return {key: value for key, value in plain.items() if key != "nfe"}


def format_setting(at: SettingValue) -> str:
    """Format a value for messages and command lines."""
    return " ".join(f"{value:.9g}" for value in at) if isinstance(at, tuple) else f"{at:.9g}"


def draw_search(search: Search, path: Path) -> None:
    """Draw the points as a curve with the best one marked; intervals as one curve per low end, over the high ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    best = search.best
    if search.over == INTERVAL:
        pairs = [(point.at, point) for point in search.points if isinstance(point.at, tuple)]
        for low in sorted({at[0] for at, _ in pairs}):
            _curve(panel, [(at[1], point) for at, point in pairs if at[0] == low], f"from {low:g}")
        panel.set_xlabel("guided up to t (1 is noise)")
        panel.legend(frameon=False, fontsize=8)
    else:
        _curve(panel, [(point.at, point) for point in search.points if isinstance(point.at, float)], None)
        panel.set_xlabel({"ema": "relative EMA length (sigma_rel)"}.get(search.over, search.over))
    x = best.at[1] if isinstance(best.at, tuple) else best.at
    panel.plot([x], [best.value], "o", markersize=11, markerfacecolor="none", color="black")
    label = f"{format_setting(best.at)}: {format_number(best.value)}"
    panel.annotate(label, (x, best.value), (0, 12), textcoords="offset points", ha="center", fontsize=9)
    panel.margins(x=0.08, y=0.12)
    panel.grid(alpha=0.25)
    panel.set_ylabel(f"{search.metric} ({search.better} is better)")
    panel.set_title(search.title, fontsize=9, loc="left")
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def _curve(panel: Axes, points: list[tuple[float, SearchPoint]], label: str | None) -> None:
    points = sorted(points, key=lambda item: item[0])
    x, y = [at for at, _ in points], [point.value for _, point in points]
    line = panel.plot(x, y, "o-", markersize=4, linewidth=1.2, label=label)[0]
    with_spread = [(at, point.value, point.spread) for at, point in points if point.spread is not None]
    if with_spread:
        at, values, spread = zip(*with_spread, strict=True)
        panel.errorbar(at, values, yerr=spread, fmt="none", color=line.get_color(), capsize=3, linewidth=0.8)
