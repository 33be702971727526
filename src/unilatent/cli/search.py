"""unilatent search"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import refuse_overlap
from .command import Record, examples
from .options import (
    BatchSize,
    CLIPWeights,
    Data,
    DecoderSolver,
    DecoderSteps,
    Device,
    DINOv2Weights,
    EvaluationFolder,
    GuidanceInterval,
    GuidanceScale,
    I3DWeights,
    InceptionWeights,
    Labels,
    Model,
    NumReference,
    Precision,
    Prompt,
    Prompts,
    Reference,
    Seed,
    SolverOption,
    Steps,
    check_decoder_settings,
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
    precision_of,
    print_notes,
    progress_of,
    splits_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..evaluation.evaluate import EvaluatedMetric
    from ..evaluation.search import Objective, Search, SettingValue
    from ..methods.base import LatentModel
    from ..processes import Processes
    from ..runs.snapshots import EMASnapshots

STEPS = (5, 10, 15, 25, 50, 100)
LOWS, HIGHS = "0,0.1,0.2,0.3", "0.7,0.8,0.9,1"


@examples(
    "unilatent search runs/digits --over guidance_scale --metric frechet_pixels",
    "unilatent search runs/mine --over guidance_scale --metric fid --num 10000",
    "unilatent search runs/mine --over num_inference_steps --values 5,10,25,50",
    "unilatent search runs/mine --over ema --metric fid",
)
def run(
    model: Model,
    over: Annotated[
        str, typer.Option(help="guidance_scale, guidance_interval, num_inference_steps, decoder_steps or ema.")
    ],
    metric: Annotated[
        str,
        typer.Option(help="A metric of new samples: fid, fdr, frechet_pixels, ...; any metric over decoder_steps."),
    ] = "fid",
    method: Annotated[
        str | None,
        typer.Option(help="walk, golden or grid [default: grid with --values, for steps and intervals; else walk]."),
    ] = None,
    values: Annotated[str | None, typer.Option(help='Values of a grid, e.g. "1,1.5,2".')] = None,
    start: Annotated[
        float | None, typer.Option(help="First value of a walk [default: scale 1.5, ema 0.1, steps 25].")
    ] = None,
    step: Annotated[float | None, typer.Option(help="Step of a walk [default: scale 0.2, ema 0.02, steps 5].")] = None,
    low: Annotated[
        str | None, typer.Option(help=f"Lower end for golden; lower ends of intervals to try [default: {LOWS}].")
    ] = None,
    high: Annotated[
        str | None, typer.Option(help=f"Upper end for golden; upper ends of intervals to try [default: {HIGHS}].")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Length of interval at which golden ends [default: half a step].")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="New samples to generate for each value.", min=2)] = 1000,
    num_reference: NumReference = 50_000,
    reference: Reference = None,
    data: Data = None,
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    steps: Steps = None,
    solver: SolverOption = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    inception_weights: InceptionWeights = None,
    i3d_weights: I3DWeights = None,
    dinov2: DINOv2Weights = None,
    clip: CLIPWeights = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
    out: EvaluationFolder = None,
) -> Record | None:
    """Find the best sampling setting or EMA length.

    Every evaluated value is stored. After a stop, the same command resumes; other methods reuse stored values.
    """
    from ..evaluation.evaluate import EvaluationRequest, Evaluator, Interrupted, choose_metrics
    from ..evaluation.reference import find_reference
    from ..evaluation.search import AXES, DECODER, INTERVAL, OVER, Search
    from ..listings import Listings
    from ..runs.snapshots import EMASnapshots
    from ..sampling import split_settings
    from ..signals import StopRequest

    if over not in OVER:
        raise ValueError(f"--over: {over!r} is unknown; use one of {', '.join(OVER)}")
    processes = join_processes(device)
    settings = processes.from_main(
        lambda: sampling_settings(
            labels=labels, prompt=prompt, prompts=prompts, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, steps=steps, solver=solver, decoder_solver=decoder_solver,
            decoder_steps=decoder_steps,
        )
    )  # fmt: skip
    if settings.get(over) is not None:
        raise ValueError(f"--{over.replace('_', '-')}: is the setting to search over; leave it out")
    find_best = _method(over, method, values, start, step, low, high, tolerance)
    network = load(model, device, processes)
    of_metrics = {"inception_weights": inception_weights, "i3d_weights": i3d_weights, "dinov2": dinov2, "clip": clip}
    modality = for_evaluation(network.modality, of_metrics)
    check_decoder_settings(network, settings)
    if over == DECODER and network.stepped_decoder is None:
        raise ValueError(f"--over {over}: this model decodes in one pass; choose another")
    if over != DECODER and any(m.track != "generation" for m in choose_metrics(modality, [metric])):
        raise ValueError(
            f"--metric {metric}: measures reconstructions, which no sampling setting changes; choose another"
        )
    sampling, conditions = split_settings(network.config.sampling, settings)
    if over.startswith("guidance") and not len(network.conditions):
        raise ValueError(f"--over {over}: this model has no condition to guide by")
    if over == INTERVAL and sampling.guidance_scale == 1:
        raise ValueError(f"--over {over}: at guidance scale 1 no interval changes anything; give --guidance-scale 2")
    run_folder, listings = find_run_folder(model), Listings(processes)
    if over == "ema" and run_folder is None:
        raise ValueError(f"{model}: not a run folder; only a run stores EMA snapshots")
    snapshots = processes.from_main(lambda: EMASnapshots(run_folder)) if over == "ema" and run_folder else None
    folder = processes.from_main(lambda: evaluation_folder(out, run_folder))
    processes.on_main(lambda: refuse_overlap(folder, [reference, data, *data_of(model)]))
    splits = splits_for(modality, model, data, listings)
    chosen = precision_of(precision, network, processes)
    request = EvaluationRequest(
        metrics=(metric,), num_samples=num, num_reference=num_reference, seed=seed, batch_size=batch_size,
        precision=chosen,
    )  # fmt: skip
    real = None if reference is None else find_reference(modality, reference, listings)
    if processes.is_main and real is not None:
        print_notes(real.notes)
    with progress_of(quiet=not processes.is_main) as progress, StopRequest() as stop:

        def evaluate(at: SettingValue) -> tuple[EvaluatedMetric, dict[str, Any]]:
            about: dict[str, Any] = {}
            if snapshots is not None:
                assert isinstance(at, float)
                about["profile_error"] = round(_apply(snapshots, network, at, processes), 6)
            else:
                settings[over] = int(at) if over in AXES and AXES[over].whole else at  # type: ignore[arg-type]
            evaluator = Evaluator(
                network, splits, folder / "search-records", request, modality=modality, reference=real,
                processes=processes, progress=lambda what, more, total: progress(f"{what} at {at}", more, total),
                stop=lambda: stop.received is not None,
                **settings,
            )  # fmt: skip
            if processes.is_main and not search.points:
                print_notes(evaluator.notes)
            measured = evaluator.run().find(metric)
            processes.wait()
            done = ["samples", "reconstructions"]
            if not over.startswith("guidance"):  # no guidance changes samples without a condition
                done.append("unconditional")
            processes.on_main(lambda: evaluator.clear(*done))
            return measured, about

        fixed = {key: value for key, value in sampling.plain().items() if key != over}
        requested = {key: value for key, value in request.plain().items() if key != "batch_size"}
        about = {
            "fingerprint": network.fingerprint(),
            "request": requested,
            "sampling": fixed,
            "conditions": conditions,
            "data": processes.from_main(lambda: splits and [splits.train.fingerprint, splits.held_out.fingerprint]),
            "reference": real and real.data_hash,
            "snapshots": snapshots and [[s.profile.end, s.length] for s in snapshots.stored],
        }
        processes.on_main(lambda: make_folder(folder))
        search = Search(over, metric, about, folder, evaluate, processes)
        try:
            find_best(search)
        except Interrupted as unfinished:
            leave_stopped(stop, f"{unfinished} are unfinished, completed shards are stored", RESUMES, processes)
    found: list[Record] = []
    processes.on_main(lambda: found.append(_finish(search, model, network.stepped_decoder is not None)))
    processes.leave()
    return next(iter(found), None)


def _apply(snapshots: EMASnapshots, network: LatentModel, sigma_rel: float, processes: Processes) -> float:
    """Give the model the EMA weights of a length, which the first process reads; return the error of their profile."""
    error = processes.from_main(lambda: snapshots.apply(network, sigma_rel))
    processes.same_weights(network)
    return error


def _method(
    over: str, method: str | None, values: str | None, start: float | None, step: float | None, low: str | None,
    high: str | None, tolerance: float | None,
) -> Callable[[Objective], None]:  # fmt: skip
    """The search method with these options; ValueError names an option that does not fit it."""
    from ..evaluation.search import AXES, INTERVAL, golden, grid, intervals, walk

    if over == INTERVAL:
        if method not in (None, "grid") or values or start or step:
            raise ValueError(f"--over {over}: tries every pair of --low and --high; leave the other options out")
        pairs = intervals(_numbers("--low", low or LOWS), _numbers("--high", high or HIGHS))
        return lambda objective: grid(objective, pairs)
    axis = AXES[over]
    method = method or ("grid" if values or axis.whole else "walk")
    takes = {"walk": ("start", "step"), "golden": ("low", "high", "tolerance"), "grid": ("values",)}
    if method not in takes:
        raise ValueError(f"--method: {method!r} is unknown; use {', '.join(takes)}")
    options = {"values": values, "start": start, "step": step, "low": low, "high": high, "tolerance": tolerance}
    for name, value in options.items():
        if value is not None and name not in takes[method]:
            raise ValueError(f"--{name}: is not an option of {method}; leave it out, or choose another --method")
    if method == "grid":
        default = ",".join(map(str, STEPS)) if axis.whole else ""
        if not (values or default):
            raise ValueError('--values: missing; give the values of the grid, e.g. --values "1,1.5,2"')
        chosen = _numbers("--values", values or default)
    elif method == "walk":
        step = axis.step if step is None else step
        chosen = [axis.start if start is None else start]
        if step <= 0 or (axis.whole and step != int(step)):
            raise ValueError(
                f"--step: {step:g} is not a step; give a {'whole number' if axis.whole else 'number'} above 0"
            )
    else:
        if axis.whole:
            raise ValueError(f"--method golden: {over} are whole numbers; use walk or grid")
        ends = [_numbers(f"--{name}", text or "") for name, text in (("low", low), ("high", high))]
        if any(len(end) != 1 for end in ends) or not ends[0] < ends[1]:
            raise ValueError("--low, --high: golden needs both ends of the interval, e.g. --low 1 --high 3")
        chosen = [ends[0][0], ends[1][0]]
        tolerance = axis.step / 2 if tolerance is None else tolerance
        if tolerance <= 0:
            raise ValueError(f"--tolerance: {tolerance:g} is never reached; give a number above 0")
    for value in chosen:
        if not axis.low <= value <= axis.high or (axis.whole and value != int(value)):
            option = {"grid": "--values", "walk": "--start", "golden": "--low, --high"}[method]
            kind = "whole numbers" if axis.whole else "numbers"
            raise ValueError(
                f"{option}: {value:g} is not a valid {over}; give {kind} from {axis.low:g} to {axis.high:g}"
            )
    methods: dict[str, Any] = {
        "grid": lambda objective: grid(objective, chosen),
        "walk": lambda objective: walk(objective, axis, chosen[0], step or 0),
        "golden": lambda objective: golden(objective, chosen[0], chosen[1], tolerance or 0),
    }
    return methods[method]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(
            f'{option}: {text!r} is not a list of numbers; separate them by commas, e.g. "1,1.5,2"'
        ) from None


def _finish(search: Search, model: str, stepped: bool) -> Record:
    """Print the table, draw the curve and print the command that uses the best value; return all of it.

    stepped: whether the decoder takes steps.
    """
    from rich.table import Table

    from ..evaluation.search import draw_search, format_setting
    from ..evaluation.table import format_number, format_parts
    from ..files import read_json
    from ..tables import show

    best = search.best
    table = Table(
        search.over, f"{search.metric} ({search.better} is better)", "", title=search.title, title_justify="left"
    )
    for point in sorted(search.points, key=lambda point: point.at if isinstance(point.at, tuple) else (point.at,)):
        spread = "" if point.spread is None else f" ± {format_number(point.spread)}"
        notes = ["best"] if point is best else []
        if "profile_error" in point.about:
            notes.append(f"profile error {100 * point.about['profile_error']:.2g} %")
        if point.parts:
            notes.append(format_parts(point.parts))
        table.add_row(format_setting(point.at), f"{format_number(point.value)}{spread}", ", ".join(notes))
    show(table)
    if search.at_the_end:
        print("the best value is at the end of the searched range: there may be a better one beyond it")
    image = search.path.with_suffix(".png")
    with search.outputs.writing() as new:
        draw_search(search, new / image.name)
    print(f"all values: {search.path}; curve: {image}")
    lines = _lines(search, shlex.quote(model), stepped)
    print("\n".join(lines))
    stored = read_json(search.path, "run the same command again")
    return {"file": search.path, "curve": image, "at_the_end": search.at_the_end, "commands": lines, **stored}


def _lines(search: Search, source: str, stepped: bool) -> list[str]:
    """Return the command lines that use the best value."""
    from ..evaluation.search import format_setting

    best = search.best
    if search.over == "ema":
        return [f"unilatent ema {source} --sigma-rel {format_setting(best.at)} --out model", "unilatent sample model"]
    fixed = {key: value for key, value in search.about["sampling"].items() if key in OPTIONS}
    fixed[search.over] = best.at
    if not fixed["restarts"]:
        del fixed["restarts"], fixed["restart_interval"]
    if not stepped:
        fixed = {key: value for key, value in fixed.items() if not key.startswith("decoder_")}
    line = [f"{OPTIONS[key]} {_spaced(value)}" for key, value in fixed.items()]
    return [f"unilatent sample {source} {' '.join(line)}"]


OPTIONS = {
    "solver": "--solver", "num_inference_steps": "--steps", "guidance_scale": "--guidance-scale",
    "guidance_interval": "--guidance-interval", "guidance_norm": "--guidance-norm",
    "restarts": "--restarts", "restart_interval": "--restart-interval",
    "decoder_solver": "--decoder-solver", "decoder_steps": "--decoder-steps",
}  # fmt: skip
"""Sampling settings -> options of `unilatent sample`."""


def _spaced(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(f"{part:.9g}" for part in value)
    return f"{value:.9g}" if isinstance(value, int | float) else str(value)
