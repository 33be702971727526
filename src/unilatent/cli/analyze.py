"""unilatent analyze"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import Outputs
from .command import Record, examples
from .options import MODEL_HELP, BatchSize, Data, Device, Precision, Seed
from .running import data_of, find_run_folder, known_splits, load, precision_of, progress_of

if TYPE_CHECKING:
    from ..analysis.analyze import Analysis
    from ..evaluation.evaluate import EvaluatedMetric
    from ..methods.base import LatentModel

PICTURES = 2**20
"""Bytes of an analysis, about."""


@examples(
    "unilatent analyze runs/digits --out analysis",
    "unilatent analyze runs/digits --only latents,alignment --out analysis",
    "unilatent analyze runs/ul-0 runs/ul-1 --compare --out compared",
)
def run(
    models: Annotated[list[str], typer.Argument(help=f"{MODEL_HELP[:-1]}; several with --compare.")],
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and its figures.")],
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare several runs: also write rate_distortion.png and comparison.json."),
    ] = False,
    num: Annotated[int, typer.Option(help="How many held-out samples at most, evenly over all.", min=2)] = 512,
    draws: Annotated[
        int, typer.Option(help="Noise levels per sample at which losses and rates are measured.", min=1)
    ] = 4,
    data: Data = None,
    distance: Annotated[
        str | None,
        typer.Option(help="With --compare: the metric of eval/*.json to draw, e.g. fid."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated parts: latents, reconstruction, rate, alignment, compression, layers, trajectory, "
            "losses [default: all; with --compare the first three]."
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
) -> Record:
    """Measure latents, losses and layers of a model.

    Spread, rank, rate and use of the latents, probes, nearest samples; the loss by noise level; alignment of the
    tokenise and the denoise pass by layer; entropy of the weights; agreement of the losses' gradients. Warns of
    collapsed latents.
    """
    if len(models) > 1 and not compare:
        raise ValueError(f"MODEL: {len(models)} given; add --compare to compare them")
    if compare and len(models) < 2:
        raise ValueError("--compare: needs at least two runs")
    from ..analysis.analyze import BASIC, PARTS, absent_parts, analysis_table, check_parts
    from ..analysis.comparison import (
        ComparedRun,
        compare_runs,
        last_evaluation,
        refuse_no_rate,
        sample_distance,
        settings_of,
    )
    from ..files import read_json, write_json
    from ..tables import show

    chosen_parts = check_parts([part.strip() for part in only.split(",")]) if only else BASIC if compare else PARTS
    if compare and not set(BASIC) <= set(chosen_parts):
        raise ValueError(f"--only: {only!r}, but --compare needs {', '.join(BASIC)}; leave it out")
    runs: list[ComparedRun] = []
    records: dict[str, Record] = {}
    names = _names(models)
    outputs = Outputs(out, "analyze", [data, *(path for model in models for path in data_of(model))])
    numbers: dict[str, list[EvaluatedMetric]] = {}
    if compare:  # what can be refused before any work is
        for source, name in zip(models, names, strict=True):
            refuse_no_rate(load(source, device), name)
            numbers[name] = last_evaluation(Path(source))
        sample_distance(numbers, distance)
    for source, name in zip(models, names, strict=True):
        network = load(source, device)
        folder, chosen = name if compare else "", precision_of(precision, network)
        analysis, paths = _analyse(
            network, source, outputs, folder, num, draws, data, seed, batch_size, chosen, chosen_parts
        )
        records[name] = read_json(outputs.folder / folder / "analysis.json", "analyse the model again")
        if compare:
            runs.append(ComparedRun(name, analysis, numbers[name], settings_of(network)))
        else:
            show(analysis_table(analysis, name, absent_parts(network, analysis, chosen_parts)))
            print(f"written: {', '.join(path.name for path in paths)} in {out}")
        for warning in analysis.warnings():
            print(f"warning: {name}: {warning}", file=sys.stderr)
    if not compare:
        return {"out": out, **records[names[0]]}
    if compare:
        with outputs.writing() as new:
            table, rows = compare_runs(runs, distance, new / "rate_distortion.png")
            write_json(new / "comparison.json", {"runs": rows})
        show(table)
        print(f"written: rate_distortion.png, comparison.json and one folder per run in {out}")
    return {"out": out, "compared": rows, "runs": records}


def _analyse(
    network: LatentModel, source: str, outputs: Outputs, folder: str, num: int, draws: int, data: str | None,
    seed: int, batch_size: int, precision: str, only: tuple[str, ...],
) -> tuple[Analysis, list[Path]]:  # fmt: skip
    """Analyse a model; return the analysis and the files that it was written to, in a subfolder of the outputs."""
    from ..analysis.analyze import analyze, write_analysis
    from ..analysis.probes import with_columns
    from ..batches import load_all

    run_folder = find_run_folder(source)
    if run_folder is not None and not (run_folder / "model").is_dir():
        print(f"note: {source} is not finished: its newest checkpoint is analysed", file=sys.stderr)
    splits = known_splits(network.modality, source, data)
    held_out = len(splits.held_out) > 0
    samples = load_all(with_columns(splits.shown), network.modality, limit=num)
    if not held_out:
        print("note: no samples are held out of this data, so training samples are analysed", file=sys.stderr)
    with progress_of() as advance:
        advance("analysing", 0, len(only))
        analysis = analyze(
            network, samples, draws=draws, seed=seed, batch_size=batch_size, precision=precision, only=only,
            run=run_folder, progress=lambda part: advance("analysing", 1, len(only)),
        )  # fmt: skip
    about = {"model": source, "fingerprint": network.fingerprint(), "split": "held_out" if held_out else "train",
             "num": num, "draws": draws, "seed": seed, "precision": precision}  # fmt: skip
    with outputs.writing(PICTURES) as new:
        (new / folder).mkdir(exist_ok=True)
        return analysis, write_analysis(
            network, samples, analysis, new / folder, about, seed, precision, only, batch_size
        )


def _names(models: list[str]) -> list[str]:
    """Short names for folders and labels; whole paths where two short names are equal."""
    short = [Path(model).resolve().name for model in models]
    return short if len(set(short)) == len(short) else [model.strip("/").replace("/", "-") for model in models]
