"""Crystals from files as people have them, brought to one form and kept, or those of `generator`."""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from pydantic import Field

from ...atoms import reading
from ...atoms.files import CORES, Kind, Member, Progress, existing, frames, members
from ...atoms.reading import AtomData, Found
from ...atoms.systems import System, Systems
from . import generator
from .lattices import require
from .records import READERS, complete, prepared

OFFLINE = "prototypes"
"""The path that means crystals made here."""
VERSION = 3
"""Goes up when the same file would give other crystals."""
SPLITS = ("train", "val", "test")
PARTS = {"validation": "val", "test": "test"}
SLICES = (27_138, 36_184)
"""Where MP20's `all.csv` goes over from train to val, and from val to test."""
MP20 = range(45_229, 45_232)
"""Crystals that such a file has."""
MOST_ATOMS = 256
SMALL = 256
"""Records that are not worth a second process."""


def _form(name: str) -> str | None:
    """How a file is read, by its name; None if it is not."""
    base = PurePosixPath(name).name
    suffix = base.lower().rpartition(".")[2] if "." in base else ""
    if base.upper().startswith(("POSCAR", "CONTCAR")) or suffix == "vasp":
        return "poscar"
    return {"csv": "csv", "cif": "cif", "xyz": "frame", "extxyz": "frame"}.get(suffix)


KIND = Kind(
    "crystals", OFFLINE,
    ".csv with a column cif, .cif, POSCAR or .vasp, .extxyz and .xyz, each also .gz, a folder or .zip of them, .npz",
    _form, ("frame", "cif"), periodic=True, most=MOST_ATOMS,
)  # fmt: skip


class CrystalData(AtomData):
    """path: a .csv (or .csv.gz) with a column `cif`, or a folder or zip that has `train.csv`, `val.csv` and `test.csv`,
    or `all.csv`; a .cif, POSCAR or extended XYZ file, or a folder or zip of such; an .npz that `unilatent data
    make-crystals` wrote; or "prototypes": `num` of those it makes, built at first use. None: not set, an error.

    Every cell is Niggli reduced and every crystal's atoms are sorted by electronegativity.
    """

    kind = KIND

    num: int = Field(default=generator.NUM, ge=2)
    max_atoms: int | None = Field(default=None, ge=1, le=MOST_ATOMS)
    spacegroup: bool = False
    """Finds each space group (spglib, tolerance 0.1 A) and keeps it as the column `spacegroup`, the class where
    there is no other `label_column`; slow."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=OFFLINE, num=200)


@dataclass(frozen=True)
class _Record:
    """Text of one crystal, or of form "broken" what is wrong with it. where: for messages. split: its table's, "all" of
    a whole one; "" where it has none."""

    where: str
    form: str
    text: str
    name: str
    split: str = ""
    columns: dict[str, float] = field(default_factory=dict)


def load(
    data: CrystalData, progress: Progress | None = None, max_atoms: int | None = None
) -> tuple[Systems, Systems]:  # fmt: skip
    """Training and held-out crystals. max_atoms: of the model. What is left out, and when that is a ValueError, says
    `reading.usable`; what was parsed is kept in the cache until a file changes."""
    path, (most, _) = reading.source(data), reading.limit(data, max_atoms)
    require()
    pymatgen = reading.version("pymatgen-core")
    if path is None:
        name = f"{OFFLINE}-{generator.VERSION}-pymatgen-{pymatgen}-{data.seed}-{data.num}"
        workers = 1 if data.num <= SMALL else CORES
        made = reading.kept(name, lambda: Found({"": generator.make(data.num, data.seed, workers, progress)}))
        found = made.within(most)
    else:
        key = reading.name_of(path, VERSION, pymatgen, reading.version("spglib"), most, data.spacegroup)
        found = reading.kept(key, lambda: _parsed(path, most, data.spacegroup, progress))
    found = reading.usable(found, data, max_atoms, ["spacegroup"] if data.spacegroup else [])
    others = [name for name in (PARTS[data.held_out_part], *SPLITS[1:]) if name in found.parts]
    if "train" not in found.parts or not (others or data.held_out is None):
        return reading.divided(found.systems, data)
    train = reading.to_train_on(found.parts["train"], data)
    return train, reading.thinned(found.parts[others[0]], data) if others else train.take([])


# ---- records -------------------------------------------------------------------------------------------------------


def _members(path: Path, own: bool = False) -> list[Member]:
    """Only the tables of a folder that has the data's own split, or the whole of one."""
    found = members(path, KIND, own)
    tables = {
        name: [one for one in found if one.form == "csv" and _table(one.name) == name] for name in (*SPLITS, "all")
    }
    splits = [one for name in SPLITS for one in tables[name]] if tables["train"] else []
    return splits or tables["all"] or found


def _table(name: str) -> str:
    return PurePosixPath(name).name.lower().split(".")[0]


def _records(files: list[Member]) -> Iterator[_Record]:
    for file in files:
        try:
            text = file.read().decode("utf-8", errors="replace")
        except ValueError as error:
            if file.form == "csv":
                raise ValueError(f"data.path: {file.where} {error}; give a table with a column cif") from None
            yield _Record(file.where, "broken", str(error), file.stem)
            continue
        if file.form == "csv":
            yield from _rows(text, file.where, _table(file.name))
            continue
        texts: list[tuple[str, str]]
        if file.form == "frame":
            texts = [("broken", one) if isinstance(one, str) else ("frame", "\n".join(one)) for one in frames(text)]
        elif file.form == "cif":
            blocks = [block for block in re.split(r"(?m)^(?=data_)", text) if "_atom_site_" in block] or [text]
            texts = [("cif", block) for block in blocks]
        else:
            texts = [("poscar", text)]
        for i, (form, one) in enumerate(texts):
            several = len(texts) > 1
            where = f"{file.where}, record {i + 1}" if several else file.where
            yield _Record(where, form, one, f"{file.stem}#{i}" if several else file.stem)


def _rows(text: str, where: str, stem: str) -> Iterator[_Record]:
    """Of a table: one crystal a row, numeric columns kept."""
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(io.StringIO(text, newline=""))
    if "cif" not in (table.fieldnames or ()):
        raise ValueError(f"data.path: {where} has no column cif (it has {', '.join(table.fieldnames or ())}); add it")
    for i, row in enumerate(table):
        name = row.get("material_id") or row.get("id") or str(i + 1)
        columns: dict[str, float] = {}
        for key, value in row.items():
            if key and key not in ("cif", "material_id", "id") and isinstance(value, str):
                columns[key] = _value(value)
        split = stem if stem in (*SPLITS, "all") else ""
        yield _Record(f"{where}, record {i + 1} ({name})", "cif", row["cif"] or "", name, split, columns)


def _value(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _parsed(path: Path, most: int, spacegroup: bool, progress: Progress | None) -> Found:
    """Every crystal of at most so many atoms, on all cores."""
    if path.suffix.lower() == ".npz":
        systems = reading.load_npz(path, KIND)
        results = (
            (f"{path}, record {i + 1} ({one.name})", "", _kept_as_it_is(one, most)) for i, one in enumerate(systems)
        )
        return reading.gather(results, path, progress, len(systems))
    records = list(_records(_members(path)))
    total = len(records)
    workers = min(CORES, 1 + total // SMALL)
    tasks = (records, itertools.repeat(most), itertools.repeat(spacegroup))
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        crystals = pool.map(_parse, *tasks, chunksize=32) if pool else map(_parse, *tasks)
        results = (
            (record.where, _split_of(record, i, total), one)
            for i, (record, one) in enumerate(zip(records, crystals, strict=True))
        )
        return reading.gather(results, path, progress, total)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _kept_as_it_is(one: System, most: int) -> System | ValueError:
    """Of a file of systems: reduced only if it is not."""
    try:
        return prepared(replace(one, types=one.types.astype(np.int64)), most, keep=True)
    except ValueError as error:
        return error


def _split_of(record: _Record, number: int, total: int) -> str:
    """The data's own, or MP20's where all of it lies in one `all.csv`; "" where there is none."""
    if record.split == "all":
        return SPLITS[sum(number >= start for start in SLICES)] if total in MP20 else ""
    return record.split


def _parse(record: _Record, max_atoms: int, spacegroup: bool) -> System | ValueError:
    """The crystal, or what is wrong with it."""
    try:
        made = prepared(_read(record), max_atoms)
        columns = {**made.columns, **record.columns}
        if spacegroup:
            columns["spacegroup"] = float(_spacegroup(made))
    except ValueError as error:
        return error
    return replace(made, name=record.name, columns=columns)


def _read(record: _Record) -> System:
    if record.form == "broken":
        raise ValueError(record.text)
    return READERS[record.form](record.text)


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
    path = existing(path, KIND)
    if path.suffix.lower() == ".npz":
        return reading.load_npz(path, KIND, own)
    found = []
    for record in _records(_members(path, own)):
        try:
            one = complete(_read(record))
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}; repair or remove it") from None
        found.append(replace(one, name=record.name, columns=record.columns | one.columns))
    return Systems.of(found)
