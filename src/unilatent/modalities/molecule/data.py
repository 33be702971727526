"""Loading molecules: .sdf, .mol2, .xyz and .npz files, folders and zips of these, QM9, or the generated set."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field

from ...listings import ALONE, Listings
from ...plain_text import count_of, decode_leniently, read_table, split_lines
from .._atoms import reading
from .._atoms.elements import NUMBERS
from .._atoms.files import (
    CORES,
    ProgressCallback,
    SourceFile,
    SystemKind,
    existing,
    frames,
    is_periodic,
    number,
    source_files,
    unread_files,
)
from .._atoms.grouping import changed
from .._atoms.reading import AtomData, LoadedSystems, TooLarge
from .._atoms.systems import System, Systems
from ..base import Skipped
from . import conformers, generator
from .chemistry import rdkit

OFFLINE = "qm9-like"
"""The value of `data.path` that requests the generated set."""
FORMS = {"sdf": "sdf", "sd": "sdf", "mol": "mol", "mol2": "mol2", "xyz": "frame", "extxyz": "frame"}
"""Suffix of a file -> its form, one of READERS."""
NEAR, STRETCHED = (1.75, 1.6, 1.2), 1.5
"""Two atoms nearer than NEAR (Angstrom; by how many of the two are hydrogens) are bonded to each other or to one atom;
no bond grows beyond both NEAR and STRETCHED times its length. Hydrogens of one molecule touch at 1.7."""
ALIKE = 0.1
"""Mean relative change of distances up to which successive molecules without such atoms are one molecule."""


def _alike(a: System, b: System) -> bool:
    """Whether two molecules of the same elements in the same order are geometries of one: no bond is another one."""
    positions = [one.coordinates.astype(np.float64) for one in (a, b)]
    first, second = (np.linalg.norm(places[:, None] - places, axis=-1) for places in positions)
    near, far = np.minimum(first, second), np.maximum(first, second)
    hydrogen = (a.types == 1).astype(int)
    limit = np.array(NEAR)[hydrogen[:, None] + hydrogen]
    bonded = (near < limit) & (near > 0)
    kept = far[bonded] < np.maximum(STRETCHED * near, limit)[bonded]
    return bool(kept.all()) and (len(kept) > 0 or changed(first, second) < ALIKE)


KIND = SystemKind(
    "molecules", (OFFLINE, conformers.NAME),
    ".sdf, .mol, .mol2, .xyz and .extxyz, each also .gz, a folder or .zip of them, .npz",
    lambda name: FORMS.get(name.lower().rpartition(".")[2]),
    ("frame", "sdf", "mol", "mol2"), periodic=False, max_atoms=sys.maxsize, alike=_alike,
)  # fmt: skip
GDB9, UNCHARACTERIZED = "gdb9.sdf", "uncharacterized.txt"
CLASH = 0.4
"""Smallest distance between two nuclei in Angstrom; closer ones make a record invalid."""
READING = 7
"""Version of the parsing rules below, part of the name of a cache entry."""
QM9_SPLIT = {"train": 100_000, "validation": 18_000, "test": 12_831}
QM9_COLUMNS = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv"]
"""Columns of the second line of a dsgdb9nsd_*.xyz, after the name and number."""
ADDED = ("it, with its", "them, with their")
FLAT = 1e-4
"""Angstrom between the least and the largest z up to which a molecule is in a plane, as drawings are."""


class MoleculeData(AtomData):
    """path: an .sdf, .mol, .mol2, .xyz, .extxyz (each also .gz) or .npz file of molecules, or a zip or folder of such
    files; a folder with gdb9.sdf (QM9); or "qm9-like", a set of `num` molecules generated with RDKit and cached; or
    "small-molecules", `num` conformers of molecules of at most four heavy atoms, likewise. null: not set, which is
    an error.
    """

    kind = KIND

    num: int = Field(default=generator.NUM, ge=2)

    @classmethod
    def small(cls) -> Self:
        """A generated set that takes seconds."""
        return cls(path=OFFLINE, num=300)


def load(
    data: MoleculeData, progress: ProgressCallback | None = None, max_atoms: int | None = None,
    listings: Listings = ALONE,
) -> tuple[Systems, Systems]:  # fmt: skip
    """Return training and held-out molecules. max_atoms: of the model. listings: where the state of the files
    is kept.

    `reading.usable` defines what is left out, and when that is a ValueError. Parsed molecules are cached until a file
    changes.
    """
    path, (most, _) = reading.source_path(data), reading.atom_limit(data, max_atoms)
    if path is None:
        loaded = _generated(data, progress)
        loaded = loaded.within(most)
    else:
        key = reading.cache_name(listings, path, READING, reading.package_version("rdkit"), most)
        loaded = reading.cached(key, lambda: read(path, most, progress))
    return split(reading.usable(loaded, data, max_atoms).systems, data)


def _generated(data: MoleculeData, progress: ProgressCallback | None) -> LoadedSystems:
    small = data.path == conformers.NAME
    name = f"{(conformers if small else generator).cache_name(data.seed)}-{data.num}"

    def make() -> LoadedSystems:
        if small:
            return LoadedSystems({"": conformers.make(data.num, data.seed, progress)})
        return LoadedSystems({"": generator.make(data.num, data.seed, CORES, progress)})

    return reading.cached(name, make)


def split(systems: Systems, data: MoleculeData) -> tuple[Systems, Systems]:
    """Return training and held-out molecules, chosen by the hash of their names.

    QM9 is split into the published sizes, scaled down if molecules are missing.
    """
    if data.path is None or not is_qm9(Path(data.path).expanduser()):
        return reading.split_by_hash(systems, data)
    order = reading.hash_order(systems.names)
    total = sum(QM9_SPLIT.values())
    train, validation = (len(systems) * QM9_SPLIT[part] // total for part in ("train", "validation"))
    parts = {"validation": order[train : train + validation], "test": order[train + validation :]}
    held_out = systems.take(sorted(parts[data.held_out_part]))
    return reading.require_training(systems.take(sorted(order[:train])), data), reading.limit_held_out(held_out, data)


# ---- records ---------------------------------------------------------------------------------------------------------

FileRecord = tuple[str, System | str]
"""Location for messages; the molecule, or what is wrong with it."""


def read(
    path: Path, most: int = sys.maxsize, progress: ProgressCallback | None = None, mixed: bool = False
) -> LoadedSystems:
    """Read every molecule with at most `most` atoms from a file, folder or zip; ValueError if it holds no such file.

    mixed: skip files of periodic systems; finding no molecule is then no error.
    """
    path, total, unread = existing(path, KIND), 0, ""
    if path.suffix.lower() == ".npz":
        systems = reading.load_npz(path, KIND, mixed)
        records, total = _of_systems(systems, str(path)), len(systems)
    else:
        records = _qm9(path) if is_qm9(path) else _records(source_files(path, KIND, mixed))
        unread = "" if mixed or is_qm9(path) else unread_files(path, KIND, _systems)
    parsed = ((where, "", _checked(record, most)) for where, record in records)
    return reading.gather(parsed, path, progress, total, unread)


def read_all(path: Path) -> LoadedSystems:
    """Read every molecule of a path that may hold other files; there may be none."""
    return read(path, mixed=True)


def read_files(path: Path, mixed: bool = False, skipped: Skipped | None = None) -> Systems:
    """Read all molecules of a path; ValueError names the first invalid one, unless `skipped` takes them.

    mixed: as for `read`.
    """
    loaded = read(path, mixed=mixed)
    for fault in loaded.bad:
        if skipped is None:
            raise ValueError(f"{fault}; repair or remove it")
        skipped(fault)
    for note in loaded.notes:
        warnings.warn(f"{path}: {note}")
    return loaded.systems


def _checked(record: System | str, most: int) -> System | ValueError:
    if isinstance(record, System) and len(record.types) > most:
        return TooLarge.of(len(record.types), most)
    fault = record if isinstance(record, str) else fault_of(record)
    return ValueError(fault) if fault or isinstance(record, str) else record


def _of_systems(systems: Systems, where: str) -> Iterator[FileRecord]:
    for i, one in enumerate(systems):
        bad = [number for number in one.types.tolist() if not 1 <= number <= 99]
        yield f"{where}, record {i + 1}", f"atomic number {bad[0]} is no element" if bad else one


def fault_of(system: System) -> str | None:
    """Return why a molecule cannot be used, or None if it can."""
    if not len(system.types):
        return "no atoms"
    if not np.isfinite(system.coordinates).all():
        atom = int(np.flatnonzero(~np.isfinite(system.coordinates).all(1))[0])
        return f"a coordinate of atom {atom + 1} is not a number"
    positions = system.coordinates.astype(np.float64)
    distances = np.square(positions[:, None] - positions[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    if distances.min(initial=np.inf) < CLASH**2:
        a, b = np.unravel_index(int(distances.argmin()), distances.shape)
        return f"atoms {min(a, b) + 1} and {max(a, b) + 1} are {distances.min() ** 0.5:.2f} Angstrom apart"
    return None


def _records(files: list[SourceFile]) -> Iterator[FileRecord]:
    for file in files:
        try:
            content = file.read()
        except ValueError as error:
            yield file.where, str(error)
            continue
        yield from READERS[file.form](content, file.stem, file.where)


def _systems(file: SourceFile) -> list[System]:
    """Return all molecules of a file; ValueError if one is invalid."""
    records = [record for _, record in READERS[file.form](file.read(), file.stem, file.where)]
    if faults := [record for record in records if isinstance(record, str)]:
        raise ValueError(faults[0])
    return [record for record in records if isinstance(record, System)]


# ---- .sdf and .mol ---------------------------------------------------------------------------------------------------

NET_CHARGE = "_NetCharge"
"""Property of a molecule whose atoms have no charges of their own, as in a .mol2: the charge of the whole."""
END = re.compile(r"^\$\$\$\$.*\n?", re.MULTILINE)
COUNTS = re.compile(r"^[ \d]{6}.*V[23]000[ \t]*$", re.MULTILINE | re.IGNORECASE)


def sdf_records(content: bytes, stem: str, where: str) -> Iterator[FileRecord]:
    """Yield the molecules of an .sdf or .mol, with numeric tags as columns.

    Hydrogens must be explicit, and coordinates those of a geometry, not of a drawing.
    """
    blocks = list(_blocks(decode_leniently(content)))
    with rdkit().quiet():
        for i, block in enumerate(blocks):
            name = f"{stem}:{i + 1}"
            yield f"{where}, record {i + 1}", _placed(_of_block(block, name), name, len(blocks))


def _placed(record: System | str, name: str, count: int) -> System | str:
    """Name a record of a file of several by its place and title, so that neighbours can be told (`grouping`). A file of
    one record has its title alone."""
    if isinstance(record, str) or count == 1 or record.name == name:
        return record
    return replace(record, name=f"{name} {record.name}")


def _blocks(text: str) -> Iterator[str]:
    """Yield the records of an .sdf. Blank lines at its end are none; a record without its end ($$$$) is one."""
    parts = END.split("\n".join(split_lines(text)) + "\n")
    if not parts[-1].strip():
        parts.pop()
    for part in parts:
        lines = [part.count("\n", 0, counts.start()) - 3 for counts in COUNTS.finditer(part)]
        if len(lines) < 2:
            yield part
            continue
        rows = part.split("\n")
        for begin, end in zip([0, *lines[1:]], [*lines[1:], len(rows)], strict=True):
            yield "\n".join(rows[begin:end]) + "\n"


def _of_block(block: str, name: str, checked: bool = True) -> System | str:
    """Parse one record of an .sdf. checked: refuse drawings, and molecules without their hydrogens."""

    def parse() -> Any:
        supplier = rdkit().Chem.SDMolSupplier()
        supplier.SetData(block + "$$$$\n", removeHs=False, sanitize=False)
        return next(iter(supplier), None)

    code = split_lines(block)[1][20:22].upper() if block.count("\n") > 1 else ""
    return _parsed(parse, name, checked, code == "2D")


def _parsed(parse: Callable[[], Any], name: str, checked: bool, marked: bool = False) -> System | str:
    """Return the molecule of an RDKit molecule. checked: as in `_of_block`. marked: as in `_is_drawing`."""
    try:
        mol = parse()
        if mol is None:
            return "not a molecule block"
        system = _of_mol(mol, name)
        if isinstance(system, str) or not checked:
            return system
        missing = _missing_hydrogens(mol)
    except (ValueError, RuntimeError, KeyError) as error:  # RDKit's errors on malformed blocks
        return f"not a molecule block ({' '.join(str(error).split())[:80]})"
    if _is_drawing(system, marked):
        return "a drawing (all z are equal), not a geometry; give 3D coordinates"
    if missing:
        return f"its bonds leave room for {count_of(missing, 'more hydrogen')}; add {ADDED[missing > 1]} coordinates"
    return system


def _is_drawing(system: System, marked: bool = False) -> bool:
    """Whether all atoms are in a plane of constant z, and no real molecule would be.

    marked: the file calls it two-dimensional. Else it is a drawing if an atom of carbon or silicon has four neighbours,
    or a hydrogen is not where hydrogens are.
    """
    z = system.coordinates[:, 2]
    if len(z) < 3 or not np.isfinite(z).all() or np.ptp(z) > FLAT:
        return False
    if marked:
        return True
    table = rdkit().Chem.GetPeriodicTable()
    radii = np.array([table.GetRcovalent(n) for n in system.types.tolist()])
    positions = system.coordinates.astype(np.float64)
    ratios = np.linalg.norm(positions[:, None] - positions[None], axis=-1) / (radii[:, None] + radii)
    np.fill_diagonal(ratios, np.inf)
    is_carbon = (system.types == 6) | (system.types == 14)
    nearest = ratios[system.types == 1].min(1)
    return bool(((ratios < 1.25).sum(1)[is_carbon] > 3).any() or (nearest > 1.25).any())


def _missing_hydrogens(mol: Any) -> int:
    """Return how many hydrogens the bonds of a molecule leave room for; 0 if several atoms have no bonds at all.

    An atom with a bond too many is charged, and its counterpart lacks one: no hydrogen is missing there.
    """
    if not mol.GetNumBonds() and mol.GetNumAtoms() > 1:
        return 0
    mol.UpdatePropertyCache(strict=False)
    table = rdkit().Chem.GetPeriodicTable()
    count = 0
    for atom in mol.GetAtoms():
        count += 0 if atom.GetNoImplicit() else atom.GetNumImplicitHs()
        largest = max(table.GetValenceList(atom.GetAtomicNum()), default=-1)
        if largest > 0 and not atom.GetFormalCharge():
            count -= max(0, atom.GetTotalValence() - largest)
    net = mol.GetIntProp(NET_CHARGE) if mol.HasProp(NET_CHARGE) else 0
    return max(0, count + min(0, net))


def _of_mol(mol: Any, name: str) -> System | str:
    if not mol.GetNumConformers():
        return "no coordinates"
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    for i, (atomic_number, atom) in enumerate(zip(numbers, mol.GetAtoms(), strict=True)):
        if not 1 <= atomic_number <= 99:
            return f"atom {i + 1} is {atom.GetSymbol()!r}, not an element"
    with np.errstate(over="ignore"):  # too large for float32: not a number, as `fault_of` says
        positions = mol.GetConformer().GetPositions().astype(np.float32).reshape(-1, 3)
    columns = {tag: value for tag in mol.GetPropNames() if (value := number(mol.GetProp(tag).strip())) is not None}
    title = mol.GetProp("_Name") if mol.HasProp("_Name") else ""
    return System(np.array(numbers, np.uint8), positions, None, title or name, columns)


# ---- .mol2 ----------------------------------------------------------------------------------------------------------

MOLECULE = re.compile(r"^(?!#)(.*)@<TRIPOS>MOLECULE", re.MULTILINE | re.IGNORECASE)
ATOMS = re.compile(r"^\s*@<TRIPOS>ATOM\b", re.MULTILINE | re.IGNORECASE)


def mol2_records(content: bytes, stem: str, where: str) -> Iterator[FileRecord]:
    """Yield the molecules of a .mol2, with the checks of `sdf_records`.

    Atoms without the line that begins a molecule are those of one that is lost.
    """
    text = "\n".join(split_lines(decode_leniently(content))) + "\n"
    starts = [match.end(1) for match in MOLECULE.finditer(text)] or [0]
    count = 0
    with rdkit().quiet():
        for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
            lost = [match.start() for match in ATOMS.finditer(text, begin, end)][1:]
            count += 1
            name = f"{stem}:{count}"
            record = _of_mol2(text[begin : (lost or [end])[0]], name, bool(lost))
            yield f"{where}, record {count}", _placed(record, name, len(starts))
            for place in lost:
                count += 1
                line = text.count("\n", 0, place) + 1
                yield f"{where}, record {count}", f"line {line}: atoms without a line @<TRIPOS>MOLECULE before them"


def _of_mol2(block: str, name: str, lost: bool) -> System | str:
    """Parse one record of a .mol2. lost: the title of a lost molecule follows on its bonds."""
    return _parsed(lambda: _mol_of_mol2(block, lost), name, checked=True)


def _mol_of_mol2(block: str, lost: bool) -> Any:
    """Return the RDKit molecule of a record; ValueError if it is damaged. RDKit's own parser may never return."""
    sections = _sections(block)
    title, counts = [*sections.get("MOLECULE", []), "", ""][:2]
    atoms, bonds = ([line.split() for line in sections.get(key, [])] for key in ("ATOM", "BOND"))
    announced = [int(word) for word in counts.split()[:2] if re.fullmatch(r"\d{1,9}", word, re.ASCII)]
    bonds = bonds[: announced[1]] if lost and len(announced) > 1 else bonds
    if not announced or announced != [len(atoms), len(bonds)][: len(announced)]:
        raise ValueError(f"{counts.strip()[:20]!r} announced, {len(atoms)} atoms and {len(bonds)} bonds follow")
    Chem = rdkit().Chem
    mol, conformer = Chem.RWMol(), Chem.Conformer(len(atoms))
    for i, words in enumerate(atoms):
        element, position = _mol2_atom(words, i)
        atom = Chem.Atom(element)
        atom.SetNoImplicit(words[5].lower() == "o.co2")
        mol.AddAtom(atom)
        conformer.SetAtomPosition(i, position)
    mol.AddConformer(conformer)
    places = {words[0]: i for i, words in enumerate(atoms)}
    for i, words in enumerate(bonds):
        ends = [places.get(word, -1) for word in words[1:3]]
        order = BONDS.get(words[3].lower()) if len(words) > 3 else None
        if order is None or -1 in ends or ends[0] == ends[1] or mol.GetBondBetweenAtoms(*ends) is not None:
            raise ValueError(f"bond {i + 1} is {' '.join(words)[:40]!r}")
        if order != "ZERO":
            mol.AddBond(*ends, getattr(Chem.BondType, order))
    charges = [number(words[8]) if len(words) > 8 else None for words in atoms]
    net = sum(charge for charge in charges if charge is not None)
    if None not in charges and abs(net) < len(charges):
        mol.SetIntProp(NET_CHARGE, round(net))
    mol.SetProp("_Name", "" if set(title.strip()) <= {"*"} else title.strip())
    return mol


def _sections(block: str) -> dict[str, list[str]]:
    """Return the lines below each @<TRIPOS>... of a record, without comments, and blank ones below MOLECULE only."""
    sections: dict[str, list[str]] = {"": []}
    section = ""
    for line in block.split("\n"):
        if line.lstrip().startswith("@<"):
            section = line.strip().upper().removeprefix("@<TRIPOS>")
            sections.setdefault(section, [])
        elif not line.startswith("#") and (line.strip() or section == "MOLECULE"):
            sections[section].append(line)
    return sections


def _mol2_atom(words: list[str], i: int) -> tuple[int, list[float]]:
    """Return the atomic number and position of an atom: number, label, x, y, z and type of a line of a .mol2."""
    position = [value for word in words[2:5] if (value := number(word)) is not None]
    if len(words) < 6 or len(position) < 3:
        raise ValueError(f"atom {i + 1} is {' '.join(words)[:40]!r}")
    symbol = words[5].partition(".")[0]
    if symbol not in NUMBERS and symbol not in ("CL", "BR"):  # types of force fields: CA is no calcium there
        raise ValueError(f"atom {i + 1} has the type {words[5]!r}, which names no element")
    return NUMBERS[symbol.capitalize()], position


BONDS = {"1": "SINGLE", "2": "DOUBLE", "3": "TRIPLE", "am": "SINGLE", "ar": "AROMATIC", "un": "SINGLE", "nc": "ZERO"}
"""Type of a bond in a .mol2 -> its order in RDKit."""


# ---- .xyz and .extxyz ------------------------------------------------------------------------------------------------

PAIR = re.compile(r"""([A-Za-z_][\w.\-]*)\s*=\s*("[^"]*"|'[^']*'|\S+)""")


def xyz_records(content: bytes, stem: str, where: str) -> Iterator[FileRecord]:
    """Yield the molecules of an .xyz. Numeric `key=value` pairs of the second line become columns.

    In extended XYZ, `Properties=` on that line says which columns of the table are species and positions.
    """
    parsed = list(frames(decode_leniently(content)))
    for i, frame in enumerate(parsed):
        place = f"{where}, record {i + 1}"
        if isinstance(frame, str):
            yield place, frame
            continue
        qm9 = _qm9_numbers(frame[1]) if i == 0 else None
        yield place, _of_table(frame[2:], frame[1], f"{stem}:{i + 1}" if len(parsed) > 1 else stem, qm9)
        if qm9:
            return  # frequencies, SMILES and InChI follow


def _qm9_numbers(comment: str) -> dict[str, float] | None:
    """Return the properties in the second line of a dsgdb9nsd_*.xyz, NaN if unknown; None for any other line."""
    words = comment.split()
    if len(words) != 2 + len(QM9_COLUMNS) or words[0] != "gdb" or not words[1].isdigit():
        return None
    values = [number(word) for word in words[2:]]
    return {key: np.nan if value is None else value for key, value in zip(QM9_COLUMNS, values, strict=True)}


def _of_table(table: list[str], comment: str, name: str, qm9: dict[str, float] | None) -> System | str:
    pairs = {key: value.strip("\"'") for key, value in PAIR.findall(comment)}
    if is_periodic(comment):
        return "it has a lattice: not a molecule"
    columns = {key: value for key in pairs if (value := number(pairs[key])) is not None}
    if qm9:
        name, columns = f"gdb_{comment.split()[1]}", qm9
    try:
        species, first = _table_columns(pairs.get("Properties"))
    except ValueError as error:
        return str(error)
    types, positions = [], []
    for i, line in enumerate(table):
        words = line.split()
        if len(words) < max(species, first + 2) + 1:
            return f"atom {i + 1}: {len(words)} words, not a symbol and three coordinates"
        element = NUMBERS.get(words[species].capitalize()) or _atomic_number(words[species])
        if element is None:
            return f"atom {i + 1} is {words[species]!r}, not an element"
        types.append(element)
        coordinates = [number(word) for word in words[first : first + 3]]
        positions.append([np.nan if value is None else value for value in coordinates])
    with np.errstate(over="ignore"):
        places = np.array(positions, np.float32).reshape(-1, 3)
    system = System(np.array(types, np.uint8), places, None, name, columns)
    return "a drawing (all z are equal), not a geometry; give 3D coordinates" if _is_drawing(system) else system


def _atomic_number(word: str) -> int | None:
    return int(word) if re.fullmatch(r"\d{1,3}", word, re.ASCII) and 1 <= int(word) <= 99 else None


def _table_columns(properties: str | None) -> tuple[int, int]:
    """Return the columns of the species and of the first coordinate in an extended XYZ table."""
    if properties is None:
        return 0, 1
    parts, at, columns = properties.split(":"), 0, {}
    for name, width in zip(parts[::3], parts[2::3], strict=False):
        columns[name] = at
        at += int(width) if width.isdigit() else 1
    if "pos" not in columns or not {"species", "Z"} & columns.keys():
        raise ValueError(f"Properties={properties} has no species and pos")
    return columns.get("species", columns.get("Z", 0)), columns["pos"]


READERS: dict[str, Callable[[bytes, str, str], Iterator[FileRecord]]] = {
    "sdf": sdf_records, "mol": sdf_records, "mol2": mol2_records, "frame": xyz_records
}  # fmt: skip
"""Form of a file -> (content, file name without its suffix, place for messages) -> its records."""


# ---- QM9 -------------------------------------------------------------------------------------------------------------


def is_qm9(path: Path) -> bool:
    """Return whether a folder holds QM9's gdb9.sdf."""
    return (path / GDB9).is_file()


def _qm9(folder: Path) -> Iterator[FileRecord]:
    """Yield gdb9.sdf without the molecules of uncharacterized.txt, with the columns of gdb9.sdf.csv if that exists."""
    excluded = _uncharacterized(folder / UNCHARACTERIZED)
    numbers = _qm9_columns(folder / f"{GDB9}.csv")
    path = folder / GDB9
    with rdkit().quiet():
        for i, block in enumerate(_blocks(decode_leniently(path.read_bytes()))):
            if i in excluded:
                continue
            record = _of_block(block, f"gdb_{i + 1}", checked=False)
            if isinstance(record, System):
                record = replace(record, columns={**record.columns, **numbers.get(record.name, {})})
            yield f"{path}, record {i + 1}", record


def _uncharacterized(path: Path) -> set[int]:
    """Return the 0-based indices of molecules that failed QM9's consistency check; each table line begins with one."""
    if not path.is_file():
        warnings.warn(f"{path} is missing: the 3,054 molecules that it lists stay in the set", stacklevel=2)
        return set()
    words = [line.split() for line in split_lines(decode_leniently(path.read_bytes()))]
    return {int(line[0]) - 1 for line in words if len(line) > 1 and re.fullmatch(r"\d{1,9}", line[0], re.ASCII)}


def _qm9_columns(path: Path) -> dict[str, dict[str, float]]:
    """Return name -> column -> number."""
    if not path.is_file():
        return {}
    _, rows = read_table(decode_leniently(path.read_bytes()), str(path))
    return {
        row["mol_id"]: {key: value for key, text in row.items() if (value := number(text.strip())) is not None}
        for _, row in rows
        if row.get("mol_id")
    }
