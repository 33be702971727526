"""unilatent ckpt ls | verify | prune"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(help="List, verify and prune checkpoints.", no_args_is_help=True, rich_markup_mode=None)
Place = Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.", metavar="RUN|CHECKPOINT")]


@app.callback()
def _group() -> None:
    """List, verify and prune checkpoints."""


@app.command("ls")
def show(place: Place) -> None:
    """List the checkpoints of a run."""
    for path in checkpoints(place):
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        print(f"{path.name}  {size:10.1f} MiB  {', '.join(sorted(file.name for file in path.iterdir()))}")


@app.command()
def verify(place: Place) -> None:
    """Check every file against its manifest; exit code 1 if any is damaged."""
    if not all(_report(path) for path in list(checkpoints(place))):
        raise typer.Exit(1)


@app.command()
def prune(place: Place, keep: Annotated[int, typer.Option(min=2, help="How many sound ones stay.")] = 2) -> None:
    """Delete all but the newest sound checkpoints; damaged ones and those set aside go too. Not while it trains."""
    from ..training.checkpoint import CheckpointError
    from ..training.checkpoint import verify as check
    from ..training.lock import owner

    if holder := owner(place):
        raise ValueError(
            f"{place}: process {holder['pid']} on {holder['host']} is training there and may be saving; stop it first "
            "(training.keep_checkpoints says how many a run keeps)"
        )
    sound, damaged = [], {}
    for path in checkpoints(place):
        try:
            check(path)
            sound.append(path)
        except CheckpointError as error:
            damaged[path] = str(error)
    if not sound:
        raise ValueError(f"{place}: no sound checkpoint in it, so nothing was deleted")
    stay = sound[-keep:]
    for path in sorted((place / "checkpoints").glob("step_*")):
        if path not in stay:
            shutil.rmtree(path)
            print(f"deleted {path.name}" + (f", damaged: {damaged[path]}" if path in damaged else ""))
    print(f"kept {', '.join(path.name for path in stay)}")


def checkpoints(place: Path) -> Iterator[Path]:
    """The published checkpoints of a run, oldest first, or the one that `place` is."""
    from ..training.checkpoint import MANIFEST, published

    if (place / MANIFEST).is_file():
        yield place
        return
    found = published(place / "checkpoints")
    if not found:
        raise ValueError(f"{place}: neither a checkpoint nor a run with checkpoints")
    yield from found


def _report(path: Path) -> bool:
    from ..training.checkpoint import CheckpointError
    from ..training.checkpoint import verify as check

    try:
        check(path)
    except CheckpointError as error:
        print(f"{path.name}  DAMAGED  {error}")
        return False
    print(f"{path.name}  sound")
    return True
