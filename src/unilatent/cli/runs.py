"""unilatent runs"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    folder: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path("runs"),
) -> None:
    """List runs with their state."""
    from rich.console import Console
    from rich.table import Table

    from ..training.listing import find_runs

    found = find_runs(folder)
    if not found:
        raise ValueError(f"{folder}: no runs in it; give the folder that holds them")
    table = Table("run", "preset", "state", "step", "epoch", "loss")
    for item in found:
        loss, epoch = item.metrics.get("loss/total"), item.metrics.get("epoch")
        numbers = [f"{value:.4g}" if isinstance(value, int | float) else "-" for value in (epoch, loss)]
        table.add_row(str(item.folder), item.preset, item.state, f"{item.step:,}", *numbers)
    Console().print(table)
