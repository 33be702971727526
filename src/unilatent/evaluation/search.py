"""The best value of one sampling setting, or of the length of the average, by a metric of new samples.

Every value looked at is kept in one file, which a search that is started again goes on with:

    search-<hash>.json   {"over", "metric", "better", "protocol", "points": [{OVER, "value", "spread", "key", ...}],
                          "best", "seconds"}

All values get the same seeds, so that what differs between two points is the setting and not the luck of the draw.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json
from ..training.processes import Processes
from .evaluate import Measured
from .protocol import Protocol
from .table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
GOLDEN = (math.sqrt(5) - 1) / 2
DIGITS = 6
"""Decimals of a setting: 1.5 + 0.2 is 1.7."""

At = float | tuple[float, float]
"""A value of the setting; an interval is a pair."""
Objective = Callable[[At], float]
"""What is to be made small; asked twice for a value, it answers from memory."""


@dataclass(frozen=True)
class Axis:
    """A setting that is one number: where a walk starts, how far it steps, and where it has to stay."""

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


# Ways to look; each asks `objective` and leaves it to remember.


def walk(objective: Objective, axis: Axis, start: float, step: float) -> None:
    """The adaptive search of UNITE's authors: a start, its two neighbours, and on in the better one's direction for as
    long as that improves. Ends beside a minimum, the only one if there is no other."""
    assert step > 0

    def at(places: int) -> float:
        return objective(round(start + places * step, DIGITS))

    def is_inside(places: int) -> bool:
        return axis.low <= round(start + places * step, DIGITS) <= axis.high

    here = at(0)
    beside = {places: at(places) for places in (1, -1) if is_inside(places)}
    direction = min(beside, key=lambda places: beside[places], default=0)
    if not direction or not beside[direction] < here:
        return
    here, places = beside[direction], 2 * direction
    while is_inside(places) and at(places) < here:
        here, places = at(places), places + direction


def golden(objective: Objective, low: float, high: float, tolerance: float) -> None:
    """Golden-section search: one new value for each cut of the interval to 62 %, until it is shorter than `tolerance`.
    Right where there is one minimum between `low` and `high`."""
    assert low < high and tolerance > 0
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > tolerance:
        if objective(round(left, DIGITS)) <= objective(round(right, DIGITS)):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def grid(objective: Objective, values: Iterable[At]) -> None:
    """Each of the values."""
    for value in values:
        objective(value)


def intervals(lows: Sequence[float], highs: Sequence[float]) -> list[At]:
    """Every pair of a low and a higher end; ValueError if there is none."""
    pairs: list[At] = [(low, high) for low, high in product(lows, highs) if 0 <= low < high <= 1]
    if not pairs:
        raise ValueError(f"--low {list(lows)}, --high {list(highs)}: no interval with 0 <= low < high <= 1 among them")
    return pairs


# What is asked.


@dataclass(frozen=True)
class Point:
    """A value that was looked at. key: the number's full name; about: what else is known of it, as plain data."""

    at: At
    value: float
    spread: float | None
    key: str
    seconds: float
    about: dict[str, Any]


class Search:
    """Asks for numbers, remembers them, on disk too."""

    def __init__(
        self, over: str, metric: str, about: dict[str, Any], folder: Path,
        evaluate: Callable[[At], tuple[Measured, dict[str, Any]]], processes: Processes | None = None,
        say: Callable[[str], object] = print,
    ):  # fmt: skip
        """about: everything that decides a number, the setting apart, as plain data; it names the file in `folder`.

        evaluate: the number at a value, and what else to keep of it. processes: all of them come here together; the
        first one writes, and what it measured is what all go by. ValueError if the file there is another's."""
        self.over, self.metric, self.evaluate, self.processes, self.say = over, metric, evaluate, processes, say
        self.about = json.loads(json.dumps({"over": over, "metric": metric, **about}))
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"search-{name}.json"
        self.points: list[Point] = []
        self.better = ""
        self.protocol: dict[str, Any] = {}
        if self.path.is_file():
            self._read()
        if processes is not None:
            processes.wait()  # nobody writes before everybody has read

    def __call__(self, at: At) -> float:
        """The number at a value, negated if higher is better."""
        point = self.find(at)
        if point is None:
            point = self._measure(at)
        return point.value if self.better == "lower" else -point.value

    def find(self, at: At) -> Point | None:
        """What is known of a value."""
        return next((point for point in self.points if point.at == at), None)

    @property
    def best(self) -> Point:
        """Of all in the file, the first of equals."""
        return min(self.points, key=lambda point: point.value if self.better == "lower" else -point.value)

    @property
    def title(self) -> str:
        """The best number's full name, with what must be said wherever it is shown."""
        return "; ".join([self.best.key, *self._cautions])

    @property
    def _cautions(self) -> list[str]:
        return Protocol.parse(self.protocol).cautions()

    @property
    def at_the_end(self) -> bool:
        """Whether the best is the lowest or highest value looked at, beyond which there may be a better one."""
        values = sorted(point.at for point in self.points if isinstance(point.at, float))
        return len(values) > 1 and self.best.at in (values[0], values[-1])

    def _measure(self, at: At) -> Point:
        started = time.perf_counter()
        measured, about = self.evaluate(at)
        row = measured.row
        if row.better == "same":
            raise ValueError(f"--metric {self.metric}: is neither better high nor low; choose another")
        point = Point(at, row.value, row.spread, measured.key, round(time.perf_counter() - started, 2), about)
        if self.processes is not None:
            point = self.processes.gather(point)[0]
        if not math.isfinite(point.value):
            raise ValueError(f"--metric {self.metric}: {point.value} at {self.over} {shown(at)}; take more samples")
        self.points.append(point)
        self.better, self.protocol = row.better, _shared(measured.protocol, self.over)
        if self.processes is None or self.processes.is_main:
            self._write()
            spread = "" if point.spread is None else f" ± {number(point.spread)}"
            self.say(f"{self.over} {shown(at)}: {self.metric} {number(point.value)}{spread}  ({point.seconds:.0f} s)")
        return point

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {
            "format_version": FORMAT, **self.about, "better": self.better, "protocol": self.protocol,
            "points": [self._plain(point) for point in self.points], "best": self._plain(self.best),
            "cautions": self._cautions,
            "seconds": round(sum(point.seconds for point in self.points), 2),
        })  # fmt: skip

    def _plain(self, point: Point) -> dict[str, Any]:
        return {
            self.over: point.at, "value": point.value, "spread": point.spread, "key": point.key,
            "seconds": point.seconds, **point.about,
        }  # fmt: skip

    def _read(self) -> None:
        way_out = "delete it to search anew"
        content = read_json(self.path, way_out)
        own = {self.over, "value", "spread", "key", "seconds"}
        try:
            if {key: content[key] for key in self.about} != self.about or content["format_version"] != FORMAT:
                raise ValueError(f"{self.path}: is of another search; {way_out}")
            self.better, self.protocol = content["better"], content["protocol"]
            for p in content["points"]:
                at = tuple(p[self.over]) if isinstance(p[self.over], list) else float(p[self.over])
                about = {key: value for key, value in p.items() if key not in own}
                self.points.append(Point(at, float(p["value"]), p["spread"], p["key"], float(p["seconds"]), about))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: damaged ({error}); {way_out}") from None


def _shared(protocol: Protocol, over: str) -> dict[str, Any]:
    """A point's protocol without what differs between points."""
    plain = protocol.plain()
    for field in ("sampling", "decoding"):
        if plain[field] is not None:
            plain[field] = {key: value for key, value in plain[field].items() if key != over}
    return {key: value for key, value in plain.items() if key != "nfe"}


def shown(at: At) -> str:
    """A value for people, and for a command line."""
    return " ".join(f"{value:.9g}" for value in at) if isinstance(at, tuple) else f"{at:.9g}"


def draw(search: Search, path: Path) -> None:
    """Its points as a curve with the best marked; intervals as a curve for each low end, over the high ones."""
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
        panel.set_xlabel({"ema": "relative length of the average (sigma_rel)"}.get(search.over, search.over))
    x = best.at[1] if isinstance(best.at, tuple) else best.at
    panel.plot([x], [best.value], "o", markersize=11, markerfacecolor="none", color="black")
    panel.annotate(f"{shown(best.at)}: {number(best.value)}", (x, best.value), (0, 12), textcoords="offset points",
                   ha="center", fontsize=9)  # fmt: skip
    panel.margins(x=0.08, y=0.12)
    panel.grid(alpha=0.25)
    panel.set_ylabel(f"{search.metric} ({search.better} is better)")
    panel.set_title(search.title, fontsize=9, loc="left")
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_figure(temporary, dpi=110)
    temporary.replace(path)


def _curve(panel: Axes, points: list[tuple[float, Point]], label: str | None) -> None:
    points = sorted(points, key=lambda item: item[0])
    x, y = [at for at, _ in points], [point.value for _, point in points]
    line = panel.plot(x, y, "o-", markersize=4, linewidth=1.2, label=label)[0]
    known = [(at, point.value, point.spread) for at, point in points if point.spread is not None]
    if known:
        at, values, spread = zip(*known, strict=True)
        panel.errorbar(at, values, yerr=spread, fmt="none", color=line.get_color(), capsize=3, linewidth=0.8)
