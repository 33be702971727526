"""unilatent evaluate"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import Outputs, in_shared_folder, refuse_overlap, single_file
from .command import Record, examples
from .options import (
    BatchSize,
    CLIPWeights,
    DecoderSolver,
    DecoderSteps,
    DenoiseToZero,
    Device,
    DINOv2Weights,
    EvaluationFolder,
    GivenContext,
    GivenFrames,
    GuidanceInterval,
    GuidanceNorm,
    GuidanceScale,
    I3DWeights,
    InceptionWeights,
    Labels,
    LPIPSWeights,
    NumReference,
    OptionalModel,
    Precision,
    Prompt,
    Prompts,
    PropertyOption,
    Reference,
    RestartInterval,
    Restarts,
    Seed,
    SolverOption,
    Steps,
    check_decoder_settings,
    check_restarts,
    sampling_settings,
)
from .running import (
    RESUMES,
    data_of,
    evaluation_folder,
    find_run_folder,
    for_evaluation,
    join_processes,
    leave_stopped,
    load,
    make_folder,
    option_name,
    precision_of,
    print_notes,
    progress_of,
    splits_for,
)

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation, Evaluator

PAGE = 2**20
"""Bytes of a report, about."""


@examples(
    "unilatent evaluate runs/digits --num 5000",
    "unilatent evaluate runs/mine --metrics fid,kid --num 50000",
    "unilatent evaluate runs/digits --steps 10 --report digits.html",
    "unilatent evaluate --samples samples.npz --reference my_images --metrics fid",
    "unilatent evaluate --compare runs/a runs/b",
)
def run(
    model: OptionalModel = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Comma-separated metrics, e.g. fid,kid,psnr [default: all that need no download]."),
    ] = None,
    num: Annotated[
        int,
        typer.Option("--num", "--num-samples", "-n", help="New samples to generate; 0 measures no generation.", min=0),
    ] = 1000,
    num_held_out: Annotated[
        int | None, typer.Option(help="Held-out samples to reconstruct [default: all].", min=1)
    ] = None,
    num_reference: NumReference = 50_000,
    reference: Reference = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Samples to evaluate: a .npz (arr_0), a folder or zip of PNG [default: new ones of MODEL]."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Where the run's data are now, if they moved (data.path); for a model folder: real samples, "
                          "all of which are reconstructed and compared with."),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    property: PropertyOption = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_norm: GuidanceNorm = None,
    steps: Steps = None,
    solver: SolverOption = None,
    restarts: Restarts = None,
    restart_interval: RestartInterval = None,
    denoise_to_zero: DenoiseToZero = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    inception_weights: InceptionWeights = None,
    lpips_weights: LPIPSWeights = None,
    i3d_weights: I3DWeights = None,
    dinov2: DINOv2Weights = None,
    clip: CLIPWeights = None,
    given_frames: GivenFrames = None,
    given_context: GivenContext = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Only compare two earlier evaluations: JSON files, or runs (the newest of each)."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write a report: one self-contained page (.html), or Markdown (.md).")
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
    out: EvaluationFolder = None,
) -> Record | None:  # fmt: skip
    """Measure reconstruction and generation.

    Every number is stored with its complete protocol. After a stop, the same command resumes.
    """
    if compare is not None:
        if model is not None:
            raise ValueError(f"MODEL: {model} is given beside --compare, which takes two evaluations; leave one out")
        return _compare(*compare)
    if model is None and samples is None:
        raise ValueError("MODEL: missing; give a run or a model folder, or --samples, or --compare A B")
    if report is not None and model is None:
        raise ValueError("--report: is about a model; give MODEL as well")
    from ..evaluation.evaluate import EvaluationRequest, Evaluator, Interrupted
    from ..evaluation.reference import find_reference, find_samples, modality_for
    from ..evaluation.report import check_report, report_names
    from ..listings import Listings
    from ..signals import StopRequest

    processes = join_processes(device)
    reports: Outputs | None = None

    def open_report(path: Path) -> None:
        nonlocal reports
        check_report(path)
        reports = single_file(path, "evaluate", [samples, reference, data], field="--report")
        reports.check(*report_names(path))

    if report is not None:
        processes.on_main(lambda: open_report(report))
    network = None if model is None else load(model, device, processes)
    listings = Listings(processes)
    chosen = precision_of(precision, network, processes)
    modality = network.modality if network is not None else modality_for(samples or Path(), listings)
    of_metrics = {
        "inception_weights": inception_weights, "lpips_weights": lpips_weights, "i3d_weights": i3d_weights,
        "dinov2": dinov2, "clip": clip, "given_frames": given_frames, "given_context": given_context,
    }  # fmt: skip
    modality = for_evaluation(modality, of_metrics)
    run_folder = find_run_folder(model)
    folder = processes.from_main(lambda: evaluation_folder(out, run_folder))
    processes.on_main(lambda: refuse_overlap(folder, [samples, reference, data, *data_of(model)]))
    request = EvaluationRequest(
        metrics=tuple(key.strip() for key in metrics.split(",")) if metrics else (),
        num_samples=num, num_reference=num_reference, num_held_out=num_held_out, seed=seed, batch_size=batch_size,
        precision=chosen,
    )  # fmt: skip
    settings = processes.from_main(
        lambda: sampling_settings(
            labels=labels, prompt=prompt, prompts=prompts, property=property, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, guidance_norm=guidance_norm, steps=steps, solver=solver,
            restarts=restarts, restart_interval=restart_interval, denoise_to_zero=denoise_to_zero,
            decoder_solver=decoder_solver, decoder_steps=decoder_steps,
        )
    )  # fmt: skip
    check_decoder_settings(network, settings)
    check_restarts(network, settings)
    started = time.perf_counter()
    with progress_of(quiet=not processes.is_main) as progress, StopRequest() as stop:
        splits = splits_for(modality, model, data, listings) if network is not None else None
        evaluator = Evaluator(
            network, splits, folder / "records", request, modality=modality,
            samples=None if samples is None else find_samples(modality, str(samples), listings),
            reference=None if reference is None else find_reference(modality, reference, listings),
            processes=processes, progress=progress,
            stop=lambda: stop.received is not None,
            sources={
                option_name(name): None if value is None else str(value)
                for name, value in {"data": data, "reference": reference, "samples": samples, **of_metrics}.items()
            }, **settings,
        )  # fmt: skip
        if processes.is_main:
            sets = filter(None, (evaluator.external_samples, evaluator.reference))
            print_notes([*(line for compared in sets for line in compared.notes), *evaluator.notes])
        processes.on_main(lambda: in_shared_folder(make_folder(folder), "evaluate").check(_file_name(evaluator)))
        try:
            evaluation = evaluator.run()
        except Interrupted as unfinished:
            leave_stopped(stop, f"{unfinished} are unfinished, completed shards are stored", RESUMES, processes)
    seconds = time.perf_counter() - started
    source, written = model or str(samples), list[Record]()
    processes.on_main(lambda: written.append(_finish(evaluator, evaluation, folder, source, report, reports, seconds)))
    processes.leave()
    return next(iter(written), None)


def _file_name(evaluator: Evaluator) -> str:
    return f"evaluation-{evaluator.fingerprint[:12]}-{evaluator.identity[:8]}.json"


def _finish(
    evaluator: Evaluator,
    evaluation: Evaluation,
    folder: Path,
    source: str,
    report: Path | None,
    reports: Outputs | None,
    seconds: float,
) -> Record:
    """Print the table, write the file and the report; return what the file holds."""
    from ..evaluation.table import table, write_evaluation
    from ..files import read_json
    from ..tables import show

    if not evaluation.numbers:
        missing = f"{', '.join(evaluation.missing)} cannot" if evaluation.missing else "nothing can"
        raise ValueError(
            f"--metrics: {missing} be measured on these data; reconstructions need the run's held-out data, KID, "
            "precision and classifiers need samples in the reference, fdr needs held-out images or more of the "
            "reference's, all but one need at least two samples"
        )
    name = f"{Path(source).resolve().name}, {evaluator.fingerprint[:12]}"
    path = folder / _file_name(evaluator)
    with in_shared_folder(folder, "evaluate").writing() as new:
        about = {"model": source, "fingerprint": evaluator.fingerprint}
        write_evaluation(evaluation, new / path.name, about, seconds)
    show(table(evaluation.numbers, name))
    if evaluation.missing:
        print(f"not measured, the data do not allow it: {', '.join(evaluation.missing)}", file=sys.stderr)
    print(f"all numbers with their protocols: {path}")
    if report is not None and reports is not None:
        from ..evaluation.report import write_report

        with reports.writing(PAGE) as new:
            write_report(new / report.name, evaluator, evaluation, name, source=source)
        print(f"report: {report}")
    return {"file": path, "report": report, **read_json(path, "evaluate again")}


def _compare(a: Path, b: Path) -> Record:
    from rich.table import Table

    from ..evaluation.comparison import compare, evaluation_at, outdated, read_evaluation, unshared
    from ..evaluation.table import as_json, format_number
    from ..tables import marked, show

    sources = a, b
    a, b = evaluation_at(a), evaluation_at(b)
    metrics_a, metrics_b = read_evaluation(a), read_evaluation(b)
    for source, path in zip(sources, (a, b), strict=True):
        if outdated(source, path):
            print(f"warning: {path} is of other weights than {source} has now; evaluate it again", file=sys.stderr)
    comparisons = compare(metrics_a, metrics_b)
    if all(comparison.differences for comparison in comparisons):
        first = comparisons[0]
        raise ValueError(f"compare: {first.a.row.key}: {first.verdict}; evaluate both the same way")
    table = Table("metric", f"A: {a}", f"B: {b}", "verdict")
    for comparison in comparisons:
        cells = [
            "\n".join([format_number(measured.row.value), *marked(measured.protocol.cautions())])
            for measured in (comparison.a, comparison.b)
        ]
        table.add_row(comparison.a.row.name, *cells, comparison.verdict)
    show(table)
    print("one number of each: a small difference may be that of other seeds (`unilatent sweep` trains several)")
    only = {"A": unshared(metrics_a, metrics_b), "B": unshared(metrics_b, metrics_a)}
    for name, unpaired in only.items():
        if unpaired:
            print(f"only in {name}, not compared: {', '.join(measured.key for measured in unpaired)}")
    rows = [{"metric": c.a.row.key, "a": as_json(c.a), "b": as_json(c.b), "verdict": c.verdict} for c in comparisons]
    return {"a": a, "b": b, "compared": rows,
            "only": {name: [m.key for m in unpaired] for name, unpaired in only.items()}}  # fmt: skip
