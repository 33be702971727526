"""unilatent runs"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .command import EndedWith, Record, examples


@examples(
    "unilatent runs",
    "unilatent runs runs/digits --plot",
    "unilatent runs --all-finished || echo not yet",
)
def run(
    folder: Annotated[Path, typer.Argument(help="A folder to search at any depth, or a single run.")] = Path("runs"),
    plot: Annotated[bool, typer.Option("--plot", help="Also draw curves.png into each run folder.")] = False,
    all_finished: Annotated[
        bool, typer.Option("--all-finished", help="Exit with code 1 unless every run is finished, for scripts.")
    ] = False,
) -> Record:
    """List runs with their state, last metrics and alarms."""
    from rich.table import Table

    from ..runs.curves import draw_curves
    from ..runs.listing import find_runs
    from ..tables import show

    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: no runs in it; give the folder that holds them")
    table = Table("run", "state", "step", "epoch", "loss", "latent std", "rank", "alarms")
    for run_state in runs:
        values = [run_state.metrics.get(key) for key in ("epoch", "loss/total", "latent_std", "latent_rank")]
        numbers = [f"{value:.4g}" if isinstance(value, int | float) else "-" for value in values]
        step = f"{run_state.step:,}" + (f" / {run_state.steps:,}" if run_state.steps else "")
        table.add_row(str(run_state.folder), run_state.state, step, *numbers, ", ".join(run_state.alarms) or "-")
    show(table)
    for run_state in runs if plot else ():
        draw_curves(run_state.folder / "metrics.jsonl", run_state.folder / "curves.png")
        print(f"drawn: {run_state.folder / 'curves.png'}")
    record = {"runs": [{**asdict(run_state), "curves": plot} for run_state in runs]}
    if all_finished and any(run_state.state != "finished" for run_state in runs):
        raise EndedWith(record)
    return record
