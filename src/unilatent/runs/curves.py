"""curves.png: the metrics of a run over its steps."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .journal import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[list[int], list[float]]]
"""Metric -> its steps and values."""
SIDE = (13, 7.5)
"""Width and height of the image in inches."""


@dataclass(frozen=True)
class Panel:
    """Curves that share axes. least: lower end of a linear value axis."""

    title: str
    points: Points
    log: bool = False
    least: float | None = None


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw the curves of a metrics.jsonl to an image; nothing is written while it has fewer than two lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = read_points(metrics)
    if not points or len(next(iter(points.values()))[0]) < 2:
        return
    figure = Figure(figsize=SIDE, layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flatten()
    for ax, panel in zip(axes, panels(points), strict=True):
        ax.set_title(panel.title, fontsize=10, loc="left")
        draw_panel(ax, panel)
    for ax in axes[3:]:
        ax.set_xlabel("step")
    figure.suptitle(str(metrics.parent.resolve().name))
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_figure(temporary, dpi=100)
    temporary.replace(path)
    figure.clear()
    gc.collect()  # a figure is full of cycles: left to chance, dozens of canvases are kept


def read_points(metrics: Path) -> Points:
    """Read the metrics of a metrics.jsonl."""
    points: Points = {}
    for line in read_lines(metrics):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                steps, values = points.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return points


def panels(points: Points) -> list[Panel]:
    """Return the panels of curves.png: losses, gradients, latents and learning rate."""
    losses = {key: p for key, p in points.items() if key.startswith("loss/")}
    total = {"loss/total": losses.pop("loss/total")} if "loss/total" in losses else {}
    gradients = {key: p for key, p in points.items() if key.startswith("grad_norm")}

    def only(key: str) -> Points:
        return {key: points[key]} if key in points else {}

    return [
        Panel("loss, total", total),
        Panel("loss, its terms", losses, log=True),
        Panel("gradient norm, before clipping", gradients, log=True),
        Panel("latents: spread over samples", only("latent_std"), least=0),
        Panel("latents: directions in use", only("latent_rank"), least=0),
        Panel("learning rate", only("learning_rate"), least=0),
    ]


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel without its title; a logarithmic one shows only values above zero."""
    axes.grid(alpha=0.25)
    for key, (steps, values) in panel.points.items():
        label = key.removeprefix("loss/").removeprefix("grad_norm/").replace("grad_norm", "all")
        style = {"linewidth": 3.5, "color": "0.8", "zorder": 1} if label == "all" else {"linewidth": 1.1}
        axes.plot(steps, values, label=label, **style)
    if panel.log and any(value > 0 for _, values in panel.points.values() for value in values):
        axes.set_yscale("log", nonpositive="mask")
    elif panel.least is not None and panel.points:
        axes.set_ylim(bottom=panel.least)
    if len(panel.points) > 1:
        axes.legend(fontsize=8, frameon=False)
    if not panel.points:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="grey")
