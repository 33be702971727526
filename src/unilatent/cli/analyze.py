"""unilatent analyze"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import BatchSize, Device, Precision, Seed, autocast, load, make_folder, wide

if TYPE_CHECKING:
    from ..analysis.analyze import Analysis
    from ..methods.base import LatentModel


def run(
    models: Annotated[
        list[str], typer.Argument(help="A run folder, a model folder, or a hub id; several with --compare.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and its pictures.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Several runs: also rate_distortion.png and comparison.json.")
    ] = False,
    num: Annotated[int, typer.Option(help="At most so many held-out samples, evenly over them.", min=2)] = 512,
    draws: Annotated[int, typer.Option(help="Noise levels each sample's costs are taken at.", min=1)] = 4,
    data: Annotated[
        str | None, typer.Option(help="data.path of the run, where it has moved; for a model folder: its data.")
    ] = None,
    distance: Annotated[
        str | None,
        typer.Option(help="With --compare: which number of eval/*.json to draw, e.g. fid."),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Say what the latents hold and cost.

    Spread, rank, bits, loss by noise level, the decoder's use of its latents, what a linear map reads off them,
    interpolations; warns of collapse.
    """
    from rich.console import Console

    if len(models) > 1 and not compare:
        raise ValueError(f"MODEL: {len(models)} given; add --compare to hold them against each other")
    if compare and len(models) < 2:
        raise ValueError("--compare: needs at least two runs")
    from ..analysis.analyze import analysis_table
    from ..analysis.comparison import Compared, compare_runs, last_evaluation, settings_of
    from ..files import write_json

    console = wide(Console())
    runs = []
    for source, name in zip(models, _names(models), strict=True):
        network = load(source, device)
        with autocast(network.device, precision):
            found, paths = _one(network, source, out / name if compare else out, num, draws, data, seed, batch_size)
        if compare:
            runs.append(Compared(name, found, last_evaluation(Path(source)), settings_of(network)))
        else:
            console.print(analysis_table(found, f"{name}, {found.latents.samples} samples"))
            print(f"written: {', '.join(path.name for path in paths)} in {out}")
        for warning in found.warnings():
            print(f"warning: {name}: {warning}")
    if compare:
        table, rows = compare_runs(runs, distance, out / "rate_distortion.png")
        write_json(out / "comparison.json", {"runs": rows})
        console.print(table)
        print(f"written: rate_distortion.png, comparison.json and a folder for each run in {out}")


def _one(
    network: LatentModel, source: str, folder: Path, num: int, draws: int, data: str | None, seed: int, batch_size: int
) -> tuple[Analysis, list[Path]]:
    """A model's analysis, and the files it was written to."""
    from ..analysis.analyze import analyze, write_analysis
    from ..analysis.probes import with_columns
    from ..evaluation.reference import splits_of
    from ..training.batches import whole

    where = Path(source) if (Path(source) / "config.yaml").is_file() else None
    splits = splits_of(network.modality, where, data)
    if splits is None:
        raise ValueError(f"--data: {source} is no run and does not say what it was trained on; give its data")
    held_out = len(splits.held_out) > 0
    samples = whole(with_columns(splits.held_out if held_out else splits.train), network.modality, limit=num)
    if not held_out:
        print("note: nothing is held out of this data, so training samples are analysed")
    found = analyze(network, samples, draws=draws, seed=seed, batch_size=batch_size)
    about = {"model": source, "fingerprint": network.fingerprint(), "split": "held_out" if held_out else "train",
             "num": num, "draws": draws, "seed": seed}  # fmt: skip
    return found, write_analysis(network, samples, found, make_folder(folder), about, seed)


def _names(models: list[str]) -> list[str]:
    """Short names for folders and labels; whole paths where two would be one."""
    short = [Path(model).resolve().name for model in models]
    return short if len(set(short)) == len(short) else [model.strip("/").replace("/", "-") for model in models]
