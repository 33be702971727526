"""Figures of an analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .latents import LatentStatistics
from .rates import Curve, RateReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


@contextmanager
def panels(path: Path, count: int) -> Iterator[list[Axes]]:
    """Yield `count` panels in a row; the figure is written to `path` at the end of the block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4.2), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.grid(alpha=0.25)
    yield axes
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_figure(temporary, dpi=110)
    temporary.replace(path)


def titled(panel: Axes, title: str, x: str, y: str) -> Axes:
    """Set a panel's title and axis labels, and return it."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    return panel


def draw_latents(statistics: LatentStatistics, path: Path) -> None:
    """Draw the histogram of values, and the standard deviation of each channel in falling order."""
    with panels(path, 2) as (left, right):
        titled(left, "clean latents, all values", "value", "share of values")
        left.stairs(statistics.shares, statistics.edges, fill=True, alpha=0.7)
        titled(right, f"channels: effective rank {statistics.rank:.3g}", "channel, sorted", "std over samples")
        right.bar(range(statistics.channels), sorted(statistics.channel_std, reverse=True), width=0.8)


def draw_levels(rate: RateReport, path: Path) -> None:
    """Draw the loss by noise level; the area under a curve is its loss."""
    curves = {
        "prior": [("latents", rate.latents)],
        "decoder": [("right latents", rate.data), ("another sample's latents", rate.data_shuffled)],
    }
    shown = {title: [(name, curve) for name, curve in named if curve] for title, named in curves.items()}
    shown = {title: named for title, named in shown.items() if named}
    with panels(path, len(shown)) as axes:
        for panel, (title, named) in zip(axes, shown.items(), strict=True):
            titled(panel, f"{title}, by noise level", "log-SNR (noise left, clean right)", "nats per unit of log-SNR")
            for name, curve in named:
                _with_errors(panel, name, curve)
            if len(named) > 1:
                panel.legend(fontsize=8, frameon=False)


def draw_scatter(points: Sequence[tuple[str, float, dict[str, float]]], x: str, path: Path) -> None:
    """Draw points (name, x, y by title), one panel per title, connected in the order of x."""
    titles = list(dict.fromkeys(title for _, _, ys in points for title in ys))
    with panels(path, len(titles)) as axes:
        for panel, title in zip(axes, titles, strict=True):
            in_panel = sorted((at, ys[title], name) for name, at, ys in points if title in ys)
            titled(panel, title, x, title)
            panel.plot([p[0] for p in in_panel], [p[1] for p in in_panel], marker="o", linewidth=1.1)
            for at, value, name in in_panel:
                panel.annotate(name, (at, value), fontsize=7, xytext=(4, 4), textcoords="offset points")


def _with_errors(panel: Axes, name: str, curve: Curve) -> None:
    panel.plot(curve.logsnr, curve.mean, linewidth=1.3, label=name)
    errors = [math.nan if error is None else error for error in curve.error]  # no band at a single value
    low = [mean - error for mean, error in zip(curve.mean, errors, strict=True)]
    high = [mean + error for mean, error in zip(curve.mean, errors, strict=True)]
    panel.fill_between(curve.logsnr, low, high, alpha=0.2)
