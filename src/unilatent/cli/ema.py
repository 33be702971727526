"""unilatent ema"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..outputs import Outputs
from ..plain_text import count_of
from .command import Record, examples
from .running import data_of, load

LARGE = 0.05
"""Relative error of the EMA profile above which a warning is printed."""


@examples("unilatent ema runs/digits --sigma-rel 0.1 --out model")
def run(
    run: Annotated[Path, typer.Argument(help="A run that was trained with training.ema_profiles.", metavar="RUN")],
    sigma_rel: Annotated[
        float, typer.Option(help="EMA length relative to the training time: 0.05 is short, 0.2 is long.")
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="Step of a snapshot at which the EMA ends [default: the last].", min=1)
    ] = None,
) -> Record:
    """Compute EMA weights of another length after training.

    Combines the snapshots in RUN/ema (post-hoc EMA, Karras et al. 2024).
    """
    from ..runs.snapshots import EMASnapshots

    outputs = Outputs(out, "ema", data_of(str(run)))
    snapshots = EMASnapshots(run, step)
    model = load(str(run), "cpu")
    error = snapshots.apply(model, sigma_rel)
    with outputs.writing(4 * model.num_parameters) as new:
        model.save_pretrained(new)
    steps = sorted({stored.path.name for stored in snapshots.stored})
    print(f"{out}: step {snapshots.step}, sigma_rel {sigma_rel:g}, from {count_of(len(steps), 'snapshot')}; "
          f"profile error {100 * error:.2g} %")  # fmt: skip
    if error > LARGE:
        print(
            "warning: this error is large; use a length nearer to training.ema_profiles, or train with more snapshots",
            file=sys.stderr,
        )
    return {"out": out, "step": snapshots.step, "sigma_rel": sigma_rel, "snapshots": len(steps), "profile_error": error}
