"""Pictures of an analysis."""

from __future__ import annotations

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
    """So many panels side by side, written to the file at the end of the block."""
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
    """The panel, with its words."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    return panel


def draw_latents(statistics: LatentStatistics, path: Path) -> None:
    """Histogram of values; spread of each channel, widest first."""
    with panels(path, 2) as (left, right):
        titled(left, "clean latents, all values", "value", "share of values")
        left.stairs(statistics.shares, statistics.edges, fill=True, alpha=0.7)
        titled(right, f"channels: effective rank {statistics.rank:.3g}", "channel, widest first", "spread over samples")
        right.bar(range(statistics.channels), sorted(statistics.channel_std, reverse=True), width=0.8)


def draw_levels(rate: RateReport, path: Path) -> None:
    """Where on the way from noise to data the nats are: the area under a curve is its loss."""
    curves = {
        "prior": [("own", rate.latents)],
        "decoder": [("own latents", rate.data), ("another sample's latents", rate.data_shuffled)],
    }
    shown = {title: [(name, c) for name, c in own if c] for title, own in curves.items()}
    shown = {title: own for title, own in shown.items() if own}
    with panels(path, len(shown)) as axes:
        for panel, (title, own) in zip(axes, shown.items(), strict=True):
            titled(panel, f"{title}, by noise level", "log-SNR (noise left, clean right)", "nats for a unit of log-SNR")
            for name, curve in own:
                _with_errors(panel, name, curve)
            if len(own) > 1:
                panel.legend(fontsize=8, frameon=False)


def draw_scatter(points: Sequence[tuple[str, float, dict[str, float]]], x: str, path: Path) -> None:
    """(name, x, y by title) of several runs: a panel for each title, joined in the order of x."""
    titles = list(dict.fromkeys(title for _, _, ys in points for title in ys))
    with panels(path, len(titles)) as axes:
        for panel, title in zip(axes, titles, strict=True):
            own = sorted((at, ys[title], name) for name, at, ys in points if title in ys)
            titled(panel, title, x, title)
            panel.plot([p[0] for p in own], [p[1] for p in own], marker="o", linewidth=1.1)
            for at, value, name in own:
                panel.annotate(name, (at, value), fontsize=7, xytext=(4, 4), textcoords="offset points")


def _with_errors(panel: Axes, name: str, curve: Curve) -> None:
    panel.plot(curve.logsnr, curve.mean, linewidth=1.3, label=name)
    low = [mean - error for mean, error in zip(curve.mean, curve.error, strict=True)]
    high = [mean + error for mean, error in zip(curve.mean, curve.error, strict=True)]
    panel.fill_between(curve.logsnr, low, high, alpha=0.2)
