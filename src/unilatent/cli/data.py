"""unilatent data prepare | verify | make-..., one for every modality that can make its own"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import make_folder, progress, progress_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..modalities.base import Raw

app = typer.Typer(
    help="Make shards of training data and verify them; make molecules and crystals.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Workers = Annotated[int, typer.Option(help="Processes; they change nothing but speed [default: one a core].", min=1)]


@app.callback()
def _group() -> None:
    """Make shards of training data and verify them; make molecules and crystals."""


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder or zip of class folders, or of samples alone.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; run again to go on after an interruption.")],
    size: Annotated[
        str | None, typer.Option(help="Crop to a square of this side, or to HEIGHTxWIDTH; without it, as they are.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of the stored files: jpg, png or webp [default: jpg].")] = None,
    quality: Annotated[int, typer.Option(help="Of jpg and webp.", min=1, max=100)] = 95,
    shard_size: Annotated[int, typer.Option(help="Samples a shard.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Samples are shuffled across shards by it.", min=0)] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle, so that every shard has samples of all classes.")] = True,
    workers: Workers = CORES,
) -> None:
    """Bring files into tar shards.

    Cropped once, instead of at every reading.
    """
    from ..shards.writing import BAD, write

    raw = _raw(source, _size(size), format, quality)
    folder = make_folder(out)
    done = 0
    with progress("writing", len(raw.names)) as advance:

        def report(count: int, _: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        summary = write(raw, folder, shard_size, seed if shuffle else None, workers, report)
    classes = f", {len(raw.class_names)} classes" if raw.class_names else ""
    before = f" ({summary.kept} of them from before)" if summary.kept else ""
    print(f"{summary.total:,} samples{classes} in {summary.shards:,} shards{before} in {out}")
    if summary.bad:
        print(f"{summary.bad:,} bad samples left out; they are named in {out / BAD}")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="Shards (a folder, pattern or URL), or a folder or zip of samples.")],
    workers: Workers = CORES,
) -> None:
    """Check shards, or decode every file of a folder.

    Shards are held against their manifest. Exit code 1 if anything is bad.
    """
    from ..shards.places import is_shards

    shards = is_shards(source, _suffixes())
    checked, bad = _verify_shards(source) if shards else _verify_files(Path(source), workers)
    what = "shards" if shards else "samples"
    print(f"{checked:,} {what} checked, {bad:,} bad" if bad else f"{checked:,} {what} checked, all sound")
    if bad:
        raise typer.Exit(1)


def _maker(folder: str) -> Callable[..., None]:
    def make(
        out: Annotated[Path, typer.Option(help="The .npz file; what `data.path` takes.")],
        num: Annotated[int | None, typer.Option(help="How many [default: as many as presets use].", min=1)] = None,
        seed: Annotated[int, typer.Option(help="The same seed makes the same set.", min=0)] = 0,
        workers: Workers = CORES,
    ) -> None:
        """Make samples without a download; the same line goes on after an interruption."""
        from importlib import import_module

        if out.suffix != ".npz":
            raise ValueError(f"--out {out}: the set is one .npz file; give a name that ends so")
        make_folder(out.parent)
        generator = import_module(f"{__package__.rpartition('.')[0]}.modalities.{folder}.generator")
        with progress_of() as advance:
            systems = generator.make(num or generator.NUM, seed=seed, workers=workers, progress=advance)
        systems.save(out)
        print(f"{len(systems):,} samples in {out}")

    return make


for _path in sorted((Path(__file__).parents[1] / "modalities").glob("*/generator.py")):
    app.command(f"make-{_path.parent.name}s")(_maker(_path.parent.name))


def _verify_shards(source: str) -> tuple[int, int]:
    from ..shards.places import find
    from ..shards.writing import verify as check

    shards, manifest = find(source, "shards")
    if manifest is None:
        print("no shards.json: only what the shards say of themselves can be checked")
    bad = 0
    with progress("verifying", len(shards)) as advance:
        for shard, faults in check(shards, manifest is not None and bool(manifest.class_names), frozenset(_suffixes())):
            _print(f"{shard.name}: {fault}" for fault in faults)
            bad += bool(faults)
            advance(1)
    return len(shards), bad


def _verify_files(source: Path, workers: int) -> tuple[int, int]:
    from ..shards.writing import check_all

    raw = _raw(source, None, None, 95)
    bad = 0
    with progress("verifying", len(raw.names)) as advance:
        for reason in check_all(raw, workers):
            _print([reason] if reason else [])
            bad += bool(reason)
            advance(1)
    return len(raw.names), bad


SHOWN = 20
"""Lines a shard."""


def _print(lines: Iterable[str]) -> None:
    for i, line in enumerate(lines):
        if i == SHOWN:
            print("... and more")
            return
        print(" ".join(line.split()))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not sides:
        raise ValueError(f"--size: {text!r} is no size in pixels; write 256, or 192x256 for height x width")
    return int(sides[1]), int(sides[2] or sides[1])


def _modalities() -> list[Any]:
    """Those whose samples come as files."""
    from ..registry import available, find

    found = [find("modalities", name) for name in available("modalities")]
    return [modality for modality in found if modality.suffixes]


def _suffixes() -> set[str]:
    return {suffix for modality in _modalities() for suffix in modality.suffixes}


def _raw(source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
    """The samples at a path, of the first modality that finds some there."""
    refusal: ValueError | None = None
    for modality in _modalities():
        try:
            found: Raw = modality.raw(source, size, format, quality)
            return found
        except ValueError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal
