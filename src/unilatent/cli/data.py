"""unilatent data prepare | verify | make-...; a `make-` command for each modality that can generate its own data"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import refuse_overlap, single_file
from .running import make_folder, progress, progress_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..modalities.base import Raw

HELP = "Prepare, verify and generate training data."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SYSTEM_SIZE = 512
"""Bytes of a generated sample, about."""
Workers = Annotated[int, typer.Option(help="Processes, by default one per core; they change only the speed.", min=1)]


@app.callback(help=HELP)
def _group() -> None: ...


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder or zip of class folders, or of samples without classes.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; after an interruption, the same command resumes.")],
    size: Annotated[
        str | None, typer.Option(help="Crop to a square of this side, or to HEIGHTxWIDTH [default: no cropping].")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Format of the stored files: jpg, png or webp [default: jpg].")
    ] = None,
    quality: Annotated[int, typer.Option(help="Quality of jpg and webp files.", min=1, max=100)] = 95,
    shard_size: Annotated[int, typer.Option(help="Samples per shard.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling across shards.", min=0)] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle, so that every shard has samples of all classes.")] = True,
    workers: Workers = CORES,
) -> None:
    """Write a folder or zip as tar shards.

    Samples are cropped once, instead of each time they are read.
    """
    from ..shards.writing import BAD, write

    refuse_overlap(out, [source], around=True)
    raw = _raw(source, _size(size), format, quality)
    _print(f"note: {line}" for line in raw.notes)
    folder = make_folder(out)
    done = 0
    with progress("writing", len(raw.names)) as advance:

        def report(count: int, _: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        summary = write(raw, folder, shard_size, seed if shuffle else None, workers, report)
    classes = f", {len(raw.class_names)} classes" if raw.class_names else ""
    earlier = f" ({summary.reused} of them already written)" if summary.reused else ""
    print(f"{summary.total:,} samples{classes} in {summary.shards:,} shards{earlier} in {out}")
    if summary.bad:
        print(f"{summary.bad:,} bad samples left out; they are listed in {out / BAD}")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="Shards (a folder, pattern or URL), or a folder or zip of samples.")],
    workers: Workers = CORES,
) -> None:
    """Check shards against their manifest, or decode every file.

    Exit code 1 if anything is bad.
    """
    from ..shards.places import is_shards

    shards = is_shards(source, _suffixes())
    checked, bad = _verify_shards(source) if shards else _verify_files(Path(source), workers)
    what = "shards" if shards else "samples"
    print(f"{checked:,} {what} checked, {bad:,} bad" if bad else f"{checked:,} {what} checked, all valid")
    if bad:
        raise typer.Exit(1)


def _maker(folder: str) -> Callable[..., None]:
    """The command that generates data of the modality in this folder."""

    def make(
        out: Annotated[Path, typer.Option(help="The .npz file to write, for `data.path`.")],
        num: Annotated[
            int | None, typer.Option(help="How many samples [default: as many as the presets use].", min=1)
        ] = None,
        seed: Annotated[int, typer.Option(help="The same seed gives the same samples.", min=0)] = 0,
        workers: Workers = CORES,
    ) -> None:
        """Generate training data without a download.

        After an interruption, the same command resumes.
        """
        from importlib import import_module

        if out.suffix != ".npz":
            raise ValueError(f"--out {out}: the samples are one .npz file; give a name that ends in .npz")
        outputs = single_file(out, f"data make-{folder}s")
        make_folder(outputs.folder)
        generator = import_module(f"{__package__.rpartition('.')[0]}.modalities.{folder}.generator")
        with progress_of() as advance:
            systems = generator.make(num or generator.NUM, seed=seed, workers=workers, progress=advance)
        with outputs.writing(SYSTEM_SIZE * len(systems)) as new:
            systems.save(new / out.name)
        print(f"{len(systems):,} samples in {out}")

    return make


for _path in sorted((Path(__file__).parents[1] / "modalities").glob("*/generator.py")):
    app.command(f"make-{_path.parent.name}s")(_maker(_path.parent.name))


def _verify_shards(source: str) -> tuple[int, int]:
    from ..shards.places import find
    from ..shards.writing import verify as check

    shards, manifest = find(source, "shards")
    if manifest is None:
        print("no shards.json: the shards are checked without a manifest")
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
    _print(f"note: {line}" for line in raw.notes)
    bad, remarks = 0, Counter[str]()
    with progress("verifying", len(raw.names)) as advance:
        for reason, remark in check_all(raw, workers):
            _print([reason] if reason else [])
            bad += bool(reason)
            remarks.update([remark] if remark else [])
            advance(1)
    _print(f"note: {count:,} sample{'s have' if count > 1 else ' has'} {remark}" for remark, count in remarks.items())
    return len(raw.names), bad


SHOWN = 20
"""Lines that are printed per shard."""


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
        raise ValueError(f"--size: {text!r} is not a size in pixels; write 256, or 192x256 for height x width")
    return int(sides[1]), int(sides[2] or sides[1])


def _modalities() -> list[Any]:
    """Modalities whose samples are files."""
    from ..registry import available, find

    modalities = [find("modalities", name) for name in available("modalities")]
    return [modality for modality in modalities if modality.suffixes]


def _suffixes() -> set[str]:
    return {suffix for modality in _modalities() for suffix in modality.suffixes}


def _raw(source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
    """The samples at a path, read by the first modality that accepts them."""
    refusal: ValueError | None = None
    for modality in _modalities():
        try:
            raw: Raw = modality.raw(source, size, format, quality)
            return raw
        except ValueError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal
