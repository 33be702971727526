"""Shared steps of loading systems: settings, unusable records, the cache, and the held-out split.

The modalities define what a record is and when it is invalid.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from ...config import Config
from ...files import read_json, write_json
from ...listings import Listings, spread
from ...maths.streams import seed_of
from ...plain_text import count_of
from ...pretrained import cache_folder
from . import foreign, grouping
from .files import ProgressCallback, SystemKind, existing
from .systems import System, Systems

HELD_OUT = 0.1
"""Default share of held-out systems."""
SHOWN = 5
"""Records that a message lists."""
REPORT_EVERY = 64
"""Records between two progress reports."""
LEAST_MOVE = 2
"""By how many systems their number may always change to keep a group on one side; a tenth, if that is more."""


class AtomData(Config):
    """Where systems come from and which of them are used. Each kind of system documents `path` and `num`."""

    kind: ClassVar[SystemKind]

    path: str | None = None
    num: int = Field(ge=2)
    """Size of the generated set."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generated set."""
    held_out: float | None = Field(default=None, ge=0)
    """Number of systems that no training step reads, or a share of them if below 1, chosen by a hash of the name. None:
    the split that comes with the data (QM9, tables with a split), or else 10 %. If the data come with a split, a number
    or share limits its held-out part; the training systems do not change."""
    held_out_part: Literal["validation", "test"] = "validation"
    """Which part of the split that comes with the data is held out; the other one is not used. Use the test part for
    numbers to publish."""
    max_atoms: int | None = Field(default=None, ge=1)
    """Larger systems are left out. Systems above the model's max_atoms are always left out. None: only those."""
    columns: tuple[str, ...] | None = None
    """Numbers to load for each system; systems without one of them are left out. None: all, and nothing is left out."""
    label_column: str | None = None
    """A column of whole numbers, used as class labels."""
    property_column: str | None = None
    """A column of numbers that samples can be conditioned on (`conditions.scalar`); NaN where unknown."""
    bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unusable records before loading fails; one unusable record is always tolerated."""


class TooLarge(ValueError):
    """A valid record with more atoms than requested."""

    @classmethod
    def of(cls, atoms: int, most: int) -> Self:
        return cls(f"{count_of(atoms, 'atom')}, more than {most}")


@dataclass(frozen=True)
class LoadedSystems:
    """The systems of a source, and the records that were left out.

    parts: part of the split that comes with the data -> its systems; {"": all} without such a split. bad: a line per
    invalid record (file, record, reason). large: the same per record that is too large. notes: what the user has to
    know about the records that were read, and the files that were not.
    """

    parts: dict[str, Systems]
    bad: tuple[str, ...] = ()
    large: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def systems(self) -> Systems:
        """All systems, part after part."""
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else Systems.of([one for part in parts for one in part])

    def within(self, most: int) -> LoadedSystems:
        """Move systems with more than `most` atoms to `large`."""
        large = [f"{one.name}: {TooLarge.of(len(one.types), most)}" for one in self.systems if len(one.types) > most]
        parts = {name: part.take(np.flatnonzero(part.sizes <= most)) for name, part in self.parts.items()}
        return replace(self, parts=parts, large=(*self.large, *large)) if large else self


ParsedRecords = Iterable[tuple[str, str, System | ValueError]]
"""Per record: file and record for messages; its part of the data's split, or ""; the system, or what is wrong."""


def gather(
    records: ParsedRecords, path: Path, progress: ProgressCallback | None, total: int = 0, unread: str = ""
) -> LoadedSystems:  # fmt: skip
    """Collect parsed records. Columns without a single number (a formula, say) are dropped.

    unread: a note about files that were not read.
    """
    parts: dict[str, list[System]] = {}
    bad: list[str] = []
    large: list[str] = []
    remarks: dict[str, list[str]] = {}
    for count, (where, part, result) in enumerate(records, 1):
        if isinstance(result, System):
            parts.setdefault(part, []).append(result)
            if result.note:
                remarks.setdefault(result.note, []).append(where)
        else:
            (large if isinstance(result, TooLarge) else bad).append(f"{where}: {result}")
        if progress is not None and count % REPORT_EVERY == 0:
            progress(f"reading {path}", REPORT_EVERY, total)
    packed = {part: Systems.of(systems) for part, systems in parts.items()}
    known = {
        name
        for systems in packed.values()
        for name, values in systems.columns.items()
        if np.isfinite(values).any()
    }  # fmt: skip
    names = [
        name for name in dict.fromkeys(name for systems in packed.values() for name in systems.columns) if name in known
    ]
    for part, systems in packed.items():
        unknown = np.full(len(systems), np.nan)
        packed[part] = replace(systems, columns={name: systems.columns.get(name, unknown) for name in names})
    notes = [
        f"{len(places)} record{'s' * (len(places) > 1)} {note}: {_listing(places)}" for note, places in remarks.items()
    ]
    return LoadedSystems(packed, tuple(bad), tuple(large), (*notes, *([unread] if unread else [])))


# ---- what is used ----------------------------------------------------------------------------------------------------


def source_path(data: AtomData) -> Path | None:
    """Return the path of the files, or None for the generated set; ValueError if it is not set or does not exist."""
    kind = data.kind
    if data.path is None:
        raise ValueError(
            f"data.path: not set; give a file, folder or .zip of {kind.plural}, or {kind.generated} for generated ones"
        )
    return None if data.path in kind.offline else existing(Path(data.path), kind)


def load_npz(path: Path, kind: SystemKind, mixed: bool = False) -> Systems:
    """Load an .npz file; ValueError if it is empty or of the other kind. mixed: return no systems instead."""
    systems = foreign.load(path)
    if (systems.lattice is not None) == kind.periodic and len(systems):
        return systems
    if mixed:
        return Systems.of([])
    lattice = "without a lattice" if systems.lattice is None else "with a lattice"
    content = f"systems {lattice}, not {kind.plural}" if len(systems) else f"no {kind.plural}"
    raise ValueError(f"data.path: {path} holds {content}; give other data")


def atom_limit(data: AtomData, max_atoms: int | None) -> tuple[int, str]:
    """Return the largest number of atoms that is used, and the field that sets it. max_atoms: of the model."""
    limits = [(data.max_atoms, "data.max_atoms"), (max_atoms, "modality.max_atoms")]
    return min([(most, field) for most, field in limits if most is not None] + [(data.kind.max_atoms, "the most read")])


def usable(loaded: LoadedSystems, data: AtomData, max_atoms: int | None, also: Sequence[str] = ()) -> LoadedSystems:
    """Select the requested columns and report the records that were left out.

    also: further columns to select. A warning says what was left out. ValueError if nothing is left, or if more than
    max(1, data.bad_share x records) are invalid. Systems that are too large do not count as records here.
    """
    where, plural, bad, large = f"data.path: {data.path}", data.kind.plural, loaded.bad, loaded.large
    most, field = atom_limit(data, max_atoms)
    valid = sum(map(len, loaded.parts.values()))
    records = valid + len(bad)
    if large and not records:
        raise ValueError(f"{where}: all {len(large)} {plural} have more than {most} atoms ({field}), such as "
                         f"{large[0]}; raise it, or give other data")  # fmt: skip
    if not valid:
        raise ValueError(f"{where}: no record can be used: {_listing(bad + large) or 'there is none'}; give other data")
    if len(bad) > max(1, int(data.bad_share * records)):
        raise ValueError(
            f"{where}: {len(bad)} of {count_of(records, 'record')} cannot be used, more than "
            f"data.bad_share={data.bad_share:g} allows: {_listing(bad)}; repair or remove them, or raise data.bad_share"
        )
    if bad:
        warnings.warn(
            f"{where}: left out {len(bad)} of {count_of(records, 'record')} that cannot be used: {_listing(bad)}"
        )
    if large:
        warnings.warn(
            f"{where}: left out {count_of(len(large), plural[:-1])} of more than {most} atoms ({field}): "
            f"{_listing(large)}"
        )
    for note in loaded.notes:
        warnings.warn(f"{where}: {note}")
    selected = _with_columns(loaded, data, also)
    _warn_of_sparse_columns(selected, data)
    return selected


def _warn_of_sparse_columns(loaded: LoadedSystems, data: AtomData) -> None:
    """Name the columns that lack a number in more than half of the systems."""
    total = sum(map(len, loaded.parts.values()))
    known: Counter[str] = Counter()
    for systems in loaded.parts.values():
        known.update({name: int(np.isfinite(values).sum()) for name, values in systems.columns.items()})
    sparse = [f"{name} ({count} of {total})" for name, count in known.items() if 2 * count < total]
    if sparse:
        warnings.warn(f"data.path: {data.path}: most {data.kind.plural} have no number in {_listing(sparse, ', ')}; "
                      "where it is unknown, a model learns nothing from it")  # fmt: skip


def _listing(lines: Sequence[str], between: str = "; ") -> str:
    return between.join(lines[:SHOWN]) + (f"{between}..." if len(lines) > SHOWN else "")


def _with_columns(loaded: LoadedSystems, data: AtomData, also: Sequence[str]) -> LoadedSystems:
    fields = {data.property_column: "data.property_column", data.label_column: "data.label_column"}
    requested = {
        name: fields.get(name, "data.columns") for name in (*(data.columns or ()), *fields) if name is not None
    }
    known = list(next(iter(loaded.parts.values())).columns)
    for name, field in requested.items():
        if name not in known:
            raise ValueError(
                f"{field}: {data.path} has no column of numbers {name!r}; it has {', '.join(known) or 'none'}"
            )
    selected = known if data.columns is None else dict.fromkeys([*requested, *also])
    needed = [name for name in requested if name in (data.columns or ()) or name == data.label_column]
    parts, lacking = {}, 0
    for part, systems in loaded.parts.items():
        whole = np.all([np.isfinite(systems.columns[name]) for name in needed], axis=0) | np.zeros(len(systems), bool)
        selection = replace(systems, columns={name: systems.columns[name] for name in selected})
        parts[part] = selection if whole.all() else selection.take(np.flatnonzero(whole))
        lacking += int((~whole).sum())
    if lacking:
        warnings.warn(f"data.columns: left out {count_of(lacking, data.kind.plural[:-1])} without {', '.join(needed)}")
    return replace(loaded, parts=parts)


# ---- what is held out ------------------------------------------------------------------------------------------------


def split_by_hash(systems: Systems, data: AtomData) -> tuple[Systems, Systems]:
    """Return training and held-out systems; those with the smallest hashes of their names are held out.

    Adding systems to the data therefore moves few others between the two. The steps of a relaxation, and the frames of
    a trajectory, have one hash and are on one side. A trajectory too long for that is divided once: its last frames are
    held out. A warning says so.
    """
    require_training(systems, data)
    groups, runs = grouping.relaxations(systems), grouping.trajectories(systems, data.kind.alike)
    titles = Counter(groups)
    for run in runs:  # known by the first title, unless other records have it ("conformer 0"): then by its place
        title, inside = groups[run.start], Counter(groups[run.start : run.stop])
        own = title if titles[title] == inside[title] else systems.names[run.start]
        groups[run.start : run.stop] = [own] * len(run)
    frames = {row for run in runs for row in run}
    hashes = {group: seed_of("held_out", group) for group in set(groups)}
    total = len(systems)
    order = sorted(range(total), key=lambda row: (hashes[groups[row]], -row if row in frames else row))
    count = _held_out_count(HELD_OUT if data.held_out is None else data.held_out, total, total - 1, data)

    def divides(cut: int) -> bool:
        """Whether a cut before this place of the order divides a group. Equal names (conformers, say) make no group."""
        a, b = order[cut - 1], order[cut]
        return groups[a] == groups[b] and systems.names[a] != systems.names[b]

    lower = next((cut for cut in range(count, 0, -1) if not divides(cut)), None)
    upper = next((cut for cut in range(count + 1, total) if not divides(cut)), None)
    near = [cut for cut in (lower, upper) if cut and abs(cut - count) <= max(LEAST_MOVE, count // 10)]
    if count:
        count = near[0] if near else count
        _warn_of_trajectories(runs, systems, set(order[:count]), data)
    return systems.take(sorted(order[count:])), systems.take(sorted(order[:count]))


def _warn_of_trajectories(runs: Sequence[range], systems: Systems, held_out: set[int], data: AtomData) -> None:
    if not runs:
        return
    frames = sum(map(len, runs))
    divided = [(run, last) for run in runs if 0 < (last := sum(row in held_out for row in run)) < len(run)]
    if frames == len(systems) and len(runs) == 1 and divided:
        text = (
            f"{frames} frames of one {data.kind.plural[:-1]}; successive ones are alike, so the last {divided[0][1]} "
            "are held out"
        )
    else:
        several = f"{len(runs)} trajectories" if len(runs) > 1 else "one trajectory"
        text = f"{frames} of {len(systems)} records are frames of {several}; all frames of one are on one side"
        for run, last in divided:
            name = grouping.file_of(systems.names[run.start])
            text += f", but the last {last} of {len(run)} of {name} are held out"
    warnings.warn(f"data.path: {data.path}: {text}")


def limit_held_out(part: Systems, data: AtomData) -> Systems:
    """Reduce the held-out part of the data's split to `data.held_out` systems."""
    if data.held_out is None:
        return part
    return part.take(sorted(hash_order(part.names)[: _held_out_count(data.held_out, len(part), len(part), data)]))


def require_training(systems: Systems, data: AtomData) -> Systems:
    """Return the systems; ValueError if there are none."""
    if not len(systems):
        raise ValueError(f"data.path: {data.path} has no {data.kind.plural} to train on; give other data")
    return systems


def hash_order(names: Sequence[str]) -> list[int]:
    """Return row indices sorted by the hash of the names."""
    return sorted(range(len(names)), key=lambda row: (seed_of("held_out", names[row]), row))


def _held_out_count(held_out: float, total: int, most: int, data: AtomData) -> int:
    """Return how many of `total` systems to hold out, given a count, or a share if below 1; ValueError above `most`."""
    count = round(held_out * total) if held_out < 1 else int(held_out)
    if count > most:
        only = f"{'is' if total == 1 else 'are'} only {count_of(total, data.kind.plural[:-1])}"
        way_out = "data.held_out=0.1" if total > 9 else "data.held_out=0"
        raise ValueError(f"data.held_out: {held_out:g}, but there {only}; hold out fewer: {way_out}")
    return count


# ---- the cache -------------------------------------------------------------------------------------------------------


def systems_cache() -> Path:
    """$UNILATENT_CACHE/systems, or ~/.cache/unilatent/weights/systems."""
    return cache_folder() / "systems"


def package_version(package: str) -> str:
    """Return the installed version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cache_name(listings: Listings, path: Path, *settings: object) -> str | None:
    """Return the name under which systems read from a path are cached; None for an .npz, which is not cached.

    It is a hash of the path, size and modification time of every file, and of the settings the result depends on.
    """
    if path.suffix.lower() == ".npz":
        return None
    return listings.keep(("systems", str(path.absolute()), *settings), lambda: _hash_of_files(path, settings))


def _hash_of_files(path: Path, settings: tuple[object, ...]) -> tuple[str, list[Path]]:
    """Return the name, and the files and folders that show whether it is still right."""
    digest = hashlib.sha256(repr(settings).encode())
    everything = [path, *path.rglob("*")] if path.is_dir() else [path]
    files = sorted(other for other in everything if other.is_file())
    folders = set(everything).difference(files)
    for file in files:
        state = file.stat()
        digest.update(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return f"read-{digest.hexdigest()[:24]}", [*folders, *spread(files)]


def cached(name: str | None, make: Callable[[], LoadedSystems]) -> LoadedSystems:
    """Return the cached systems of this name, or call `make` and cache its result.

    name None: nothing is cached. A damaged cache entry is replaced. A cache that cannot be written gives a warning.
    """
    if name is None:
        return make()
    with suppress(ValueError, KeyError, TypeError):
        entry = read_json(systems_cache() / f"{name}.json", "")
        parts = {part: Systems.load(systems_cache() / file) for part, file in entry["parts"].items()}
        return LoadedSystems(parts, tuple(entry["bad"]), tuple(entry["large"]), tuple(entry.get("notes", ())))
    loaded = make()
    files = {part: f"{name}{'-' if part else ''}{part}.npz" for part in loaded.parts}

    def write(folder: Path) -> None:
        for part, systems in loaded.parts.items():
            systems.save(folder / files[part])
        write_json(
            folder / f"{name}.json", {"parts": files, "bad": loaded.bad, "large": loaded.large, "notes": loaded.notes}
        )

    write_to_cache(systems_cache(), write)
    return loaded


def write_to_cache(folder: Path, write: Callable[[Path], None]) -> None:
    """Create a folder of the cache and write into it; a warning if the disk is full or not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except OSError as error:
        warnings.warn(f"{systems_cache()}: {error.strerror or error}; without this cache, systems are read or "
                      "generated again each time")  # fmt: skip
