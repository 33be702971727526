"""What several verbs share: their common options, progress bars, and output folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..progress import progress_of as progress_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..methods.base import LatentModel

Model = Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub id (owner/name).", metavar="MODEL")]
Seed = Annotated[int, typer.Option(help="Random numbers are a function of (seed, sample index).", min=0)]
BatchSize = Annotated[int, typer.Option(help="How many at a time; changes nothing but memory and speed.", min=1)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")]
Precision = Annotated[str, typer.Option(help="fp32, or bf16 autocast inside the networks.")]
DecoderSolver = Annotated[
    str | None, typer.Option(help="Of a decoder that is a diffusion model itself (Unified Latents).")
]
DecoderSteps = Annotated[int | None, typer.Option(help="Steps of such a decoder.", min=1)]


Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", help="A text; give it several times for several, cycled.")
]
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="Texts, one a line; after those given.")]


def texts_of(prompt: list[str] | None, prompts: Path | None) -> list[str] | None:
    """Texts of the two options, None without any; ValueError says what is wrong with the file."""
    return [*(prompt or []), *(read_lines("--prompts", prompts) if prompts else [])] or None


def decoder_settings(model: LatentModel | None, solver: str | None, steps: int | None) -> dict[str, Any]:
    """What of the two options is given, as settings; ValueError where the model's decoder takes no steps."""
    settings = {"decoder_solver": solver, "decoder_steps": steps}
    given = {key: value for key, value in settings.items() if value is not None}
    if given and (model is None or model.stepped_decoder is None):
        whose = "there is no model" if model is None else "this model decodes in one pass"
        raise ValueError(f"--{next(iter(given)).replace('_', '-')}: {whose}; leave it out")
    return given


def load(source: str, device: str | None) -> LatentModel:
    """The model, on the device."""
    import torch

    from ..loading import load as load_model

    try:
        return load_model(source, device=device)
    except (RuntimeError, AssertionError) as error:
        if device is None or torch.device(device).type == "cpu":
            raise
        raise ValueError(f"--device {device}: not available ({str(error).splitlines()[0]}); use cpu") from None


@contextmanager
def autocast(device: object, precision: str) -> Iterator[None]:
    """bf16 inside networks, or nothing."""
    import torch

    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision: {precision!r} is unknown; use fp32 or bf16")
    with torch.autocast(torch.device(str(device)).type, torch.bfloat16, enabled=precision == "bf16"):
        yield


WIDE = 200
"""Columns where no terminal sets a width: a file or a pipe wraps nothing."""


def wide(console: Console) -> Console:
    """One that wraps nothing where no terminal sets its width."""
    if not console.is_terminal:
        console.width = WIDE
    return console


STOPPED = 130
"""Exit code after a signal."""
AGAIN = "the same command makes all of them, from the first on"


def leave_stopped(done: str, further: str) -> NoReturn:
    """After SIGINT or SIGTERM: says what is there and how to go on."""
    print(f"stopped: {done}; {further}", file=sys.stderr)
    raise typer.Exit(STOPPED)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """One bar on the terminal; call it with how many more are done."""
    with progress_of() as advance:
        advance(label, 0, total or 0)
        yield lambda count: advance(label, count, total or 0)


def make_folder(path: Path) -> Path:
    """An output folder, made now; ValueError when it cannot be written."""
    from ..training.resuming import check_writable

    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def clear_numbered(folder: Path, subfolders: tuple[str, ...] = ()) -> Path:
    """Removes what an earlier command numbered (`000000.png`, ...) there and in these folders of it, so that two sets
    never mix."""
    for place in (folder, *(folder / name for name in subfolders)):
        for path in place.glob("[0-9][0-9][0-9][0-9][0-9][0-9].*"):
            path.unlink()
    return folder


def read_lines(option: str, path: Path) -> list[str]:
    """Lines of a text file that are not blank; ValueError names the option and what is wrong with the file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror or 'cannot be read'}; give a text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path}: is not UTF-8 text; save it as such") from None
    if not any(lines):
        raise ValueError(f"{option} {path}: has no line with a text; write one a line")
    return [line for line in lines if line]
