"""unilatent evaluate"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import BatchSize, Device, Precision, Seed, autocast, load, make_folder, progress_of

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation, Evaluator


def run(
    model: Annotated[
        str | None, typer.Argument(help="A run folder, a model folder, or a hub id (owner/name).", metavar="MODEL")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated keys, e.g. fid,kid,psnr; default: all without a download.")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="New samples; 0 leaves out generation.", min=0)] = 1000,
    num_held_out: Annotated[
        int | None, typer.Option(help="Held-out samples to reconstruct; default: all.", min=1)
    ] = None,
    num_reference: Annotated[
        int, typer.Option(help="Real samples that distances are taken to, evenly over the data.", min=2)
    ] = 50_000,
    reference: Annotated[
        str | None,
        typer.Option(help="A folder, zip or .npz (arr_0, or mu and sigma) in place of the run's training data."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="data.path of the run, where it has moved; for a model folder: its data.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", "--label", help='Classes, e.g. "3" or "0-9"; default: evenly over all.')
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.", min=0)] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Guide only at times between the two, t = 1 being noise.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Solver steps.", min=1)] = None,
    solver: Annotated[str | None, typer.Option(help="See `unilatent sample --help`.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of earlier evaluations to hold against each other.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write one self-contained page (.html), or Markdown with pictures (.md).")
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the numbers and records [default: RUN/eval, or ./evaluation]")
    ] = None,
) -> None:
    """Measure reconstruction and generation.

    Every number is stored with its whole protocol. Stopped, the same line goes on.
    """
    if compare is not None:
        _compare(*compare)
        return
    if model is None:
        raise ValueError("MODEL: missing; give a run or a model folder, or --compare A.json B.json")
    from ..evaluation.evaluate import Evaluator, Interrupted, Request
    from ..evaluation.reference import find_reference, splits_of
    from ..evaluation.report import check_report
    from ..training.processes import Processes
    from ..training.signals import StopRequest

    if report is not None:
        check_report(report)
    network = load(model, device)
    processes = Processes(str(network.device))
    run_folder = Path(model) if (Path(model) / "config.yaml").is_file() else None
    folder = out or (run_folder / "eval" if run_folder else Path("evaluation"))
    splits = splits_of(network, run_folder, data)
    request = Request(
        metrics=tuple(key.strip() for key in metrics.split(",")) if metrics else (),
        num_samples=num, num_reference=num_reference, num_held_out=num_held_out, seed=seed, batch_size=batch_size,
        precision=precision,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "num_inference_steps": steps,
        "solver": solver, "labels": labels,
    }  # fmt: skip
    started = time.perf_counter()
    with progress_of(quiet=not processes.is_main) as progress, StopRequest() as stop:
        evaluator = Evaluator(
            network, splits, folder / "records", request,
            reference=None if reference is None else find_reference(network.modality, reference),
            processes=processes, progress=progress, autocast=lambda: autocast(network.device, precision),
            stop=lambda: stop.received is not None, **settings,
        )  # fmt: skip
        processes.on_main(lambda: make_folder(folder))
        try:
            evaluation = evaluator.run()
        except Interrupted as what:
            print(f"stopped while making {what}: finished pieces are kept, the same command goes on", file=sys.stderr)
            processes.leave()
            raise typer.Exit(130) from None
    processes.on_main(lambda: _finish(evaluator, evaluation, folder, model, report, time.perf_counter() - started))
    processes.leave()


def _finish(
    evaluator: Evaluator, evaluation: Evaluation, folder: Path, model: str, report: Path | None, seconds: float
) -> None:
    """The table, the file, the page."""
    from rich.console import Console

    from ..evaluation.table import table, write

    name = f"{Path(model).resolve().name}, {evaluator.fingerprint[:12]}"
    path = folder / f"evaluation-{evaluator.fingerprint[:12]}-{evaluator.identity[:8]}.json"
    write(evaluation, path, {"model": model, "fingerprint": evaluator.fingerprint}, seconds)
    Console().print(table(evaluation.numbers, name))
    print(f"every number with its protocol: {path}")
    if report is not None:
        from ..evaluation.report import write_report

        files = write_report(report, evaluator, evaluation, name, source=model)
        print(f"report: {files[-1]}")


def _compare(a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparison import compare, read_evaluation
    from ..evaluation.table import number

    found = compare(read_evaluation(a), read_evaluation(b))
    if all(comparison.differences for comparison in found):
        raise ValueError(f"compare: {found[0].a.row.key}: {found[0].verdict}; evaluate both the same way")
    shown = Table("measure", f"A: {a}", f"B: {b}", "verdict")
    for comparison in found:
        x, y = comparison.a.row, comparison.b.row
        shown.add_row(x.name, number(x.value), number(y.value), comparison.verdict)
    Console().print(shown)
