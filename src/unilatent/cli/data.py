"""unilatent data prepare | verify | make-...; a `make-` command for each modality that can generate its own data"""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import refuse_overlap, single_file
from ..plain_text import count_of
from .command import EndedWith, Record, examples
from .running import make_folder, progress, progress_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..modalities.base import CheckedRecords, Raw

HELP = "Prepare, verify and generate training data."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SYSTEM_SIZE = 512
"""Bytes of a generated sample, about."""
Workers = Annotated[int, typer.Option(help="Processes, by default one per core; they change only the speed.", min=1)]


Kind = Annotated[
    str | None,
    typer.Option("--modality", help="Read SOURCE as this kind of data [default: the kind that reads the most files]."),
]


@app.callback(help=HELP)
def _group() -> None: ...


@app.command()
@examples(
    "unilatent data prepare photos --size 256 --out shards",
    "unilatent train cifar10-unite-s data.path=shards --out runs/photos",
)
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder or zip of class folders, or of samples without classes.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; after an interruption, the same command resumes.")],
    size: Annotated[
        str | None,
        typer.Option(
            help="Crop to a square of this side, or to HEIGHTxWIDTH; videos are resized to just cover it, uncropped "
            "[default: unchanged]."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Format of the stored files: jpg, png or webp [default: jpg]; of videos always mp4."),
    ] = None,
    quality: Annotated[int, typer.Option(help="Quality of jpg, webp and mp4 files.", min=1, max=100)] = 95,
    shard_size: Annotated[int, typer.Option(help="Samples per shard.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling across shards.", min=0)] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle, so that every shard has samples of all classes.")] = True,
    workers: Workers = CORES,
    modality: Kind = None,
) -> Record:
    """Write a folder or zip as tar shards.

    Samples are cropped or resized once, instead of each time they are read. Videos get a keyframe every 12 frames.
    """
    from ..shards.writing import BAD, write

    refuse_overlap(out, [source], around=True)
    raw = _raw_to_prepare(source, _size(size), format, quality, modality)
    _print(f"note: {line}" for line in raw.notes)
    folder = make_folder(out)
    done = 0
    with progress("writing", len(raw.names)) as advance:

        def report(count: int, _: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        summary = write(raw, folder, shard_size, seed if shuffle else None, workers, report)
    classes = f", {count_of(len(raw.class_names), 'class')}" if raw.class_names else ""
    earlier = f" ({summary.reused} of them already written)" if summary.reused else ""
    print(f"{count_of(summary.total, 'sample')}{classes} in {count_of(summary.shards, 'shard')}{earlier} in {out}")
    if summary.bad:
        print(f"{count_of(summary.bad, 'bad sample')} left out; listed in {out / BAD}")
    return {
        "out": out, "samples": summary.total, "shards": summary.shards, "classes": len(raw.class_names),
        "already": summary.reused, "bad": summary.bad,
    }  # fmt: skip


@app.command()
@examples("unilatent data verify my_images", "unilatent data verify shards --json")
def verify(
    source: Annotated[str, typer.Argument(help="Shards (a folder, pattern or URL), or a folder or zip of samples.")],
    workers: Workers = CORES,
    modality: Kind = None,
) -> Record:
    """Check shards, or read every sample.

    Shards are checked against their manifest; of other data, every image, video, molecule and crystal is read. Exit
    code 1 if anything is bad.
    """
    from ..shards.places import is_shards

    suffixes = _suffixes(modality)
    shards = is_shards(source, suffixes)
    if shards:
        checked, bad = _verify_shards(source, suffixes)
    else:
        checked, bad = _verify_samples(Path(source).expanduser(), workers, modality)
    print(f"{count_of(checked, 'shard' if shards else 'sample')} checked, {f'{bad:,} bad' if bad else 'all valid'}")
    record = {"source": source, "kind": "shards" if shards else "samples", "checked": checked, "bad": bad}
    if bad:
        raise EndedWith(record)
    return record


def _maker(folder: str) -> Callable[..., Record]:
    """The command that generates data of the modality in this folder."""

    @examples(f"unilatent data make-{folder}s --num 5000 --out {folder}s.npz")
    def make(
        out: Annotated[Path, typer.Option(help="The .npz file to write, for `data.path`.")],
        num: Annotated[
            int | None, typer.Option(help="How many samples [default: as many as the presets use].", min=1)
        ] = None,
        seed: Annotated[int, typer.Option(help="The same seed gives the same samples.", min=0)] = 0,
        workers: Workers = CORES,
    ) -> Record:
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
        print(f"{count_of(len(systems), 'sample')} in {out}")
        return {"out": out, "samples": len(systems), "seed": seed}

    return make


for _path in sorted((Path(__file__).parents[1] / "modalities").glob("*/generator.py")):
    app.command(f"make-{_path.parent.name}s")(_maker(_path.parent.name))


def _verify_shards(source: str, suffixes: set[str]) -> tuple[int, int]:
    from ..shards.places import find
    from ..shards.writing import verify as check

    shards, manifest = find(source, "shards")
    if manifest is None:
        print("no shards.json: the shards are checked without a manifest")
    bad = 0
    with progress("verifying", len(shards)) as advance:
        for shard, faults in check(shards, manifest is not None and bool(manifest.class_names), frozenset(suffixes)):
            _print(f"{shard.name}: {fault}" for fault in faults)
            bad += bool(faults)
            advance(1)
    return len(shards), bad


def _verify_samples(source: Path, workers: int, modality: str | None) -> tuple[int, int]:
    """Check the files of a modality whose samples are files, or else the records that the other ones read."""
    from ..modalities.base import NothingFound

    try:
        raw = _raw(source, None, None, 95, modality)
    except ValueError as refusal:
        if not source.exists():
            raise ValueError(
                f"source: {source} does not exist; give shards, or a file, folder or .zip of {_kinds(modality)}"
            ) from None
        records = _records(source, modality)
        if records is None and isinstance(refusal, NothingFound) and modality is None:
            raise ValueError(f"source: {source} holds no {_kinds(None)} that can be read") from None
        if records is None:
            raise refusal from None
        return _verify_records(records)
    return _verify_files(raw, workers)


def _kinds(modality: str | None) -> str:
    """Return what a source may hold, in words."""
    from ..modalities.base import Modality
    from ..registry import available, find

    def has_files(name: str) -> bool:
        found = find("modalities", name)
        return bool(found.suffixes) or found.verify.__func__ is not Modality.verify.__func__  # type: ignore[attr-defined]

    names = [name for name in available("modalities") if has_files(name)] if modality is None else [modality]
    kinds = [f"{name}s" for name in names]
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _records(source: Path, modality: str | None = None) -> list[CheckedRecords] | None:
    """What each modality, or the named one, reads from a path; None if none reads anything.

    ValueError names a file that is damaged.
    """
    from ..registry import available, find

    found, errors = [], []
    for name in available("modalities") if modality is None else [modality]:
        try:
            found.append(find("modalities", name).verify(source))
        except ValueError as error:
            errors.append(error)
    records = [checked for checked in found if checked is not None]
    is_npz = source.suffix.lower() == ".npz"  # of one modality alone
    if errors and (is_npz if not records else not is_npz):
        raise errors[0]
    return records or None


def _verify_records(records: list[CheckedRecords]) -> tuple[int, int]:
    unread = frozenset.intersection(*(checked.unread for checked in records))
    _print([f"note: {count_of(len(unread), 'file')} not read: {', '.join(sorted(unread))}"] if unread else [])
    for checked in records:
        _print(f"note: {line}" for line in checked.notes)
        _print(checked.bad)
    return sum(checked.total for checked in records), sum(len(checked.bad) for checked in records)


def _verify_files(raw: Raw, workers: int) -> tuple[int, int]:
    from ..shards.writing import check_all

    _print(f"note: {line}" for line in raw.notes)
    bad, remarks = 0, Counter[str]()
    with progress("verifying", len(raw.names)) as advance:
        for reason, remark in check_all(raw, workers):
            _print([reason] if reason else [])
            bad += bool(reason)
            remarks.update([remark] if remark else [])
            advance(1)
    _print(f"note: {count_of(count, 'sample has', 'samples have')} {remark}" for remark, count in remarks.items())
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


def _raw_to_prepare(
    source: Path, size: tuple[int, int] | None, format: str | None, quality: int, modality: str | None
) -> Raw:
    """The samples at a path; ValueError says so if they are records that need no preparing."""
    try:
        return _raw(source, size, format, quality, modality)
    except ValueError as error:
        refusal, found = error, None
        with suppress(ValueError):
            found = _records(source.expanduser()) if source.expanduser().exists() else None
        if found:
            refusal = ValueError(
                f"source: {source} holds records that are read as they are, and cached: there is nothing to prepare; "
                f"give it as data.path={source}"
            )
        raise refusal from None


def _modalities(modality: str | None = None) -> list[Any]:
    """Modalities whose samples are files, or the named one; ValueError if it has none."""
    from ..registry import available, find

    known = {name: found for name in available("modalities") if (found := find("modalities", name)).suffixes}
    if modality is not None and modality not in known:
        raise ValueError(f"--modality: {modality!r} has no files of its own; use {' or '.join(known)}, or leave it out")
    return [found for name, found in known.items() if modality in (None, name)]


def _suffixes(modality: str | None = None) -> set[str]:
    return {suffix for found in _modalities(modality) for suffix in found.suffixes}


def _raw(
    source: Path, size: tuple[int, int] | None, format: str | None, quality: int, modality: str | None = None
) -> Raw:
    """The samples at a path, read by the first modality that leaves no file unread, or else the one that reads most.

    If none does, the ValueError of one that finds its files there, or else of the first.
    """
    from ..modalities.base import NothingFound

    read: list[Raw] = []
    refusals: list[ValueError] = []
    for found in _modalities(modality):
        try:
            raw: Raw = found.raw(source, size, format, quality)
        except ValueError as error:
            refusals.append(error)
            continue
        if not raw.notes:
            return raw
        read.append(raw)
    if not read:
        raise next((error for error in refusals if not isinstance(error, NothingFound)), refusals[0])
    return max(read, key=lambda raw: len(raw.names))
