"""unilatent calibrate"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import make_folder, wide
from .train import Overrides, read_run

if TYPE_CHECKING:
    from ..analysis.calibration import Trial
    from ..training.config import RunConfig

DRAWS = 8
"""Noise levels a sample in a trial's analysis."""


def run(
    preset: Annotated[
        str, typer.Argument(help="A preset (see `unilatent presets`) or a YAML file.", metavar="PRESET|FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the trials and their table; the same line goes on in it.")],
    overrides: Overrides = None,
    psnr: Annotated[float | None, typer.Option(help="Wanted: of held-out reconstructions, in dB.")] = None,
    bits_per_pixel: Annotated[float | None, typer.Option(help="Wanted: of held-out latents.", min=0)] = None,
    over: Annotated[
        str, typer.Option(help="The dial that is turned: a number of `method` that more bits come with, e.g. bias.")
    ] = "loss_factor",
    tolerance: Annotated[
        float | None, typer.Option(help="How near is near enough [default: 0.25 dB, or 5 % of the bits].", min=0)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of a trial [default: the preset's own first stage].", min=1)
    ] = None,
    trials: Annotated[int, typer.Option(help="At most so many.", min=1)] = 10,
    num: Annotated[int, typer.Option(help="Held-out samples a trial is measured on.", min=2)] = 512,
) -> None:
    """Find the dial's setting for a wanted PSNR or bitrate.

    Trains the first stage again and again; every trial is kept. Prints the override to train with.
    """
    from rich.console import Console

    from ..analysis.calibration import calibration_table, search, write_calibration
    from ..config import ConfigError
    from ..files import write_text

    if (psnr is None) == (bits_per_pixel is None):
        raise ValueError("--psnr, --bits-per-pixel: give the one that is wanted")
    wanted, target = ("psnr", psnr) if bits_per_pixel is None else ("bits_per_pixel", bits_per_pixel)
    assert target is not None
    whole = read_run(preset, overrides)
    first = whole.first or whole
    prefix = "tokenizer.method" if whole.first is not None else "method"
    start = getattr(first.method, over, None)
    if isinstance(start, bool) or not isinstance(start, int | float):
        numbers = [key for key, value in first.method.plain().items() if type(value) in (int, float)]
        raise ConfigError(f"--over: {over!r} is no number of {preset}'s method; there are {', '.join(numbers)}")
    if tolerance is None:
        tolerance = 0.25 if wanted == "psnr" else 0.05 * target
    whole_numbers = isinstance(start, int)
    folder = make_folder(out)
    _same_search(folder / "config.yaml", first, steps)

    def measure(setting: float) -> Trial:
        setting = int(setting) if whole_numbers else float(f"{setting:.4g}")
        return _trial(first, over, setting, steps, folder / f"{over}_{setting:.4g}", wanted, num)

    rules = type(first.method).model_fields[over].metadata
    low = max([getattr(rule, "ge", -math.inf) for rule in rules], default=-math.inf)
    high = min([getattr(rule, "le", math.inf) for rule in rules], default=math.inf)
    positive = low > 0 or any(getattr(rule, "gt", None) == 0 for rule in rules)
    found = search(
        measure, start, target, tolerance, logarithmic=positive, whole=whole_numbers, low=low, high=high, most=trials
    )
    about = {"preset": preset, "over": over, "wanted": wanted, "target": target, "tolerance": tolerance,
             "override": f"{prefix}.{over}={found.best.setting:.9g}"}  # fmt: skip
    write_calibration(folder, found, about)
    wide(Console()).print(calibration_table(found, over, wanted, target))
    if found.wrong_way:
        print(f"note: stopped early: turning {over} brought {wanted} no nearer to {target:g}; try another --over")
    elif not found.monotone:
        print(f"note: {wanted} does not rise with {over} everywhere: the trials are short or noisy, try more --steps")
    if not found.within:
        print(f"note: no trial came within {tolerance:g}; the nearest is taken. Try more --trials or another --over")
    write_text(folder / "override.txt", f"{about['override']}\n")
    print(f"train with: unilatent train {preset} {about['override']}")


def _trial(
    first: RunConfig, over: str, setting: float, steps: int | None, folder: Path, wanted: str, num: int
) -> Trial:
    """One run of the first stage, or what is left of it, and its analysis."""
    from ..analysis.analyze import analyze, write_analysis
    from ..analysis.calibration import read_trial, shortened
    from ..loading import load
    from ..training.batches import whole
    from ..training.trainer import Trainer

    measured = {"num": num, "draws": DRAWS, "seed": 0}
    known = read_trial(folder, setting, wanted, measured)
    if known is not None:
        print(f"{over} {setting:g}: {wanted} {known.value:.4g} (from before)")
        return known
    config = shortened(first.override(f"method.{over}={setting}"), steps)
    if not (folder / "model").is_dir():
        trainer = Trainer(config, folder, resume="auto")
        if not len(trainer.splits.held_out):
            raise ValueError(
                "data.held_out: nothing is held out, a calibration needs samples to measure; set it above 0"
            )
        if trainer.fit() == folder:
            print("stopped: the same command goes on")
            raise typer.Exit(130)
    model = load(folder, device=config.training.device)
    samples = whole(model.modality.splits(config.data).held_out, model.modality, limit=num)
    found = analyze(model, samples, draws=DRAWS)
    about = {"model": str(folder), "fingerprint": model.fingerprint(), "split": "held_out", **measured}
    write_analysis(model, samples, found, folder, about)
    trial = read_trial(folder, setting, wanted, measured)
    assert trial is not None
    print(f"{over} {setting:g}: {wanted} {trial.value:.4g}")
    return trial


def _same_search(path: Path, first: RunConfig, steps: int | None) -> None:
    """Trials in one folder differ in the dial alone: other settings are refused by field."""
    from ..analysis.calibration import shortened
    from ..config import ConfigError, read_yaml
    from ..files import write_text
    from ..training.resuming import first_difference

    config = shortened(first, steps)
    if path.is_file():
        found = first_difference(type(config).parse(config.plain()).plain(), read_yaml(path), "")
        if found is not None:
            key, new, old = found
            raise ConfigError(
                f"{key.lstrip('.')}: {new!r}, but the trials in {path.parent} have {old!r}; choose another --out"
            )
    else:
        write_text(path, config.to_yaml())
