"""unilatent sweep"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import EndedWith, Record, examples
from .options import Overrides, Preset
from .running import leave_stopped, make_folder, progress_of

if TYPE_CHECKING:
    from ..training.config import RunConfig


@examples(
    "unilatent sweep digits method.flow_weight=0.1,0.2,0.4 --seeds 2 --out sweep",
    "unilatent sweep digits --ablate gradient,weights --out ablations",
    "unilatent sweep digits --ablate gradient --dry-run",
)
def run(
    preset: Preset,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs, sweep.json, table.md and sweep.png.")] = Path("sweep"),
    ablate: Annotated[
        str | None,
        typer.Option(help="Comma-separated ablations of the method's paper, e.g. gradient,weights,norm,noise."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each setting, with seeds 0, 1, ...", min=1)] = 3,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated metrics to compare [default: the first of each kind].")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time [default: cores / training.threads; 1 with a GPU].", min=1)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, train nothing.")] = False,
) -> Record:
    """Train and compare settings over several seeds.

    OVERRIDES may have several values, KEY=V1,V2,...: all combinations are trained. --ablate takes the settings that the
    method's paper varied, and prints its numbers and their direction beside ours. Runs that are finished are skipped:
    after a stop, the same command goes on. Runs are compared only where the protocols of their numbers agree.
    """
    from rich.table import Table

    from ..analysis import sweeps
    from ..evaluation.evaluate import choose_metrics
    from ..files import write_json, write_text
    from ..registry import find
    from ..signals import StopRequest
    from ..tables import show
    from .train import read_run

    fixed, axes = sweeps.split_grid(overrides or [])
    if any(text.partition("=")[0].strip() == "seed" for text in (*fixed, *axes)):
        raise ValueError("seed: is set by --seeds; leave it out")
    base = read_run(preset, fixed)
    if not axes and not ablate:
        raise ValueError("sweep: nothing varies; give --ablate NAMES, or an override with several values: KEY=V1,V2")
    if not base.training.evaluate_samples:
        raise ValueError(
            "training.evaluate_samples: 0, but a sweep compares evaluations; give training.evaluate_samples=500"
        )
    wanted = tuple(key.strip() for key in metrics.split(",")) if metrics else ()
    modality = find("modalities", base.modality.name)(base.modality)
    choose_metrics(modality, wanted)
    measured = base.training.evaluate_metrics or [key for m in choose_metrics(modality, ()) for key in m.gives]
    if lacking := [key for key in wanted if key not in measured]:
        raise ValueError(
            f"--metrics: {lacking[0]!r} is not measured in these runs; name what they measure: "
            f"training.evaluate_metrics=[{','.join(wanted)}]"
        )
    cells = [sweeps.PRESET] if ablate else []
    if ablate:
        cells += sweeps.ablation_cells(base, [name.strip() for name in ablate.split(",")])
    if axes:
        cells += sweeps.grid_cells(axes)
    runs = []
    for seed in range(seeds):
        for cell in cells:  # a setting that makes no sense is refused before any run
            config = read_run(preset, [*fixed, *cell.overrides, f"seed={seed}"])
            runs.append(sweeps.SweepRun(cell, seed, out / cell.name / f"seed-{seed}", config))
            runs[-1].refuse_other()
    print(sweeps.describe(runs))
    if dry_run:
        planned = {str(each.folder): [*fixed, *each.cell.overrides, f"seed={each.seed}"] for each in runs}
        for folder, settings in planned.items():
            print(f"{folder}: {' '.join(settings)}")
        return {"runs": planned}
    make_folder(out)
    waiting = sum(not each.is_finished for each in runs)
    with progress_of(transient=True) as advance, StopRequest() as stop:
        advance("runs", 0, waiting)
        failures = sweeps.run_all(
            runs, preset, fixed, jobs or _jobs(base), lambda: stop.received is not None,
            lambda _: advance("runs", 1, waiting),
        )  # fmt: skip
        if stop.received is not None:
            leave_stopped(stop, sweeps.describe(runs), "the same command goes on")
    for failure in failures:
        print(f"failed: {failure.run.folder} (exit code {failure.code}): {failure.line}")
    result = sweeps.collect(runs, wanted)
    rows = sweeps.table_of(result)
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    show(table)
    for line in result.left_out:
        print(f"not compared: {line}")
    record = {"out": out, **sweeps.plain(result), "failed": {str(f.run.folder): f.line for f in failures}}
    write_json(out / "sweep.json", sweeps.plain(result))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    write_text(out / "table.md", "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]) + "\n")
    sweeps.draw_sweep(result, out / "sweep.png")
    print(f"written: sweep.json, table.md and sweep.png in {out}")
    if failures:
        raise EndedWith(record)
    return record


def _jobs(base: RunConfig) -> int:
    import torch

    if torch.cuda.is_available() and base.training.device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (base.training.threads or cores))
