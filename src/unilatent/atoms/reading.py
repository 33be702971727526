"""How molecules and crystals are read: their settings, what is left out, what is kept in the cache, what is held out.

What a record of either is, and what is wrong with it, stands with the two modalities.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from ..config import Config
from ..files import read_json, write_json
from ..maths.streams import seed_of
from ..pretrained import cache_folder
from .files import Kind, Progress, existing
from .systems import System, Systems

HELD_OUT = 0.1
SHOWN = 5
"""Records that a message names."""
TOLD = 64
"""Records after which progress is told of."""


class AtomData(Config):
    """Where systems come from and which of them are used; `path` and `num` are explained with each kind."""

    kind: ClassVar[Kind]

    path: str | None = None
    num: int = Field(ge=2)
    """Of the set that is made here."""
    seed: int = Field(default=0, ge=0)
    """Of the set that is made here."""
    held_out: float | None = Field(default=None, ge=0)
    """How many systems no training step sees, or below 1 which share of them, by a hash of the name. None: the split
    that the data bring (QM9 and tables do), else a tenth. Where they bring one, so many of its part: training systems
    stay the same."""
    held_out_part: Literal["validation", "test"] = "validation"
    """Which part of the data's own split is held out; the other one is not used. Numbers to publish are of the test
    part."""
    max_atoms: int | None = Field(default=None, ge=1)
    """Larger systems are left out, as are those that the model does not take. None: only these."""
    columns: tuple[str, ...] | None = None
    """Numbers of each system that are kept, None: all; systems without one that is named are left out."""
    label_column: str | None = None
    """A column of whole numbers, each of which is a class."""
    property_column: str | None = None
    """A column of numbers that new systems can be asked for (`conditions.scalar`); NaN where it is not known."""
    bad_share: float = Field(default=0.01, ge=0, le=1)
    """Of all records, how many may be unusable before it is an error; one always may."""


class TooLarge(ValueError):
    """More atoms than asked for: no fault of the record."""

    @classmethod
    def of(cls, atoms: int, most: int) -> Self:
        return cls(f"{atoms} atoms, more than {most}")


@dataclass(frozen=True)
class Found:
    """parts: of the data's own split; else {"": all}. bad, large: a line for each record that is left out, for what is
    wrong with it or for its size: file, record and reason."""

    parts: dict[str, Systems]
    bad: tuple[str, ...] = ()
    large: tuple[str, ...] = ()

    @property
    def systems(self) -> Systems:
        """All of them, one part after the other."""
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else Systems.of([one for part in parts for one in part])

    def within(self, most: int) -> Found:
        """Without systems of more atoms."""
        large = [f"{one.name}: {TooLarge.of(len(one.types), most)}" for one in self.systems if len(one.types) > most]
        parts = {name: part.take(np.flatnonzero(part.sizes <= most)) for name, part in self.parts.items()}
        return Found(parts, self.bad, (*self.large, *large)) if large else self


Results = Iterable[tuple[str, str, System | ValueError]]
"""Of each record: file and record, for messages; its part of the data's own split, or ""; what it holds, or what is
wrong with it."""


def gather(results: Results, path: Path, progress: Progress | None, total: int = 0) -> Found:
    """All that can be used. Columns without a single number, such as a formula, are none."""
    parts: dict[str, list[System]] = {}
    bad: list[str] = []
    large: list[str] = []
    for count, (where, part, result) in enumerate(results, 1):
        if isinstance(result, System):
            parts.setdefault(part, []).append(result)
        else:
            (large if isinstance(result, TooLarge) else bad).append(f"{where}: {result}")
        if progress is not None and count % TOLD == 0:
            progress(f"reading {path}", TOLD, total)
    found = {part: Systems.of(some) for part, some in parts.items()}
    known = {name for some in found.values() for name, values in some.columns.items() if np.isfinite(values).any()}
    names = [name for name in dict.fromkeys(name for some in found.values() for name in some.columns) if name in known]
    for part, some in found.items():
        unknown = np.full(len(some), np.nan)
        found[part] = replace(some, columns={name: some.columns.get(name, unknown) for name in names})
    return Found(found, tuple(bad), tuple(large))


# ---- what is used ----------------------------------------------------------------------------------------------------


def source(data: AtomData) -> Path | None:
    """The path of files; None for those made here. ValueError where there are none."""
    kind = data.kind
    if data.path is None:
        raise ValueError(
            f"data.path: not set; give a file, folder or .zip of {kind.what}, or {kind.offline!r} for those made here"
        )
    return None if data.path == kind.offline else existing(Path(data.path), kind)


def load_npz(path: Path, kind: Kind, own: bool = False) -> Systems:
    """ValueError where they are of the other kind, or none. own: then there are none."""
    systems = Systems.load(path)
    if (systems.lattice is not None) == kind.periodic and len(systems):
        return systems
    if own:
        return Systems.of([])
    other = "crystals" if systems.lattice is not None else "molecules"
    held = f"{other}, not {kind.what}" if len(systems) else f"no {kind.what}"
    raise ValueError(f"data.path: {path} holds {held}; give other data")


def limit(data: AtomData, max_atoms: int | None) -> tuple[int, str]:
    """Atoms of the largest system that is wanted, and what says so. max_atoms: of the model."""
    limits = [(data.max_atoms, "data.max_atoms"), (max_atoms, "modality.max_atoms")]
    return min([(most, field) for most, field in limits if most is not None] + [(data.kind.most, "the most read")])


def usable(found: Found, data: AtomData, max_atoms: int | None, also: Sequence[str] = ()) -> Found:
    """With the columns that are asked for (also: these too). A warning says what is left out; ValueError where that is
    all, or more than max(1, data.bad_share x records) are bad. Those that are too large are no records here."""
    where, what, bad, large = f"data.path: {data.path}", data.kind.what, found.bad, found.large
    most, field = limit(data, max_atoms)
    read = sum(map(len, found.parts.values()))
    records = read + len(bad)
    if large and not records:
        raise ValueError(f"{where}: all {len(large)} {what} have more than {most} atoms ({field}), such as "
                         f"{large[0]}; raise it, or give other data")  # fmt: skip
    if not read:
        raise ValueError(f"{where}: no record can be used: {_some(bad + large) or 'there is none'}; give other data")
    if len(bad) > max(1, int(data.bad_share * records)):
        raise ValueError(
            f"{where}: {len(bad)} of {records} records cannot be used, more than data.bad_share={data.bad_share:g} "
            f"allows: {_some(bad)}; repair or remove them, or raise data.bad_share"
        )
    if bad:
        warnings.warn(f"{where}: left out {len(bad)} of {records} records that cannot be used: {_some(bad)}")
    if large:
        warnings.warn(f"{where}: left out {len(large)} {what} of more than {most} atoms ({field}): {_some(large)}")
    return _with_columns(found, data, also)


def _some(lines: Sequence[str]) -> str:
    return "; ".join(lines[:SHOWN]) + ("; ..." if len(lines) > SHOWN else "")


def _with_columns(found: Found, data: AtomData, also: Sequence[str]) -> Found:
    fields = {data.property_column: "data.property_column", data.label_column: "data.label_column"}
    asked = {name: fields.get(name, "data.columns") for name in (*(data.columns or ()), *fields) if name is not None}
    known = list(next(iter(found.parts.values())).columns)
    for name, field in asked.items():
        if name not in known:
            raise ValueError(
                f"{field}: {data.path} has no column of numbers {name!r}; it has {', '.join(known) or 'none'}"
            )
    wanted = known if data.columns is None else dict.fromkeys([*asked, *also])
    needed = [name for name in asked if name in (data.columns or ()) or name == data.label_column]
    parts, lacking = {}, 0
    for part, systems in found.parts.items():
        whole = np.all([np.isfinite(systems.columns[name]) for name in needed], axis=0) | np.zeros(len(systems), bool)
        kept = replace(systems, columns={name: systems.columns[name] for name in wanted})
        parts[part] = kept if whole.all() else kept.take(np.flatnonzero(whole))
        lacking += int((~whole).sum())
    if lacking:
        warnings.warn(f"data.columns: left out {lacking} {data.kind.what} without {', '.join(needed)}")
    return replace(found, parts=parts)


# ---- what is held out ------------------------------------------------------------------------------------------------


def divided(systems: Systems, data: AtomData) -> tuple[Systems, Systems]:
    """Training and held-out systems, these of the smallest hash of their names, so that more move few others."""
    to_train_on(systems, data)
    order, total = by_hash(systems.names), len(systems)
    count = _share(HELD_OUT if data.held_out is None else data.held_out, total, total - 1, data)
    return systems.take(sorted(order[count:])), systems.take(sorted(order[:count]))


def thinned(part: Systems, data: AtomData) -> Systems:
    """Of the part that the data's own split holds out, as many as data.held_out says."""
    if data.held_out is None:
        return part
    return part.take(sorted(by_hash(part.names)[: _share(data.held_out, len(part), len(part), data)]))


def to_train_on(systems: Systems, data: AtomData) -> Systems:
    """The same; ValueError where there are none."""
    if not len(systems):
        raise ValueError(f"data.path: {data.path} has no {data.kind.what} to train on; give other data")
    return systems


def by_hash(names: Sequence[str]) -> list[int]:
    """Rows by the hash of their names."""
    return sorted(range(len(names)), key=lambda row: (seed_of("held_out", names[row]), row))


def _share(held_out: float, total: int, most: int, data: AtomData) -> int:
    """How many of `total` are held out: a count, or below 1 a share; ValueError above `most`."""
    count = round(held_out * total) if held_out < 1 else int(held_out)
    if count > most:
        raise ValueError(f"data.held_out: {held_out:g}, but there are only {total} {data.kind.what}; hold out fewer")
    return count


# ---- the cache -------------------------------------------------------------------------------------------------------


def shelf() -> Path:
    """$UNILATENT_CACHE/systems, or ~/.cache/unilatent/weights/systems."""
    return cache_folder() / "systems"


def version(package: str) -> str:
    """As installed; empty if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def name_of(path: Path, *about: object) -> str | None:
    """What systems read from there are kept under: a hash of the name, size and time of every file, and of what else
    they depend on. None: they are not, as they are read as quickly."""
    if path.suffix.lower() == ".npz":
        return None
    digest = hashlib.sha256(repr(about).encode())
    for file in sorted(other for other in path.rglob("*") if other.is_file()) if path.is_dir() else [path]:
        state = file.stat()
        digest.update(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return f"read-{digest.hexdigest()[:24]}"


def kept(name: str | None, make: Callable[[], Found]) -> Found:
    """What was read or made before under this name, or is now. A damaged file of the cache is made again; a disk that
    takes none costs a warning."""
    if name is None:
        return make()
    with suppress(ValueError, KeyError, TypeError):
        about = read_json(shelf() / f"{name}.json", "")
        parts = {part: Systems.load(shelf() / file) for part, file in about["parts"].items()}
        return Found(parts, tuple(about["bad"]), tuple(about["large"]))
    found = make()
    files = {part: f"{name}{'-' if part else ''}{part}.npz" for part in found.parts}

    def write(folder: Path) -> None:
        for part, systems in found.parts.items():
            systems.save(folder / files[part])
        write_json(folder / f"{name}.json", {"parts": files, "bad": found.bad, "large": found.large})

    keep(shelf(), write)
    return found


def keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes into that folder of the cache; a disk that is full or cannot be written costs a warning."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except OSError as error:
        warnings.warn(f"{shelf()}: {error.strerror or error}; what cannot be kept there is made again each time")
