"""unilatent runs"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import wide


def run(
    folder: Annotated[Path, typer.Argument(help="Where to look, at any depth; or one run.")] = Path("runs"),
    plot: Annotated[bool, typer.Option("--plot", help="Also draw curves.png into each run folder.")] = False,
    all_finished: Annotated[
        bool, typer.Option("--all-finished", help="Exit code 1 unless every one of them is finished; for scripts.")
    ] = False,
) -> None:
    """List runs with their state, last numbers and alarms."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..training.curves import draw_curves
    from ..training.listing import find_runs

    found = find_runs(folder)
    if not found:
        raise ValueError(f"{folder}: no runs in it; give the folder that holds them")
    table = Table("run", "state", "step", "epoch", "loss", "latent std", "rank", "alarms", box=SIMPLE_HEAD)
    for item in found:
        values = [item.metrics.get(key) for key in ("epoch", "loss/total", "latent_std", "latent_rank")]
        numbers = [f"{value:.4g}" if isinstance(value, int | float) else "-" for value in values]
        step = f"{item.step:,}" + (f" / {item.steps:,}" if item.steps else "")
        table.add_row(str(item.folder), item.state, step, *numbers, ", ".join(item.alarms) or "-")
    wide(Console()).print(table)
    for item in found if plot else ():
        draw_curves(item.folder / "metrics.jsonl", item.folder / "curves.png")
        print(f"drawn: {item.folder / 'curves.png'}")
    if all_finished and any(item.state != "finished" for item in found):
        raise typer.Exit(1)
