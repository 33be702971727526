"""unilatent train"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import refuse_overlap
from ..plain_text import count_of
from .command import Record, examples
from .options import Overrides, Preset
from .running import data_paths

if TYPE_CHECKING:
    from ..training.config import RunConfig
    from ..training.trainer import Trainer


@examples(
    "unilatent train digits --out runs/digits",
    "unilatent train digits --out runs/digits --resume auto    # after a stop",
    "unilatent train digits training.steps=1600 seed=1 --out runs/longer",
    "unilatent train cifar10-unite-s data.path=my_images --dry-run",
    "torchrun --nproc-per-node 8 -m -- unilatent train run.yaml --out runs/big",
)
def run(
    preset: Preset,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output-dir", "--output_dir", help="Run folder [default: runs/PRESET].")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            "--resume_from_checkpoint",
            help="'auto' resumes from the newest valid checkpoint, or starts if there is none; a path resumes from "
            "exactly that checkpoint.",
        ),
    ] = None,
    allow_data_change: Annotated[
        bool, typer.Option("--allow-data-change", help="Resume although samples were added, removed or changed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the settings and a few samples, print what would run, write nothing."),
    ] = False,
) -> Record | None:
    """Train a tokenizer and a latent generator together.

    Shows losses, speed, memory and the time left; draws images to RUN/samples and RUN/recon.
    After Ctrl-C, SIGTERM or SIGHUP the step is finished and saved, and the exit code is 130, 143 or 129 (128 + the
    signal; 0 below torchrun); it is 0 if the run is complete.
    """
    from ..training.trainer import Trainer

    config = read_run(preset, overrides)
    folder = out or Path("runs") / config.preset
    resume = "auto" if resume == "latest" else resume
    refuse_data_around(folder, config)
    if config.first is not None:
        first = folder / "tokenizer"
        build_on_meta(config)
        if (first / "model").is_dir():
            refuse_other_first(config.first, first)
        else:
            trainer = Trainer(config.first, first, resume=resume, allow_data_change=allow_data_change)
            if dry_run:
                return _dry(trainer, then=f"{config.preset} in {folder}, on its latents")
            _train(trainer)
        config = config.override(f"method.tokenizer={first}")
    trainer = Trainer(config, folder, resume=resume, allow_data_change=allow_data_change)
    if dry_run:
        return _dry(trainer)
    _train(trainer)
    record = _finished(trainer) if trainer.processes.is_main else None
    trainer.processes.leave()
    return record


def _dry(trainer: Trainer, then: str | None = None) -> Record | None:
    """Print what would run. then: the second stage."""
    record = None
    if trainer.processes.is_main:
        record = {**described(trainer), "then": then}
        print(describe(trainer))
        if then is not None:
            print(f"then       {then}")
    trainer.processes.leave()
    return record


def _finished(trainer: Trainer) -> Record:
    """What a run that is complete gave: its model, and the numbers of its last evaluation."""
    from ..files import read_json

    path = trainer.monitor.evaluation_file
    numbers = read_json(path, "evaluate the run again")["numbers"] if path.is_file() else []
    return {
        "run": trainer.out, "model": trainer.out / "model", "step": trainer.step, "steps": trainer.steps,
        "parameters": trainer.model.num_trainable, "evaluation": path if numbers else None,
        "numbers": {number["key"]: number["value"] for number in numbers},
    }  # fmt: skip


def _train(trainer: Trainer) -> None:
    """Train to the end; exit if the run was stopped before."""
    if trainer.fit() == trainer.out:
        trainer.processes.leave()
        raise typer.Exit(trainer.stop.exit_code)


def refuse_data_around(folder: Path, config: RunConfig) -> None:
    """ValueError if a new run would write into its own data, and read what it wrote there."""
    if (folder / "config.yaml").exists():
        return
    for stage in filter(None, (config, config.first)):
        refuse_overlap(folder, data_paths(stage.data.plain()))


def build_on_meta(config: RunConfig) -> None:
    """Raise ValueError if a second stage cannot be built, before the first stage is trained."""
    import torch

    from ..methods.base import LatentModel

    with torch.device("meta"):
        LatentModel.build(config.example().model())


def refuse_other_first(config: RunConfig, folder: Path) -> None:
    """ConfigError names the first setting in which a finished first stage differs from `config`."""
    from ..training.config import LEARNING
    from ..training.resuming import refuse_other_settings

    def counts(key: str) -> bool:
        part, _, rest = key.partition(".")
        learned = ("seed", "data", "modality", "conditions", "method", "given")
        return part in learned or (part == "training" and rest.partition(".")[0] in LEARNING)

    refuse_other_settings(config, folder, counts, prefix="tokenizer.")


def read_run(source: str, overrides: list[str] | None) -> RunConfig:
    """Return the configuration of a preset, or of a YAML file, with overrides.

    A YAML file is complete by itself, or holds changes to the preset that its `preset:` names.
    """
    from ..config import read_yaml
    from ..presets import preset, presets
    from ..training.config import RunConfig

    if source in presets() or not source.endswith((".yaml", ".yml")):
        return preset(source).override(*overrides or [])
    content = read_yaml(Path(source))
    name = content.get("preset", "custom")
    if name in presets() and not {"modality", "method", "data", "training"} <= content.keys():
        content = _merge(preset(name).plain(), content)
    return RunConfig.parse({"preset": "custom", **content}).override(*overrides or [])


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in place of its own, at any depth."""
    both = {key: _merge(base[key], over[key]) for key in base.keys() & over.keys()
            if isinstance(base[key], dict) and isinstance(over[key], dict)}  # fmt: skip
    return {**base, **over, **both}


def _all_checked(trainer: Trainer) -> str:
    """What reads all samples, where these are files."""
    paths = data_paths(trainer.config.data.plain())
    return (
        f"; `unilatent data verify {shlex.quote(paths[0])}` checks all"
        if len(paths) == 1 and "hf:" not in paths[0]
        else ""
    )


def described(trainer: Trainer) -> Record:
    """Return what a run would do, as plain data."""
    t, needed = trainer.training, trainer.memory
    return {
        "preset": trainer.config.preset, "run": trainer.out, "step": trainer.step, "steps": trainer.steps,
        "batch_size": t.batch_size, "epochs": trainer.steps * t.batch_size / trainer.samples,
        "training_samples": trainer.samples, "held_out": len(trainer.splits.held_out),
        "parameters": trainer.model.num_trainable, "memory": str(needed), "memory_bytes": needed.total,
        "device": str(trainer.device), "precision": t.precision, "notes": trainer.notes(),
    }  # fmt: skip


def describe(trainer: Trainer) -> str:
    """Summarise in a few lines what a run would do."""
    t, model = trainer.training, trainer.model
    at = f"resumes at step {trainer.step:,}" if trainer.step else "starts from scratch"
    return "\n".join(
        [
            f"run        {trainer.config.preset} in {trainer.out} ({at})",
            f"data       {trainer.amount} training samples, {len(trainer.splits.held_out):,} held out",
            f"checked    {count_of(len(trainer.examples), 'sample')} loaded{_all_checked(trainer)}",
            f"parameters {model.num_trainable:,} trainable",
            f"length     {count_of(trainer.steps, 'step')} of {count_of(t.batch_size, 'sample')}, "
            f"{trainer.steps * t.batch_size / trainer.samples:.1f} epochs",
            f"memory     {trainer.memory}",
            f"device     {trainer.device}, {trainer.precision}",
            *trainer.notes(),
        ]
    )
