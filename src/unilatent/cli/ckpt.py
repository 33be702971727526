"""unilatent ckpt ls | verify | prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

HELP = "List, verify and prune checkpoints."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
Place = Annotated[Path, typer.Argument(help="A run folder, or a single checkpoint.", metavar="RUN|CHECKPOINT")]


@app.callback(help=HELP)
def _group() -> None: ...


@app.command("ls")
def show(place: Place) -> None:
    """List checkpoints with their size and files."""
    for path in checkpoints(place):
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        print(f"{path.name}  {size:10.1f} MiB  {', '.join(sorted(file.name for file in path.iterdir()))}")


@app.command()
def verify(place: Place) -> None:
    """Check every file against its manifest.

    Exit code 1 if any is damaged.
    """
    if not all(_report(path) for path in list(checkpoints(place))):
        raise typer.Exit(1)


@app.command()
def prune(
    place: Place, keep: Annotated[int, typer.Option(min=2, help="How many valid checkpoints to keep.")] = 2
) -> None:
    """Delete all but the newest valid checkpoints.

    Damaged checkpoints and those set aside are deleted too. Refused while the run is training.
    """
    from ..runs.checkpoint import CheckpointError, others, published, remove, unpublished
    from ..runs.checkpoint import verify as check
    from ..runs.lock import owner

    if holder := owner(place):
        raise ValueError(
            f"{place}: process {holder['pid']} on {holder['host']} is training there and may be saving; stop it first "
            "(a run itself keeps training.keep_checkpoints)"
        )
    valid, damaged = [], {}
    for path in checkpoints(place):
        try:
            check(path)
            valid.append(path)
        except CheckpointError as error:
            damaged[path] = str(error)
    if not valid:
        raise ValueError(f"{place}: no valid checkpoint in it, so nothing was deleted")
    newest, folder = valid[-keep:], place / "checkpoints"
    for path in sorted([*published(folder), *unpublished(folder)]):
        if path in newest:
            continue
        if found := others(path):
            print(f"left {path.name}: {', '.join(found[:3])} is not a file of a checkpoint")
            continue
        remove(path)
        print(f"deleted {path.name}" + (f", damaged: {damaged[path]}" if path in damaged else ""))
    print(f"kept {', '.join(path.name for path in newest)}")


def checkpoints(place: Path) -> Iterator[Path]:
    """The complete checkpoints of a run, oldest first; `place` alone if it is a checkpoint itself."""
    from ..runs.checkpoint import MANIFEST, published

    if (place / MANIFEST).is_file():
        yield place
        return
    paths = published(place / "checkpoints")
    if not paths:
        raise ValueError(f"{place}: neither a checkpoint nor a run with checkpoints")
    yield from paths


def _report(path: Path) -> bool:
    """Print whether a checkpoint is valid, and return it."""
    from ..runs.checkpoint import CheckpointError
    from ..runs.checkpoint import verify as check

    try:
        check(path)
    except CheckpointError as error:
        print(f"{path.name}  DAMAGED  {error}")
        return False
    print(f"{path.name}  valid")
    return True
