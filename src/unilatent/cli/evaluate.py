"""unilatent evaluate"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    STOPPED,
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Precision,
    Seed,
    autocast,
    decoder_settings,
    load,
    make_folder,
    progress_of,
)

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation, Evaluator
    from ..modalities.base import Modality


def run(
    model: Annotated[
        str | None, typer.Argument(help="A run folder, a model folder, or a hub id (owner/name).", metavar="MODEL")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated keys, e.g. fid,kid,psnr; default: all without a download.")
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "--num-samples", "-n", help="New samples; 0 leaves out generation.", min=0)
    ] = 1000,
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
    samples: Annotated[
        Path | None,
        typer.Option(help="Judge these, made elsewhere, in place of new ones: a .npz (arr_0), a folder or zip of PNG."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="data.path of the run, where it has moved; for a model folder: real samples, all of which "
                          "are reconstructed and held against."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", "--label", help='Classes, e.g. "3" or "0-9"; default: evenly over all.')
    ] = None,
    property: Annotated[
        str | None, typer.Option("--property", help="A number to ask for, as in `sample`; default: real samples'.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.", min=0)] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Guide only at times between the two, t = 1 being noise.")
    ] = None,
    guidance_norm: Annotated[str | None, typer.Option(help="norm_first or guidance_first.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Solver steps.", min=1)] = None,
    solver: Annotated[str | None, typer.Option(help="See `unilatent sample --help`.")] = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    inception_weights: Annotated[
        str | None, typer.Option(help="A local file with the FID Inception network; default: downloaded once.")
    ] = None,
    lpips_weights: Annotated[
        str | None, typer.Option(help="A local file with LPIPS's VGG16; default: downloaded once.")
    ] = None,
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
) -> None:  # fmt: skip
    """Measure reconstruction and generation.

    Every number is stored with its whole protocol. Stopped, the same line goes on.
    """
    if compare is not None:
        _compare(*compare)
        return
    if model is None and samples is None:
        raise ValueError("MODEL: missing; give a run or a model folder, or --samples, or --compare A.json B.json")
    if report is not None and model is None:
        raise ValueError("--report: shows what a model does; give MODEL as well")
    from ..evaluation.evaluate import Evaluator, Interrupted, Request
    from ..evaluation.reference import find_reference, find_samples, modality_for, splits_of
    from ..evaluation.report import check_report
    from ..training.processes import Processes
    from ..training.signals import StopRequest

    if report is not None:
        check_report(report)
    with autocast("cpu", precision):
        network = None if model is None else load(model, device)
    processes = Processes(str(network.device) if network is not None else device)
    if network is not None:
        network.to(processes.device)  # each of several its own
    modality = network.modality if network is not None else modality_for(samples or Path())
    modality = with_weights(modality, {"inception_weights": inception_weights, "perceptual_weights": lpips_weights})
    run_folder = Path(model) if model is not None and (Path(model) / "config.yaml").is_file() else None
    folder = out or (run_folder / "eval" if run_folder else Path("evaluation"))
    request = Request(
        metrics=tuple(key.strip() for key in metrics.split(",")) if metrics else (),
        num_samples=num, num_reference=num_reference, num_held_out=num_held_out, seed=seed, batch_size=batch_size,
        precision=precision,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_norm": guidance_norm,
        "num_inference_steps": steps, "solver": solver, "labels": labels, "properties": property,
        **decoder_settings(network, decoder_solver, decoder_steps),
    }  # fmt: skip
    started = time.perf_counter()
    with progress_of(quiet=not processes.is_main) as progress, StopRequest() as stop:
        evaluator = Evaluator(
            network, splits_of(modality, run_folder, data) if network is not None else None, folder / "records",
            request, modality=modality, samples=None if samples is None else find_samples(modality, str(samples)),
            reference=None if reference is None else find_reference(modality, reference),
            processes=processes, progress=progress, autocast=lambda: autocast(processes.device, precision),
            stop=lambda: stop.received is not None,
            sources={
                "--data": data, "--reference": reference, "--samples": None if samples is None else str(samples),
                "--inception-weights": inception_weights, "--lpips-weights": lpips_weights,
            }, **settings,
        )  # fmt: skip
        processes.on_main(lambda: make_folder(folder))
        try:
            evaluation = evaluator.run()
        except Interrupted as what:
            if processes.is_main:
                print(f"stopped at {what}: finished pieces are kept, the same command goes on", file=sys.stderr)
            processes.leave(STOPPED)
            raise typer.Exit(STOPPED) from None
    seconds = time.perf_counter() - started
    processes.on_main(lambda: _finish(evaluator, evaluation, folder, model or str(samples), report, seconds))
    processes.leave()


def with_weights(modality: Modality, files: dict[str, str | None]) -> Modality:
    """The modality with other evaluation settings; ValueError where it has none of that name."""
    given = {key: value for key, value in files.items() if value is not None}
    for key in given:
        if key not in type(modality.config).model_fields:
            raise ValueError(f"--{key.replace('_', '-')}: this modality has no such network; leave it out")
    return type(modality)(modality.config.model_copy(update=given))


def _finish(
    evaluator: Evaluator, evaluation: Evaluation, folder: Path, source: str, report: Path | None, seconds: float
) -> None:
    """The table, the file, the page."""
    from rich.console import Console

    from ..evaluation.table import table, write

    if not evaluation.numbers:
        raise ValueError(
            f"--metrics: {', '.join(evaluation.missing) or 'none'} can be measured of this; reconstructions need the "
            "run's held-out data, KID, precision and the judges need samples in the reference, all but one need two"
        )
    name = f"{Path(source).resolve().name}, {evaluator.fingerprint[:12]}"
    path = folder / f"evaluation-{evaluator.fingerprint[:12]}-{evaluator.identity[:8]}.json"
    write(evaluation, path, {"model": source, "fingerprint": evaluator.fingerprint}, seconds)
    Console().print(table(evaluation.numbers, name))
    if evaluation.missing:
        print(f"not measured, the data cannot show it: {', '.join(evaluation.missing)}", file=sys.stderr)
    print(f"every number with its protocol: {path}")
    if report is not None:
        from ..evaluation.report import write_report

        files = write_report(report, evaluator, evaluation, name, source=source)
        print(f"report: {files[-1]}")


def _compare(a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparison import compare, read_evaluation, unshared
    from ..evaluation.table import number

    own, other = read_evaluation(a), read_evaluation(b)
    found = compare(own, other)
    if all(comparison.differences for comparison in found):
        raise ValueError(f"compare: {found[0].a.row.key}: {found[0].verdict}; evaluate both the same way")
    shown = Table("measure", f"A: {a}", f"B: {b}", "verdict")
    for comparison in found:
        cells = [
            "\n".join([number(measured.row.value), *measured.protocol.cautions()])
            for measured in (comparison.a, comparison.b)
        ]
        shown.add_row(comparison.a.row.name, *cells, comparison.verdict)
    Console().print(shown)
    for name, alone in (("A", unshared(own, other)), ("B", unshared(other, own))):
        if alone:
            print(f"only in {name}, not compared: {', '.join(measured.key for measured in alone)}")
