"""unilatent ckpt ls | verify | prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import EndedWith, Record, examples

if TYPE_CHECKING:
    from collections.abc import Iterator

HELP = "List, verify and prune checkpoints."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
Place = Annotated[Path, typer.Argument(help="A run folder, or a single checkpoint.", metavar="RUN|CHECKPOINT")]


@app.callback(help=HELP)
def _group() -> None: ...


@app.command("ls")
@examples("unilatent ckpt ls runs/digits")
def show(place: Place) -> Record:
    """List checkpoints with their size and files."""
    records = []
    for path in checkpoints(place):
        files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        print(f"{path.name}  {sum(files.values()) / 2**20:10.1f} MiB  {', '.join(files)}")
        records.append({"checkpoint": path, "bytes": sum(files.values()), "files": files})
    return {"checkpoints": records}


@app.command()
@examples("unilatent ckpt verify runs/digits")
def verify(place: Place) -> Record:
    """Check every file against its manifest.

    Exit code 1 if any is damaged.
    """
    faults = {path: _report(path) for path in list(checkpoints(place))}
    record = {"checkpoints": [{"checkpoint": path, "fault": fault} for path, fault in faults.items()]}
    if any(faults.values()):
        raise EndedWith(record)
    return record


@app.command()
@examples("unilatent ckpt prune runs/digits --keep 3")
def prune(
    place: Place, keep: Annotated[int, typer.Option(min=2, help="How many valid checkpoints to keep.")] = 2
) -> Record:
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
    deleted = []
    for path in sorted([*published(folder), *unpublished(folder)]):
        if path in newest:
            continue
        if found := others(path):
            print(f"left {path.name}: {', '.join(found[:3])} is not a file of a checkpoint")
            continue
        remove(path)
        deleted.append(path)
        print(f"deleted {path.name}" + (f", damaged: {damaged[path]}" if path in damaged else ""))
    print(f"kept {', '.join(path.name for path in newest)}")
    return {"kept": newest, "deleted": deleted, "damaged": damaged}


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


def _report(path: Path) -> str | None:
    """Print whether a checkpoint is valid; return its fault, None if it has none."""
    from ..runs.checkpoint import CheckpointError
    from ..runs.checkpoint import verify as check

    try:
        check(path)
    except CheckpointError as error:
        print(f"{path.name}  DAMAGED  {error}")
        return str(error)
    print(f"{path.name}  valid")
    return None
