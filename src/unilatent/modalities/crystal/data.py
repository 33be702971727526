"""Crystals from files as people have them, brought to one form and kept, or those of `generator`."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import numpy as np
from pydantic import Field

from ...atoms.files import CORES, MEMBER_BYTES, Progress, by_hash, is_periodic, share_of, unpacked
from ...atoms.systems import System, Systems
from ...config import Config
from ...pretrained import cache_folder
from . import generator
from .lattices import require
from .records import READERS, TooLarge, complete, prepared

OFFLINE = "prototypes"
"""The path that means crystals made here."""
VERSION = 2
"""Goes up when the same file would give other crystals."""
SPLITS = ("train", "val", "test")
PARTS = {"validation": "val", "test": "test"}
SLICES = (27_138, 36_184)
"""Where MP20's `all.csv` goes over from train to val, and from val to test."""
MP20 = range(45_229, 45_232)
"""Crystals that such a file has."""
MOST_ATOMS = 256
HELD_OUT = 0.1
SHOWN = 3
SMALL = 256
"""Records that are not worth a second process."""


class CrystalData(Config):
    """path: a .csv (or .csv.gz) with a column `cif`, or a folder or zip that has `train.csv`, `val.csv` and `test.csv`,
    or `all.csv`; a .cif, POSCAR or extended XYZ file, or a folder or zip of such; an .npz that `unilatent data
    make-crystals` wrote; or "prototypes": `num` of those it makes, built at first use. None: not set, an error.

    Every cell is Niggli reduced and every crystal's atoms are sorted by electronegativity.
    """

    path: str | None = None
    num: int = Field(default=generator.NUM, ge=2)
    """Of the set that is made here."""
    seed: int = Field(default=0, ge=0)
    """Of the set that is made here."""
    held_out: float | None = Field(default=None, ge=0)
    """How many crystals no training step sees, or below 1 which share of them, by a hash of the name. None: the split
    that the data brings, else a tenth. Where the data brings one, so many of that."""
    held_out_part: Literal["validation", "test"] = "validation"
    """Which of the data's own parts is held out; the other one is not used. Numbers to publish are of the test part."""
    max_atoms: int | None = Field(default=None, ge=1, le=MOST_ATOMS)
    """Larger crystals are left out, as are those that the model does not take. None: only these."""
    columns: tuple[str, ...] | None = None
    """Numbers of each crystal that are kept, None: all; crystals without one that is named are left out."""
    label_column: str | None = None
    """A column of whole numbers, each of which is a class."""
    property_column: str | None = None
    """A column of numbers that new crystals can be asked for (`conditions.scalar`); NaN where it is not known."""
    spacegroup: bool = False
    """Finds each space group (spglib, tolerance 0.1 A) and keeps it as the column `spacegroup`, the class where
    there is no other `label_column`; slow."""
    bad_share: float = Field(default=0.01, ge=0, le=1)
    """Of all records, how many may be unusable before it is an error; one always may."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=OFFLINE, num=200)


@dataclass(frozen=True)
class _Record:
    """Text of one crystal. where: for messages. split: its table's, "all" of a whole one; "" where
    it has none."""

    where: str
    kind: str
    text: str
    name: str
    split: str = ""
    columns: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """splits: of the data's own; else {"": all}. bad, large: one line for each that was left out."""

    splits: dict[str, Systems]
    bad: list[str]
    large: list[str]

    @property
    def total(self) -> int:
        return sum(len(part) for part in self.splits.values()) + len(self.bad) + len(self.large)


def load(
    data: CrystalData, progress: Progress | None = None, max_atoms: int | None = None
) -> tuple[Systems, Systems]:  # fmt: skip
    """Training and held-out crystals, with the columns that were asked for.

    max_atoms: of the model; larger crystals are left out, with a warning, as those above data.max_atoms are.

    ValueError where there is no path; or it names the file, the record, what is wrong with it and the way out; as long
    as only few records are bad, they are left out with a warning that names them. What was parsed is kept in the cache,
    under a hash of the files.
    """
    if data.path is None:
        raise ValueError(
            f"data.path: not set; give a file, folder or .zip of crystals, or {OFFLINE!r} for those made here"
        )
    require()
    where = data.path
    most = min(MOST_ATOMS if limit is None else limit for limit in (data.max_atoms, max_atoms))
    found = _found(data, most, progress or generator.silent)
    _judge(found, data, most, f"data.path: {where}")
    parts = {name: _with_columns(part, data) for name, part in found.splits.items()}
    if "train" in parts:
        others = [name for name in (PARTS[data.held_out_part], *SPLITS[1:]) if name in parts]
        train = parts["train"]
        held_out = parts[others[0]] if others else train.take([])
        if data.held_out is not None and others:
            held_out = held_out.take(
                _chosen(held_out.names, share_of(data.held_out, len(held_out), len(held_out), "crystals"))
            )
        if others or data.held_out is None:
            return _some(train, where), held_out
        parts = {"": train}
    everything = next(iter(parts.values())) if len(parts) == 1 else _together(list(parts.values()))
    wanted = HELD_OUT if data.held_out is None else data.held_out
    chosen = _chosen(everything.names, share_of(wanted, len(everything), len(everything) - 1, "crystals"))
    rest = np.setdiff1d(np.arange(len(everything)), chosen)
    return _some(everything.take(rest), where), everything.take(chosen)


def _chosen(names: Sequence[str], count: int) -> list[int]:
    """The `count` of the smallest hash, in order."""
    return sorted(by_hash(names)[:count])


def _some(systems: Systems, where: str) -> Systems:
    if not len(systems):
        raise ValueError(f"data.path: {where} has no crystal to train on; give other data")
    return systems


def _together(parts: Sequence[Systems]) -> Systems:
    return Systems.of([part[i] for part in parts for i in range(len(part))])


def _judge(found: _Found, data: CrystalData, most: int, where: str) -> None:
    """ValueError if too much is wrong; a warning if something is."""
    checked = found.total - len(found.large)
    examples = "; ".join(found.bad[:SHOWN]) + ("; ..." if len(found.bad) > SHOWN else "")
    if checked == len(found.bad):
        if found.large and not found.bad:
            raise ValueError(f"{where}: all {found.total} crystals have more than {most} atoms "
                             "(the least of modality.max_atoms and data.max_atoms); raise it")  # fmt: skip
        raise ValueError(f"{where}: no record can be used: {examples or 'there is none'}; give other data")
    if len(found.bad) > max(1, int(data.bad_share * checked)):
        raise ValueError(
            f"{where}: {len(found.bad)} of {checked} records cannot be used, more than data.bad_share="
            f"{data.bad_share:g} allows: {examples}; repair or remove them, or raise data.bad_share"
        )
    if found.bad:
        warnings.warn(f"{where}: left out {len(found.bad)} of {checked} records: {examples}")
    if found.large:
        some = "; ".join(found.large[:SHOWN]) + ("; ..." if len(found.large) > SHOWN else "")
        warnings.warn(f"{where}: left out {len(found.large)} of more than {most} atoms (the least of "
                      f"modality.max_atoms and data.max_atoms): {some}")  # fmt: skip


def _with_columns(systems: Systems, data: CrystalData) -> Systems:
    known = sorted(set(systems.columns))
    asked = {*(data.columns or ()), *([data.label_column] if data.label_column else [])}
    also = {data.property_column} if data.property_column else set()
    if unknown := sorted((asked | also) - set(known)):
        fields = {data.label_column: "data.label_column", data.property_column: "data.property_column"}
        field_name = fields.get(unknown[0], "data.columns")
        raise ValueError(f"{field_name}: no column of numbers {unknown[0]!r}; there are: {', '.join(known) or 'none'}")
    wanted = known if data.columns is None else sorted(asked | also | ({"spacegroup"} if data.spacegroup else set()))
    kept = replace(systems, columns={name: systems.columns[name] for name in wanted})
    lacking = np.zeros(len(systems), bool)
    for name in asked:
        lacking |= ~np.isfinite(systems.columns[name])
    if not lacking.any():
        return kept
    warnings.warn(f"data.columns: left out {int(lacking.sum())} crystals without {', '.join(sorted(asked))}")
    return kept.take(np.flatnonzero(~lacking))


# ---- where they come from ------------------------------------------------------------------------------------------


def _found(data: CrystalData, most: int, progress: Progress) -> _Found:
    """Crystals of at most so many atoms."""
    assert data.path is not None
    if data.path == OFFLINE:
        made = "made", generator.VERSION, data.num, data.seed, importlib.metadata.version("pymatgen-core")
        return _filtered(_kept(_key(*made), lambda: _made(data, progress)), most)
    path = Path(data.path).expanduser()
    if not path.exists():
        raise ValueError(f"data.path: {path} does not exist; give a file or folder of crystals, or {OFFLINE!r}")
    if path.suffix.lower() == ".npz":
        return _of_systems(Systems.load(path), path, most)
    files = _files(path)
    about = hashlib.sha256()
    for name, read in files:
        about.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        about.update(hashlib.sha256(read()).digest())
    key = _key("parsed", VERSION, about.hexdigest(), most, data.spacegroup)
    return _kept(key, lambda: _parsed(list(_records(files, path)), most, data.spacegroup, progress))


def _made(data: CrystalData, progress: Progress) -> _Found:
    workers = 1 if data.num <= SMALL else CORES
    return _Found({"": generator.make(data.num, data.seed, workers, progress)}, [], [])


def _filtered(found: _Found, max_atoms: int) -> _Found:
    """Without crystals that are too large."""
    splits, large = {}, list(found.large)
    for name, part in found.splits.items():
        fits = part.sizes <= max_atoms
        large += [f"{part.names[i]}: {part.sizes[i]} atoms" for i in np.flatnonzero(~fits)]
        splits[name] = part if fits.all() else part.take(np.flatnonzero(fits))
    return _Found(splits, found.bad, large)


def _of_systems(systems: Systems, path: Path, max_atoms: int) -> _Found:
    """Of a file of systems, each checked."""
    if systems.lattice is None:
        raise ValueError(f"data.path: {path} holds molecules (no lattice), not crystals; give other data")
    good, bad, large = [], [], []
    for i in range(len(systems)):
        one = systems[i]
        try:
            good.append(prepared(replace(one, types=one.types.astype(np.int64)), max_atoms, keep=True))
        except TooLarge as error:
            large.append(f"{path} record {i + 1} ({one.name}): {error}")
        except ValueError as error:
            bad.append(f"{path} record {i + 1} ({one.name}): {error}")
    return _Found({"": Systems.of(good)}, bad, large)


Files = list[tuple[str, Callable[[], bytes]]]


def _files(path: Path, own: bool = False) -> Files:
    """Names and readers of all that may hold crystals; only the splits of a folder that has them. own: without frames
    of molecules, and possibly none."""
    found: Files
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        found = [(p.relative_to(path).as_posix(), p.read_bytes) for p in inside]
    elif path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"data.path: {path} is not a whole zip archive ({error}); copy or make it again") from None
        found = [(member.filename, _member(path, member)) for member in sorted(members, key=lambda m: m.filename)]
    else:
        found = [(path.name, path.read_bytes)]
        if _kind(path.name) is None and not own:
            raise ValueError(f"data.path: {path} is no file of crystals; accepted are {ACCEPTED}")
    hidden = [any(part.startswith((".", "__MACOSX")) for part in name.split("/")) for name, _ in found]
    found = [file for file, skipped in zip(found, hidden, strict=True) if not skipped and _kind(file[0])]
    if own:
        found = [file for file in found if _kind(file[0]) != "frame" or is_periodic(_unpacked(*file))]
    if len(found) > 1:
        splits = [file for file in found if _stem(file[0]) in SPLITS and _kind(file[0]) == "csv"]
        whole = [file for file in found if _stem(file[0]) == "all" and _kind(file[0]) == "csv"]
        found = _once(found)
        found = splits if any(_stem(name) == "train" for name, _ in splits) else whole or found
    if not found and not own:
        raise ValueError(f"data.path: {path} holds no crystals; accepted are {ACCEPTED}")
    return found


def _once(files: Files) -> Files:
    """Without the extended XYZ that lies beside a CIF of the same name: both are the same crystal."""
    stems = {name.rpartition(".")[0] for name, _ in files if _kind(name) == "cif"}
    return [file for file in files if _kind(file[0]) != "frame" or file[0].rpartition(".")[0] not in stems]


ACCEPTED = ".csv(.gz) with a column cif, .cif, POSCAR or .vasp, .extxyz or .xyz, a folder or .zip of them, .npz"


def _member(path: Path, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.file_size > MEMBER_BYTES:
            raise ValueError(f"data.path: {member.filename} in {path} unpacks to more than 1 GiB; unpack it yourself")
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        except Exception as error:  # BadZipFile, zlib.error, RuntimeError when encrypted, ...
            reason = " ".join(str(error).split())
            raise ValueError(f"data.path: {member.filename} in {path} cannot be unpacked ({reason})") from None

    return read


def _stem(name: str) -> str:
    return PurePosixPath(name).name.lower().split(".")[0]


def _kind(name: str) -> str | None:
    """How a file is read, by its name; None if it is not."""
    base = PurePosixPath(name).name
    lower = base.lower().removesuffix(".gz")
    suffix = lower.rpartition(".")[2] if "." in lower else ""
    if base.upper().startswith(("POSCAR", "CONTCAR")) or suffix == "vasp":
        return "poscar"
    return {"csv": "csv", "cif": "cif", "xyz": "frame", "extxyz": "frame"}.get(suffix)


# ---- records -------------------------------------------------------------------------------------------------------


def _records(files: Files, path: Path) -> Iterator[_Record]:
    for name, read in files:
        kind = _kind(name)
        where = str(path) if path.is_file() and path.suffix.lower() != ".zip" else f"{path}: {name}"
        raw = _unpacked(where, read)
        text = raw.decode("utf-8", errors="replace")
        stem = PurePosixPath(name).as_posix().removesuffix(".gz")
        stem = stem.rpartition(".")[0] or stem
        if kind == "csv":
            yield from _rows(text, where, _stem(name))
        elif kind == "frame":
            yield from _frames(text, where, stem)
        elif kind == "cif":
            blocks = [block for block in re.split(r"(?m)^(?=data_)", text) if "_atom_site_" in block] or [text]
            for i, block in enumerate(blocks):
                several = len(blocks) > 1
                yield _Record(
                    f"{where} record {i + 1}" if several else where, "cif", block, _numbered(stem, i, several)
                )
        else:
            yield _Record(where, "poscar", text, stem)


def _unpacked(where: str, read: Callable[[], bytes]) -> bytes:
    try:
        return unpacked(where, read())
    except ValueError as error:
        raise ValueError(f"data.path: {where} {error}") from None


def _numbered(stem: str, i: int, several: bool) -> str:
    return f"{stem}#{i}" if several else stem


def _rows(text: str, where: str, stem: str) -> Iterator[_Record]:
    """Of a table: one crystal a row, numeric columns kept."""
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(io.StringIO(text, newline=""))
    if not table.fieldnames:
        raise ValueError(f"data.path: {where} is empty; give a table with a column cif")
    if "cif" not in table.fieldnames:
        raise ValueError(f"data.path: {where} has no column cif (it has {', '.join(table.fieldnames)}); add it")
    for i, row in enumerate(table):
        name = row.get("material_id") or row.get("id") or str(i + 1)
        columns: dict[str, float] = {}
        for key, value in row.items():
            if key and key not in ("cif", "material_id", "id") and isinstance(value, str):
                columns[key] = _value(value)
        split = stem if stem in (*SPLITS, "all") else ""
        yield _Record(f"{where} record {i + 1} ({name})", "cif", row["cif"] or "", name, split, columns)


def _value(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _frames(text: str, where: str, stem: str) -> Iterator[_Record]:
    """Of a file of extended XYZ, one after the other."""
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    at = number = 0
    if not lines:
        yield _Record(where, "frame", "", stem)
    while at < len(lines):
        count = int(lines[at]) if lines[at].strip().isdigit() else -1
        several = number > 0 or at + count + 2 < len(lines)
        record = f"{where} record {number + 1}" if several else where
        if count < 0 or at + count + 2 > len(lines):
            problem = f"line {at + 1} is no number of atoms" if count < 0 else "it breaks off"
            yield _Record(record, "broken", problem, stem)
            return
        yield _Record(record, "frame", "\n".join(lines[at : at + count + 2]), _numbered(stem, number, several))
        at, number = at + count + 2, number + 1


def _parsed(records: list[_Record], most: int, spacegroup: bool, progress: Progress) -> _Found:
    """Every record, on all cores."""
    total = len(records)
    workers = min(CORES, 1 + total // SMALL)
    splits: dict[str, list[System]] = {}
    bad: list[str] = []
    large: list[str] = []
    tasks = (records, itertools.repeat(most), itertools.repeat(spacegroup))
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        results = pool.map(_parse, *tasks, chunksize=32) if pool else map(_parse, *tasks)
        for i, (record, result) in enumerate(zip(records, results, strict=True)):
            if isinstance(result, System):
                splits.setdefault(_split_of(record, i, total), []).append(result)
            else:
                fits, reason = result
                (bad if fits else large).append(f"{record.where}: {reason}")
            progress("parsing crystals", 1, total)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    _drop_empty_columns(splits)
    return _Found({name: Systems.of(some) for name, some in splits.items()}, bad, large)


def _drop_empty_columns(splits: dict[str, list[System]]) -> None:
    """Columns without a number, such as a formula."""
    everything = [one for part in splits.values() for one in part]
    known = {name for one in everything for name, value in one.columns.items() if np.isfinite(value)}
    for one in everything:
        for name in one.columns.keys() - known:
            del one.columns[name]


def _split_of(record: _Record, number: int, total: int) -> str:
    """The data's own, or MP20's where all of it lies in one `all.csv`; "" where there is none."""
    if record.split == "all":
        return SPLITS[sum(number >= start for start in SLICES)] if total in MP20 else ""
    return record.split


def _parse(record: _Record, max_atoms: int, spacegroup: bool) -> System | tuple[bool, str]:
    """The crystal; or whether it had the size that is wanted, and what is wrong with it."""
    if record.kind == "broken":
        return True, record.text
    try:
        made = prepared(READERS[record.kind](record.text), max_atoms)
        columns = {**made.columns, **record.columns}
        if spacegroup:
            columns["spacegroup"] = float(_spacegroup(made))
    except ValueError as error:
        return not isinstance(error, TooLarge), str(error)
    return replace(made, name=record.name, columns=columns)


def _spacegroup(one: System) -> int:
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    assert one.lattice is not None
    lattice = Lattice.from_parameters(*one.lattice.astype(float).tolist())
    structure = Structure(lattice, one.types.tolist(), one.coordinates.astype(float))
    try:
        return int(SpacegroupAnalyzer(structure, symprec=0.1).get_space_group_number())
    except Exception as error:  # spglib gives up in several ways
        raise ValueError(f"no space group can be found ({error})") from None


def read_files(path: Path, own: bool = False) -> Systems:
    """Every crystal of a file, folder or zip in order, exactly as it lies there: neither reduced nor sorted, and also
    those that could not exist. ValueError names the first that is none. own: files of molecules are passed over, and
    there may be nothing else."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"{path}: does not exist; give a file or folder of crystals")
    if path.suffix.lower() == ".npz":
        systems = Systems.load(path)
        if systems.lattice is None:
            if own:
                return Systems.of([])
            raise ValueError(f"{path}: holds molecules (no lattice), not crystals; give other files")
        return systems
    found = []
    for record in _records(_files(path, own), path):
        try:
            if record.kind == "broken":
                raise ValueError(record.text)
            one = complete(READERS[record.kind](record.text))
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}; repair or remove it") from None
        found.append(replace(one, name=record.name, columns=record.columns | one.columns))
    return Systems.of(found)


# ---- the cache -----------------------------------------------------------------------------------------------------


def _key(*about: object) -> str:
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _kept(key: str, make: Callable[[], _Found]) -> _Found:
    """What was made before under this key, or is now; a damaged file is made again."""
    folder = cache_folder() / "crystals" / key
    try:
        about = json.loads((folder / "about.json").read_text())
        splits = {name: Systems.load(folder / f"{name or 'all'}.npz") for name in about["splits"]}
        return _Found(splits, about["bad"], about["large"])
    except (OSError, ValueError, KeyError):
        found = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in found.splits.items():
            own = folder / f".{os.getpid()}.npz"
            part.save(own)
            own.replace(folder / f"{name or 'all'}.npz")
        own = folder / f".{os.getpid()}.json"
        own.write_text(json.dumps({"splits": list(found.splits), "bad": found.bad, "large": found.large}))
        own.replace(folder / "about.json")
    except OSError as error:
        warnings.warn(f"{folder}: {error.strerror}; crystals are not kept and are made again next time")
    return found
