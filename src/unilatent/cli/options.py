"""The options that several commands share, each defined once, and the sampling settings that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..packaged import names
from ..plain_text import decode, split_lines

if TYPE_CHECKING:
    from ..methods.base import LatentModel

# What a command works on.

MODEL_HELP = f"A run folder, a model folder, a hub id (owner/name), or a model of the package ({', '.join(names())})."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
OptionalModel = Annotated[str | None, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Preset = Annotated[
    str, typer.Argument(help="A preset (see `unilatent presets`) or a YAML file.", metavar="PRESET|FILE")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the preset, e.g. training.steps=500.", metavar="[KEY=VALUE]..."
    ),
]
OwnSettings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of this command, named above, e.g. steps=500.", metavar="[KEY=VALUE]..."),
]
Input = Annotated[Path, typer.Argument(help="A folder, a zip archive or a single file.", metavar="INPUT")]
Data = Annotated[
    str | None,
    typer.Option(help="Where the run's data are now, if they moved (data.path); for a model folder: its data."),
]

# What to generate.

Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        "--label",
        help="Classes to condition on: names, numbers, 0-9 or 2,5; cycled. What equals a class name is that class; a "
        "range between two names that are numbers is of names; all else counts classes from 0 [default: all, evenly].",
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", help="A text to condition on; repeat the option for several, cycled.")
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file with one text per line, used after those of --prompt.")
]
NegativePrompt = Annotated[str | None, typer.Option(help="A text that guidance leads away from [default: no text].")]
PropertyOption = Annotated[
    str | None,
    typer.Option(
        "--property",
        help="Property values to condition on: 5.2, 4.0-6.0 (ten values) or 4,5.5; cycled [default: as in the data].",
    ),
]
NumAtoms = Annotated[
    str | None,
    typer.Option(help="Atoms per molecule or crystal: 12, 8-12 or 8,12; cycled [default: as in the training data]."),
]

# How to sample. What is not given is the model's own setting.

GuidanceScale = Annotated[
    float | None,
    typer.Option(help="0: unconditional, 1: conditional, above 1: guided [default: the model's own]."),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Guide only where LOW < t < HIGH, and use the conditional estimate elsewhere, at scale 0 too; t = 1 is "
        "noise, t = 0 is clean (UNITE's paper counts the other way: its [0.1, 1] is 0 0.9) [default: the model's own].",
    ),
]
GuidanceNorm = Annotated[
    str | None,
    typer.Option(
        help="norm_first: guide the finished estimates; guidance_first: the raw ones [default: the model's own]."
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", help="Solver steps [default: the model's own].")
]
SOLVER_NAMES = ("euler", "heun", "ddim", "dpmpp_2m", "ancestral", "dopri5")
"""The names in `maths.solvers.SOLVERS`, here too so that a help text does not wait for torch."""
SolverOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(SOLVER_NAMES)} [default: the model's own].")]
Restarts = Annotated[
    int | None,
    typer.Option(
        help="How often noise is added again and the steps within --restart-interval are taken anew, each time at the "
        "cost of these steps [default: the model's own]."
    ),
]
RestartInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Times of --restarts; t = 1 is noise [default: the model's own]."),
]
DenoiseToZero = Annotated[
    bool | None,
    typer.Option(
        "--denoise-to-zero/--no-denoise-to-zero",
        help="Whether the last step returns the clean estimate itself [default: the model's own].",
    ),
]
DecoderSolver = Annotated[
    str | None,
    typer.Option(help="Solver of a diffusion decoder (Unified Latents) [default: the model's own]."),
]
DecoderSteps = Annotated[
    int | None, typer.Option(help="Solver steps of a diffusion decoder [default: the model's own].", min=1)
]

# What to compare with.

Reference = Annotated[
    str | None,
    typer.Option(
        help="Real samples to compare with: a folder, zip or .npz (arr_0, or mu and sigma) [default: training data]."
    ),
]
NumReference = Annotated[int, typer.Option(help="How many real samples to compare with, evenly over the data.", min=2)]

# Settings of a modality that only an evaluation reads. `running.for_evaluation` applies them by name.

InceptionWeights = Annotated[
    str | None, typer.Option(help="A local file with the FID Inception network [default: downloaded once].")
]
LPIPSWeights = Annotated[
    str | None,
    typer.Option("--lpips-weights", help="A local file with the VGG16 of LPIPS [default: downloaded once]."),
]
I3DWeights = Annotated[
    str | None, typer.Option("--i3d-weights", help="A local file with FVD's I3D network [default: downloaded once].")
]
DINOv2Weights = Annotated[
    str | None,
    typer.Option("--dinov2", help="A folder or hub id of the DINOv2 of fd_dinov2 and fdr [default: ViT-L/14]."),
]
CLIPWeights = Annotated[
    str | None,
    typer.Option("--clip", help="A folder or hub id of the CLIP of fd_clip, fdr and clip_score [default: ViT-L/14]."),
]
GivenFrames = Annotated[
    int | None, typer.Option(help="Continue so many first frames of held-out clips, in place of new samples.")
]
GivenContext = Annotated[
    str | None,
    typer.Option(help='What metrics see in place of given frames: real, decoded or "left out" [default: real].'),
]

# How to run.

Seed = Annotated[int, typer.Option(help="Random numbers are a function of (seed, sample index).", min=0)]
BatchSize = Annotated[int, typer.Option(help="Samples per batch; changes only memory and speed.", min=1)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one].")]
Precision = Annotated[
    str,
    typer.Option(
        help="fp32, bf16 (bfloat16 autocast inside the networks), or auto: what the model was trained in, but bf16 "
        "only where the hardware multiplies it faster than fp32."
    ),
]
EvaluationFolder = Annotated[
    Path | None, typer.Option(help="Folder for the results [default: RUN/eval, or ./evaluation].")
]


LIBRARY_NAMES = {"steps": "num_inference_steps", "property": "properties", "negative_prompt": "negative_prompts"}
"""Options that `unilatent.sample` has under another name."""


def sampling_settings(**options: Any) -> dict[str, Any]:
    """Return a command's options, given by their own names, as keyword settings of `unilatent.sample`.

    `prompt` and `prompts` become one list of texts. Options that the user left out stay as None.
    """
    if "prompts" in options:
        options["prompts"] = _texts(options.pop("prompt"), options["prompts"])
    return {LIBRARY_NAMES.get(name, name): value for name, value in options.items()}


def check_decoder_settings(model: LatentModel | None, settings: dict[str, Any]) -> None:
    """Raise ValueError if decoder settings are given for a decoder that takes no steps."""
    if model is not None and model.stepped_decoder is not None:
        return
    for key in ("decoder_solver", "decoder_steps"):
        if settings.get(key) is not None:
            reason = "there is no model" if model is None else "this model decodes in one pass"
            raise ValueError(f"--{key.replace('_', '-')}: {reason}; leave it out")


def check_restarts(model: LatentModel | None, settings: dict[str, Any]) -> None:
    """Raise ValueError if an interval is given for restarts that do not happen."""
    restarts = settings.get("restarts")
    if restarts is None:
        restarts = 0 if model is None else model.config.sampling.restarts
    if settings.get("restart_interval") is not None and not restarts:
        raise ValueError("--restart-interval: there are no restarts; set --restarts as well, or leave it out")


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str] | None:
    """The texts of --prompt and --prompts, None without any."""
    return [*(prompt or []), *(_lines("--prompts", prompts) if prompts else [])] or None


def _lines(option: str, path: Path) -> list[str]:
    """Lines of a text file that are not blank; ValueError names the option and what is wrong with the file."""
    try:
        raw = path.expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror or 'cannot be read'}; give a text file") from None
    lines = [line.strip() for line in split_lines(decode(raw, f"{option} {path}"))]
    if not any(lines):
        raise ValueError(f"{option} {path}: has no line with a text; write one text per line")
    return [line for line in lines if line]
