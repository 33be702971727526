"""unilatent ema"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import load, make_folder

LARGE = 0.05
"""Relative error of a profile from which it is a warning."""


def run(
    run: Annotated[Path, typer.Argument(help="A run trained with training.ema_profiles.", metavar="RUN")],
    sigma_rel: Annotated[float, typer.Option(help="Relative length of the average: 0.05 is short, 0.2 long.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    step: Annotated[int | None, typer.Option(help="A snapshot's step; default: the last.", min=1)] = None,
) -> None:
    """Weights averaged over another length, from one run.

    Put together from the snapshots in RUN/ema (Karras et al. 2024).
    """
    from ..training.snapshots import Snapshots

    snapshots = Snapshots(run, step)
    model = load(str(run), "cpu")
    error = snapshots.apply(model, sigma_rel)
    model.save_pretrained(make_folder(out))
    steps = sorted({stored.path.name for stored in snapshots.stored})
    print(f"{out}: step {snapshots.step}, sigma_rel {sigma_rel:g}, from {len(steps)} snapshots; "
          f"profile met to {100 * error:.2g} %")  # fmt: skip
    if error > LARGE:
        print("warning: that is far off; lengths near those in training.ema_profiles, and more snapshots, do better")
