"""Loading crystals: parsing common file formats into one normal form, with a cache; or the generated set."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from pydantic import Field

from ...listings import ALONE, Listings
from ...plain_text import decode_leniently, read_table, split_lines
from .._atoms import reading
from .._atoms.files import (
    CORES,
    ProgressCallback,
    SourceFile,
    SystemKind,
    existing,
    frames,
    number,
    source_files,
    unread_files,
)
from .._atoms.grouping import changed
from .._atoms.reading import AtomData, LoadedSystems
from .._atoms.systems import System, Systems
from ..base import Skipped
from . import generator
from .lattices import cell_matrix, distances_of, require
from .records import READERS, complete, prepared

OFFLINE, SMALL = "prototypes", "small-prototypes"
"""Values of `data.path` that request a generated set, and that of its cells of at most `generator.SMALL_ATOMS`."""
VERSION = 6
"""Version of the parsing rules, part of the name of a cache entry; raised when the same file gives other crystals."""
SPLITS = ("train", "val", "test")
"""Names of the tables of a split."""
PARTS = {"validation": "val", "test": "test"}
"""`data.held_out_part` -> name of the table."""
SLICES = (27_138, 36_184)
"""Row numbers in MP20's `all.csv` at which val and test begin."""
MP20 = range(45_229, 45_232)
"""Possible numbers of crystals in this file."""
MOST_ATOMS = 256
"""Larger crystals are never read."""
RECORDS_PER_WORKER = 256
"""Records per additional process."""


FORMS = {"csv": "csv", "cif": "cif", "vasp": "poscar", "xyz": "frame", "extxyz": "frame"}
"""Suffix of a file -> its form: a table, or one of `records.READERS`."""


def _form(name: str) -> str | None:
    """Return how a file is parsed, by its name; None if it is not read."""
    base = PurePosixPath(name).name
    if base.upper().startswith(("POSCAR", "CONTCAR")) or POSCAR_END.search(base):
        return "poscar"
    return FORMS.get(base.lower().rpartition(".")[2]) if "." in base else None


def _alike(a: System, b: System) -> bool:
    """Whether two crystals of the same elements in the same order are the same but for a step of a relaxation."""
    assert a.lattice is not None and b.lattice is not None
    first = distances_of(cell_matrix(a.lattice), a.coordinates.astype(np.float64))
    second = distances_of(cell_matrix(b.lattice), b.coordinates.astype(np.float64))
    return changed(first, second) < ALIKE


POSCAR_END = re.compile(r"[._\- ](?:poscar|contcar)$", re.IGNORECASE)
"""How names of POSCARs end that do not begin with this word: Si.poscar, Si_CONTCAR."""
ALIKE = 0.1
"""Mean relative change of interatomic distances up to which successive crystals of one file are one crystal."""
KIND = SystemKind(
    "crystals", (OFFLINE, SMALL),
    ".csv with a column cif, .cif, POSCAR, CONTCAR or .vasp, .extxyz and .xyz, each also .gz, a folder or .zip of "
    "them, .npz",
    _form, ("cif", "frame"), periodic=True, max_atoms=MOST_ATOMS, alike=_alike,
)  # fmt: skip


class CrystalData(AtomData):
    """path: a .csv (or .csv.gz) with a column `cif`; a folder or zip with `train.csv`, `val.csv` and `test.csv`, or
    with `all.csv`; a .cif, POSCAR or extended XYZ file, or a folder or zip of these; an .npz from `unilatent data
    make-crystals`; or "prototypes", a set of `num` crystals generated at first use, or "small-prototypes", one of at
    most five atoms a cell. null: not set, which is an error.

    Cells are Niggli reduced, and the atoms of each crystal are sorted by electronegativity.
    """

    kind = KIND

    num: int = Field(default=generator.NUM, ge=2)
    max_atoms: int | None = Field(default=None, ge=1, le=MOST_ATOMS)
    spacegroup: bool = False
    """Determine space groups (spglib, tolerance 0.1 A; slow) as the column `spacegroup`. It is the class label unless
    `label_column` names another column."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=OFFLINE, num=200)


@dataclass(frozen=True)
class _Record:
    """Text of one crystal, or what is wrong with it.

    where: location for messages. form: how to parse `text`; "broken": `text` is the error. split: "train", "val" or
    "test" if the table is one of these, "all" if it is the whole data set, else "".
    """

    where: str
    form: str
    text: str
    name: str
    split: str = ""
    columns: dict[str, float] = field(default_factory=dict)


def load(
    data: CrystalData, progress: ProgressCallback | None = None, max_atoms: int | None = None,
    listings: Listings = ALONE,
) -> tuple[Systems, Systems]:  # fmt: skip
    """Return training and held-out crystals. max_atoms: of the model. listings: where the state of the files
    is kept.

    `reading.usable` defines what is left out, and when that is a ValueError. Parsed crystals are cached until a file
    changes.
    """
    path, (most, _) = reading.source_path(data), reading.atom_limit(data, max_atoms)
    require()
    pymatgen = reading.package_version("pymatgen-core")
    if path is None:
        largest = generator.SMALL_ATOMS if data.path == SMALL else generator.MAX_ATOMS
        name = f"{data.path}-{generator.VERSION}-pymatgen-{pymatgen}-{data.seed}-{data.num}"
        workers = 1 if data.num <= RECORDS_PER_WORKER else CORES
        loaded = reading.cached(
            name, lambda: LoadedSystems({"": generator.make(data.num, data.seed, workers, progress, largest)})
        ).within(most)
    else:
        spglib = reading.package_version("spglib")
        key = reading.cache_name(listings, path, VERSION, pymatgen, spglib, most, data.spacegroup)
        loaded = reading.cached(key, lambda: _parsed(path, most, data.spacegroup, progress))
    loaded = reading.usable(loaded, data, max_atoms, ["spacegroup"] if data.spacegroup else [])
    held_out_parts = [name for name in (PARTS[data.held_out_part], *SPLITS[1:]) if name in loaded.parts]
    if "train" not in loaded.parts or not (held_out_parts or data.held_out is None):
        return reading.split_by_hash(loaded.systems, data)
    train = reading.require_training(loaded.parts["train"], data)
    if not held_out_parts:
        return train, train.take([])
    return train, reading.limit_held_out(loaded.parts[held_out_parts[0]], data)


# ---- records -------------------------------------------------------------------------------------------------------


def _source_files(path: Path, mixed: bool = False) -> list[SourceFile]:
    """Return the tables of a split if there are any, else `all.csv`, else every file of crystals.

    mixed: as for `source_files`; tables without a column of crystals are then those of others.
    """
    files = source_files(path, KIND, mixed)
    if mixed:
        files = [file for file in files if file.form != "csv" or _has_crystals(file)]
    tables = {
        name: [file for file in files if file.form == "csv" and _table(file.name) == name] for name in (*SPLITS, "all")
    }
    split_tables = [file for name in SPLITS for file in tables[name]] if tables["train"] else []
    return split_tables or tables["all"] or files


def _has_crystals(table: SourceFile) -> bool:
    """Whether a table has a column cif; one that cannot be read counts, so that parsing reports it."""
    try:
        header, _ = read_table(decode_leniently(table.read()), table.where)
    except ValueError:
        return True
    return any(column.lower() == "cif" for column in header)


def _table(name: str) -> str:
    """Return the name of a table without folders and suffixes, in lower case."""
    return PurePosixPath(name).name.lower().split(".")[0]


def _name(file: SourceFile, names: set[str]) -> str:
    """Return the name of a file's crystal: without the suffix, unless only that tells apart the two of a relaxation.

    These are Si.poscar and Si.contcar, or POSCAR.1 and CONTCAR.1. names: of all files, in lower case.
    """
    suffix = file.name.lower().rpartition(".")[2]
    numbered = file.form == "poscar" and suffix not in FORMS and bool(names & _partners(file.name.lower()))
    return file.name if numbered or suffix in ("poscar", "contcar") else file.stem


def _partners(name: str) -> set[str]:
    return {re.sub("poscar|contcar", other, name) for other in ("poscar", "contcar")} - {name}


def _records(files: list[SourceFile]) -> Iterator[_Record]:
    names = {file.name.lower() for file in files}
    for file in files:
        name = _name(file, names)
        try:
            text = decode_leniently(file.read())
        except ValueError as error:
            if file.form == "csv":
                raise ValueError(f"data.path: {file.where} {error}; give a table with a column cif") from None
            yield _Record(file.where, "broken", str(error), name)
            continue
        if file.form == "csv":
            yield from _rows(text, file.where, _table(file.name))
            continue
        texts: list[tuple[str, str]]
        if file.form == "frame":
            texts = [
                ("broken", lines) if isinstance(lines, str) else ("frame", "\n".join(lines)) for lines in frames(text)
            ]
        elif file.form == "cif":
            texts = [("cif", block) for block in _blocks(text)]
        else:
            texts = [("poscar", text)]
        for i, (form, record_text) in enumerate(texts):
            several = len(texts) > 1
            where = f"{file.where}, record {i + 1}" if several else file.where
            yield _Record(where, form, record_text, f"{name}#{i}" if several else name)


def _rows(text: str, where: str, stem: str) -> Iterator[_Record]:
    """Yield the crystals of a table, one per row, with its other columns as numbers (NaN if a cell is none)."""
    header, rows = read_table(text, where)
    key = next((column for column in header if column.lower() == "cif"), None)
    if key is None:
        names = ", ".join(" ".join(column.split())[:40] for column in header)
        raise ValueError(f"data.path: {where} has no column cif (it has {names}); add it")
    for i, (_, row) in enumerate(rows):
        name = row.get("material_id") or row.get("id") or str(i + 1)
        columns: dict[str, float] = {}
        for column, cell in row.items():
            if column and column not in (key, "material_id", "id"):
                value = number(cell.strip())
                columns[column] = float("nan") if value is None else value
        split = stem if stem in (*SPLITS, "all") else ""
        yield _Record(f"{where}, record {i + 1} ({' '.join(name.split())})", "cif", row[key], name, split, columns)


def _blocks(text: str) -> list[str]:
    """Return the data blocks of a CIF that hold a structure; the whole text if none does."""
    blocks: list[list[str]] = [[]]
    inside = False
    for line in split_lines(text):
        if line.startswith(";"):
            inside = not inside
        if not inside and line.lower().startswith("data_"):
            blocks.append([])
        blocks[-1].append(line)
    structures = [
        block for block in map("\n".join, blocks) if re.search(r"_atom_site[._]fract|_cell[._]length", block, re.I)
    ]
    return structures or [text]


def _parsed(
    path: Path, most: int, spacegroup: bool, progress: ProgressCallback | None, mixed: bool = False
) -> LoadedSystems:
    """Parse every crystal with at most `most` atoms, on all cores. mixed: as for `read_files`."""
    if path.suffix.lower() == ".npz":
        systems = reading.load_npz(path, KIND, mixed)
        parsed = ((f"{path}, record {i + 1} ({one.name})", "", _checked(one, most)) for i, one in enumerate(systems))
        return reading.gather(parsed, path, progress, len(systems))
    records = list(_records(_source_files(path, mixed)))
    total, unread = len(records), "" if mixed else _unread(path)
    workers = min(CORES, 1 + total // RECORDS_PER_WORKER)
    tasks = (records, itertools.repeat(most), itertools.repeat(spacegroup))
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        crystals = pool.map(_parse, *tasks, chunksize=32) if pool else map(_parse, *tasks)
        parsed = (
            (record.where, _split_of(record, i, total), crystal)
            for i, (record, crystal) in enumerate(zip(records, crystals, strict=True))
        )
        return reading.gather(parsed, path, progress, total, unread)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _unread(path: Path) -> str:
    return unread_files(path, KIND, lambda file: [_read(one) for one in _records([file])])


def _checked(one: System, most: int) -> System | ValueError:
    """Check a crystal of an .npz file, and reduce its cell unless it is reduced."""
    try:
        return prepared(replace(one, types=one.types.astype(np.int64)), most, keep=True)
    except ValueError as error:
        return error


def _split_of(record: _Record, number: int, total: int) -> str:
    """Return the part of the split that a record belongs to: that of its table, or MP20's in a complete `all.csv`."""
    if record.split == "all":
        return SPLITS[sum(number >= start for start in SLICES)] if total in MP20 else ""
    return record.split


def _parse(record: _Record, max_atoms: int, spacegroup: bool) -> System | ValueError:
    """Return the crystal, or what is wrong with it."""
    try:
        crystal = prepared(_read(record), max_atoms)
        columns = {**crystal.columns, **record.columns}
        if spacegroup:
            columns["spacegroup"] = float(_spacegroup(crystal))
    except ValueError as error:
        return error
    except Exception as error:  # one record, of millions perhaps, must not end the run
        return ValueError(f"it cannot be read ({_named(error)})")
    return replace(crystal, name=record.name, columns=columns)


def _read(record: _Record) -> System:
    if record.form == "broken":
        raise ValueError(record.text)
    return READERS[record.form](record.text)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _spacegroup(one: System) -> int:
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    assert one.lattice is not None
    lattice = Lattice.from_parameters(*one.lattice.astype(float).tolist())
    structure = Structure(lattice, one.types.tolist(), one.coordinates.astype(float))
    try:
        return int(SpacegroupAnalyzer(structure, symprec=0.1).get_space_group_number())
    except Exception as error:  # spglib fails in several ways
        raise ValueError(f"no space group can be found ({error})") from None


def read_all(path: Path) -> LoadedSystems:
    """Read every crystal of a path that may hold other files; there may be none."""
    if path.suffix.lower() != ".npz" and _source_files(path, mixed=True):
        require()
    return _parsed(path, MOST_ATOMS, spacegroup=False, progress=None, mixed=True)


def read_files(path: Path, mixed: bool = False, skipped: Skipped | None = None) -> Systems:
    """Read the crystals of a file, folder or zip without changing them: neither reduced nor sorted.

    Invalid structures are read too. ValueError names the first record that is not a complete crystal, unless `skipped`
    takes them. mixed: skip files of free systems; finding no crystal is then no error.
    """
    path = existing(path, KIND)
    if path.suffix.lower() == ".npz":
        return reading.load_npz(path, KIND, mixed)
    if not mixed and (unread := _unread(path)):
        warnings.warn(f"{path}: {unread}")
    crystals = []
    for record in _records(_source_files(path, mixed)):
        try:
            crystal = complete(_read(record))
        except Exception as error:
            reason = error if isinstance(error, ValueError) else f"it cannot be read ({_named(error)})"
            if skipped is None:
                raise ValueError(f"{record.where}: {reason}; repair or remove it") from None
            skipped(f"{record.where}: {reason}")
            continue
        if crystal.note:
            warnings.warn(f"{record.where}: no symmetry in the file; read as P 1")
        crystals.append(replace(crystal, name=record.name, columns=record.columns | crystal.columns))
    return Systems.of(crystals)
