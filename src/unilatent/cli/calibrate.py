"""unilatent calibrate"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import expanded
from ..outputs import Outputs, refuse_foreign
from .command import Record, examples
from .options import Overrides, Preset
from .running import RESUMES, leave_stopped
from .train import read_run, refuse_data_around

if TYPE_CHECKING:
    from ..analysis.calibration import Trial
    from ..training.config import RunConfig

DRAWS = 8
"""Noise levels per sample in the analysis of a trial."""


@examples(
    "unilatent calibrate digits-ul --psnr 28 --out calibration",
    "unilatent calibrate digits-ul --bits-per-pixel 1.2 --over bias --out rate",
)
def run(
    preset: Preset,
    out: Annotated[Path, typer.Option(help="Folder for the trials and their table; the same command resumes in it.")],
    overrides: Overrides = None,
    psnr: Annotated[float | None, typer.Option(help="Target PSNR of held-out reconstructions, in dB.")] = None,
    bits_per_pixel: Annotated[float | None, typer.Option(help="Target rate of held-out latents.", min=0)] = None,
    over: Annotated[
        str, typer.Option(help="The hyperparameter to search: a number of `method` that raises the rate, e.g. bias.")
    ] = "loss_factor",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Distance from the target that is accepted [default: 0.25 dB, or 5 % of the bits].", min=0),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps per trial [default: those of the preset's first stage].", min=1)
    ] = None,
    trials: Annotated[int, typer.Option(help="How many trials at most.", min=1)] = 10,
    num: Annotated[int, typer.Option(help="Held-out samples that each trial is measured on.", min=2)] = 512,
) -> Record:
    """Tune a loss weight to a target PSNR or bitrate.

    Trains the first stage once per trial; every trial is stored. Prints the override to train with.
    """
    from ..analysis.calibration import calibration_table, search, write_calibration
    from ..config import ConfigError
    from ..files import read_json, write_text
    from ..tables import show

    if (psnr is None) == (bits_per_pixel is None):
        raise ValueError("--psnr, --bits-per-pixel: give one of the two, as the target")
    metric, target = ("psnr", psnr) if bits_per_pixel is None else ("bits_per_pixel", bits_per_pixel)
    assert target is not None
    config = read_run(preset, overrides)
    first = config.first or config
    prefix = "tokenizer.method" if config.first is not None else "method"
    start = getattr(first.method, over, None)
    if isinstance(start, bool) or not isinstance(start, int | float):
        numbers = [key for key, value in first.method.plain().items() if type(value) in (int, float)]
        raise ConfigError(f"--over: {over!r} is not a number of {preset}'s method; use one of {', '.join(numbers)}")
    if tolerance is None:
        tolerance = 0.25 if metric == "psnr" else 0.05 * target
    whole_numbers = isinstance(start, int)
    refuse_data_around(out, first)
    refuse_foreign(
        out, "a calibration", lambda name: name == "config.yaml" or _is_trial(expanded(out), name), ("calibrate",)
    )
    outputs = Outputs(out, "calibrate", shared=True)
    outputs.check("calibration.json", "calibration.png", "override.txt")
    folder = outputs.begin()
    _same_search(folder / "config.yaml", first, steps)

    def measure(setting: float) -> Trial:
        setting = int(setting) if whole_numbers else float(f"{setting:.4g}")
        return _trial(first, over, setting, steps, folder / f"{over}_{setting:.4g}", metric, num)

    rules = type(first.method).model_fields[over].metadata
    low = max([getattr(rule, "ge", -math.inf) for rule in rules], default=-math.inf)
    high = min([getattr(rule, "le", math.inf) for rule in rules], default=math.inf)
    positive = low > 0 or any(getattr(rule, "gt", None) == 0 for rule in rules)
    calibration = search(
        measure, start, target, tolerance, logarithmic=positive, whole=whole_numbers, low=low, high=high, most=trials
    )
    about = {"preset": preset, "over": over, "wanted": metric, "target": target, "tolerance": tolerance,
             "override": f"{prefix}.{over}={calibration.best.setting:.9g}"}  # fmt: skip
    with outputs.writing() as new:
        write_calibration(new, calibration, about)
        write_text(new / "override.txt", f"{about['override']}\n")
    show(calibration_table(calibration, over, metric, target))
    if calibration.wrong_way:
        print(f"note: stopped early: changing {over} brought {metric} no nearer to {target:g}; try another --over")
    elif not calibration.monotone:
        print(f"note: {metric} does not rise with {over} everywhere: the trials are short or noisy, try more --steps")
    if not calibration.within:
        print(f"note: no trial came within {tolerance:g}; the nearest is used. Try more --trials or another --over")
    print(f"train with: unilatent train {preset} {about['override']}")
    return {"out": folder, **read_json(folder / "calibration.json", "run the same command again")}


def _is_trial(out: Path, name: str) -> bool:
    """Whether a file is below the run of a trial."""
    return "/" in name and (out / name.split("/")[0] / "config.yaml").is_file()


def _trial(
    first: RunConfig, over: str, setting: float, steps: int | None, folder: Path, metric: str, num: int
) -> Trial:
    """Train the first stage with one setting, or resume it, and analyse it; a finished trial is read."""
    from ..analysis.analyze import analyze, write_analysis
    from ..analysis.calibration import read_trial, shortened
    from ..batches import load_all
    from ..loading import load
    from ..training.trainer import Trainer

    measured = {"num": num, "draws": DRAWS, "seed": 0}
    stored = read_trial(folder, setting, metric, measured)
    if stored is not None:
        print(f"{over} {setting:g}: {metric} {stored.value:.4g} (stored)")
        return stored
    config = shortened(first.override(f"method.{over}={setting}"), steps)
    if not (folder / "model").is_dir():
        trainer = Trainer(config, folder, resume="auto")
        if not len(trainer.splits.held_out):
            raise ValueError(
                "data.held_out: no samples are held out, but a calibration is measured on them; set data.held_out=0.1"
            )
        if trainer.fit() == folder:
            leave_stopped(trainer.stop, f"the trial in {folder} is unfinished", RESUMES)
    model = load(folder, device=config.training.device)
    samples = load_all(model.modality.splits(config.data).held_out, model.modality, limit=num)
    analysis = analyze(model, samples, draws=DRAWS)
    about = {"model": str(folder), "fingerprint": model.fingerprint(), "split": "held_out", **measured}
    write_analysis(model, samples, analysis, folder, about)
    trial = read_trial(folder, setting, metric, measured)
    assert trial is not None
    print(f"{over} {setting:g}: {metric} {trial.value:.4g}")
    return trial


def _same_search(path: Path, first: RunConfig, steps: int | None) -> None:
    """ConfigError names a setting in which this search differs from the trials in its folder."""
    from ..analysis.calibration import shortened
    from ..config import ConfigError, read_yaml
    from ..files import write_text
    from ..training.resuming import first_difference

    config = shortened(first, steps)
    if path.is_file():
        difference = first_difference(type(config).parse(config.plain()).plain(), read_yaml(path))
        if difference is not None:
            key, new, old = difference
            raise ConfigError(f"{key}: {new!r}, but the trials in {path.parent} have {old!r}; choose another --out")
    else:
        write_text(path, config.to_yaml())
