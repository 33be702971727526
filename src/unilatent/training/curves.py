"""curves.png: what a run logged, against its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .journal import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[list[int], list[float]]]
SIDE = (13, 7.5)
"""Inches."""


def draw_curves(metrics: Path, path: Path) -> None:
    """One picture of a metrics.jsonl; nothing is written while there are no two lines in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = read_points(metrics)
    if not points or len(next(iter(points.values()))[0]) < 2:
        return
    figure = Figure(figsize=SIDE, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True).flatten()
    losses = {key: p for key, p in points.items() if key.startswith("loss/")}
    total = {"loss/total": losses.pop("loss/total")} if "loss/total" in losses else {}
    _lines(panels[0], "loss, total", total)
    _lines(panels[1], "loss, its terms", losses, log=True)
    _lines(panels[2], "gradient norm, before clipping", _starting(points, "grad_norm"), log=True)
    _lines(panels[3], "latents: spread over samples", {k: points[k] for k in points if k == "latent_std"}, least=0)
    _lines(panels[4], "latents: directions in use", {k: points[k] for k in points if k == "latent_rank"}, least=0)
    _lines(panels[5], "learning rate", {k: points[k] for k in points if k == "learning_rate"}, least=0)
    for panel in panels[3:]:
        panel.set_xlabel("step")
    figure.suptitle(str(metrics.parent.resolve().name))
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_figure(temporary, dpi=100)
    temporary.replace(path)


def read_points(metrics: Path) -> Points:
    """Number -> its steps and values."""
    points: Points = {}
    for line in read_lines(metrics):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                steps, values = points.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return points


def _starting(points: Points, prefix: str) -> Points:
    return {key: p for key, p in points.items() if key.startswith(prefix)}


def _lines(panel: Axes, title: str, points: Points, log: bool = False, least: float | None = None) -> None:
    """One panel. A logarithmic one shows only what is above zero."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.grid(alpha=0.25)
    for key, (steps, values) in points.items():
        label = key.removeprefix("loss/").removeprefix("grad_norm/").replace("grad_norm", "all")
        whole = {"linewidth": 3.5, "color": "0.8", "zorder": 1} if label == "all" else {"linewidth": 1.1}
        panel.plot(steps, values, label=label, **whole)
    if log and any(value > 0 for _, values in points.values() for value in values):
        panel.set_yscale("log", nonpositive="mask")
    elif least is not None and points:
        panel.set_ylim(bottom=least)
    if len(points) > 1:
        panel.legend(fontsize=8, frameon=False)
    if not points:
        panel.text(0.5, 0.5, "not logged", ha="center", va="center", transform=panel.transAxes, color="grey")
