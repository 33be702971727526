"""Figures of an analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .alignment import Alignment
from .compression import GROUPS, Compression
from .decoding import Sensitivity, Trajectory
from .latents import LatentStatistics
from .layers import LayerAccuracy
from .losses import Course, ErrorByTime, GradientCosine
from .rates import Curve, RateReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


COLUMNS = 4
"""Panels in a row, at most."""


@contextmanager
def panels(path: Path, count: int) -> Iterator[list[Axes]]:
    """Yield `count` panels in rows; the figure is written to `path` at the end of the block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = min(count, COLUMNS), -(-count // COLUMNS)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel in axes[:count]:
        panel.grid(alpha=0.25)
    for panel in axes[count:]:
        panel.set_axis_off()
    yield axes[:count]
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_figure(temporary, dpi=110)
    temporary.replace(path)


def titled(panel: Axes, title: str, x: str, y: str) -> Axes:
    """Set a panel's title and axis labels, and return it."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    return panel


def in_whole_numbers(*axes: Axis) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


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


def draw_sensitivity(found: Sensitivity, path: Path) -> None:
    """Draw each error of reconstructions against the noise on their latents."""
    with panels(path, len(found.errors)) as axes:
        for panel, (key, values) in zip(axes, found.errors.items(), strict=True):
            titled(panel, f"{key} from latents with noise", "noise / RMS of the latents", key)
            panel.plot(found.noises, values, marker="o", linewidth=1.3)


def draw_alignment(found: Alignment, path: Path) -> None:
    """Draw the CKA of all pairs of blocks at each noise level, and CKA and CKNNA of block i with block i."""
    weights = "the same weights" if found.shared else "separate weights"
    with panels(path, len(found.levels) + 2) as axes:
        for panel, t, table in zip(axes, found.levels, found.cka, strict=False):
            titled(panel, f"CKA at t = {t:g}, {weights}", "block of the denoise pass", "block of the tokenise pass")
            panel.grid(False)
            in_whole_numbers(panel.xaxis, panel.yaxis)
            image = panel.imshow(table, vmin=0, vmax=1, origin="lower", cmap="viridis", aspect="auto")
            panel.figure.colorbar(image, ax=panel)
        for panel, name, curves in (
            (axes[-2], "linear CKA", [[row[i] for i, row in enumerate(table) if i < len(row)] for table in found.cka]),
            (axes[-1], f"CKNNA, {found.neighbours} neighbours", found.cknna),
        ):
            titled(panel, f"{name}, block by block", "block", name)
            in_whole_numbers(panel.xaxis)
            for t, values in zip(found.levels, curves, strict=True):
                panel.plot(range(len(values)), values, marker="o", linewidth=1.3, label=f"t = {t:g}")
            panel.legend(fontsize=8, frameon=False)


def draw_compression(found: Compression, path: Path) -> None:
    """Draw the MB of each network's groups of weights, trained and as initialised."""
    with panels(path, 1) as (panel,):
        titled(panel, "weights by the entropy of their values", "", "MB")
        states = {"normal numbers": found.gaussian, "initial": found.initial, "trained": found.trained}
        sizes = {network: sum(groups.values()) for network, groups in found.trained.items()}
        networks = [network for network, size in sizes.items() if size > 0.01 * sum(sizes.values())]
        names = [f"{network}, {state}" for network in networks for state in states]
        bottom = [0.0] * len(names)
        for group in GROUPS:
            heights = [of[network][group] for network in networks for of in states.values()]
            panel.bar(range(len(names)), heights, bottom=bottom, label=group)
            bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        panel.legend(fontsize=8, frameon=False)


def draw_layers(found: LayerAccuracy, path: Path) -> None:
    """Draw the accuracy of both probes by block, for both passes, with that of the latents and of no features."""
    with panels(path, 2) as axes:
        kinds = (("linear probe", "linear", found.linear), ("k nearest neighbours", "knn", found.knn))
        for panel, (title, key, values) in zip(axes, kinds, strict=True):
            titled(panel, f"{title} of {found.name}", "block", "accuracy")
            in_whole_numbers(panel.xaxis)
            for kind, curve in values.items():
                panel.plot(range(len(curve)), curve, marker="o", linewidth=1.3, label=f"{kind} pass")
            panel.axhline(found.latents[key], linestyle="--", linewidth=1, color="0.4", label="latents")
            panel.axhline(found.constant, linestyle=":", linewidth=1, color="0.6", label="most frequent class")
            panel.legend(fontsize=8, frameon=False)


def draw_trajectory(found: Trajectory, path: Path) -> None:
    """Draw how far clean estimates are from the last one, and how far each step moved them."""
    with panels(path, 1) as (panel,):
        titled(panel, "clean estimates on the way to a sample", "t (1 noise, 0 clean)", "relative squared distance")
        panel.plot(found.times, found.distance, marker=".", linewidth=1.3, label="from the sample")
        panel.plot(found.times, found.moved, marker=".", linewidth=1.3, label="from the estimate before")
        panel.invert_xaxis()
        panel.legend(fontsize=8, frameon=False)


def draw_errors_by_time(found: ErrorByTime, gradients: Sequence[GradientCosine], path: Path) -> None:
    """Draw the error of clean estimates by noise level and, where losses share weights, the cosines of their
    gradients."""
    with panels(path, 2 if gradients else 1) as axes:
        titled(axes[0], "error of clean estimates", "t (0 clean, 1 noise)", "squared error / variance")
        axes[0].plot(found.times, found.unconditional, marker=".", linewidth=1.3, label="unconditional")
        if found.conditional is not None:
            axes[0].plot(found.times, found.conditional, marker=".", linewidth=1.3, label="conditional")
        axes[0].legend(fontsize=8, frameon=False)
        if gradients:
            bars = [(f"{' / '.join(g.parts)}\n{name}", value) for g in gradients for name, value in g.modules.items()]
            titled(axes[1], "do the losses' gradients agree?", "", "cosine")
            axes[1].bar(range(len(bars)), [value for _, value in bars])
            axes[1].axhline(0, color="0.3", linewidth=0.8)
            axes[1].set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)


def draw_course(found: Course, path: Path) -> None:
    """Draw a run: its losses by step, and the numbers of its evaluations (UNITE's figure in which the flow loss rises
    while samples improve)."""
    shown = {key: found.numbers[key] for key in found.numbers if len(found.numbers[key][0]) > 1}
    losses = {key: values for key, values in found.losses.items() if key != "total"} or found.losses
    curves = [*((f"loss: {key}", values, True) for key, values in losses.items()),
              *((key, values, False) for key, values in shown.items())]  # fmt: skip
    with panels(path, len(curves)) as axes:
        for panel, (title, (steps, values), is_loss) in zip(axes, curves, strict=True):
            titled(panel, title, "step", title)
            panel.plot(steps, values, linewidth=1.1, marker=None if is_loss and len(steps) > 1 else "o")
            if is_loss and min(values) > 0:
                panel.set_yscale("log")


def _with_errors(panel: Axes, name: str, curve: Curve) -> None:
    panel.plot(curve.logsnr, curve.mean, linewidth=1.3, label=name)
    errors = [math.nan if error is None else error for error in curve.error]  # no band at a single value
    low = [mean - error for mean, error in zip(curve.mean, errors, strict=True)]
    high = [mean + error for mean, error in zip(curve.mean, errors, strict=True)]
    panel.fill_between(curve.logsnr, low, high, alpha=0.2)
