"""Molecules from .sdf, .xyz, .extxyz and .npz files, folders and zips of them, from QM9, or made here."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from ...atoms.elements import NUMBERS
from ...atoms.files import CORES, MEMBER_BYTES, Progress, by_hash, is_periodic, share_of, unpacked
from ...atoms.systems import System, Systems
from ...config import Config
from ...files import read_json, write_json
from ...pretrained import cache_folder
from . import generator
from .chemistry import rdkit

OFFLINE = "qm9-like"
"""The path that means molecules made here."""
SUFFIXES = ("sdf", "xyz", "extxyz")
GDB9, UNCHARACTERIZED = "gdb9.sdf", "uncharacterized.txt"
CLASH = 0.4
"""Angstrom that two nuclei are always apart."""
READING = 2
"""Version of the rules below, part of what names a file of the cache."""
QM9_SPLIT = {"train": 100_000, "validation": 18_000, "test": 12_831}
QM9_COLUMNS = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv"]
"""Of the second line of a dsgdb9nsd_*.xyz, after the name and number."""
TOLD = 256
"""Records after which progress is told of."""
SHOWN = 5
"""Faults that a message names."""


class MoleculeData(Config):
    """path: a .sdf, .xyz, .extxyz (each also .gz) or .npz file of molecules, a zip or folder of such files; a folder
    with gdb9.sdf, which is QM9; or "qm9-like": molecules made here by RDKit, kept in the cache. None: not set, an
    error.
    """

    path: str | None = None
    num: int = Field(default=generator.NUM, ge=2)
    """Molecules of the set that is made here."""
    seed: int = Field(default=0, ge=0)
    """Of the set that is made here."""
    held_out: float | None = Field(default=None, ge=0)
    """How many molecules no training step sees, or below 1 which share; None: a tenth, of QM9 its validation part.
    Of QM9, so many of that part: training molecules stay the same."""
    held_out_part: Literal["validation", "test"] = "validation"
    """Which part of QM9's documented split is held out; the other one is not used."""
    max_atoms: int | None = Field(default=None, ge=1)
    """Molecules with more atoms are passed over."""
    columns: tuple[str, ...] | None = None
    """Numbers of each molecule that are kept, None: all; a name that the files do not have is an error."""
    label_column: str | None = None
    """A column of whole numbers that is the class of a molecule."""
    property_column: str | None = None
    """A column of numbers that new molecules can be asked for (`conditions.scalar`)."""
    bad_share: float = Field(default=0.01, ge=0, le=1)
    """Of all records, how many may be unusable before it is an error; fewer are left out with a warning."""

    @classmethod
    def small(cls) -> Self:
        """Made in seconds."""
        return cls(path=OFFLINE, num=300)


@dataclass(frozen=True)
class Found:
    """What files hold: molecules, and what is wrong with each record that is none."""

    systems: Systems
    faults: tuple[str, ...]


def load(
    data: MoleculeData, progress: Progress | None = None, max_atoms: int | None = None
) -> tuple[Systems, Systems]:  # fmt: skip
    """Molecules to train on, and those that no training step sees.

    max_atoms: of the model; a molecule with more is a bad record. Bad records are left out with a warning that names
    the first, or are a ValueError where they are more than `data.bad_share`; so is a path that holds no molecules, and
    none at all.
    """
    if data.path is None:
        raise ValueError(
            f"data.path: not set; give a file, folder or .zip of molecules (QM9: its folder), or {OFFLINE!r} for those "
            "made here"
        )
    found = _found(data, progress)
    systems, faults = found.systems, list(found.faults)
    total = len(systems) + len(faults)
    if data.max_atoms is not None:
        systems = systems.take(np.flatnonzero(systems.sizes <= data.max_atoms))
    if max_atoms is not None:
        large = np.flatnonzero(systems.sizes > max_atoms)
        faults += [f"{systems.names[i]}: {systems.sizes[i]} atoms, the model takes {max_atoms}" for i in large]
        systems = systems.take(np.flatnonzero(systems.sizes <= max_atoms))
    _report(faults, total, data)
    if len(systems) < 2:
        raise ValueError(f"data.path: {data.path} holds {len(systems)} molecules that can be used; give more")
    return divide(_with_columns(systems, data), data)


def read(path: Path, progress: Progress | None = None, own: bool = False) -> Found:
    """Every molecule of a file, folder or zip; ValueError where there is none. own: files of crystals are passed over,
    and there may be nothing else."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"data.path: {path} does not exist; give a file, folder or zip of molecules")
    if path.suffix.lower() == ".npz":
        systems = Systems.load(path)
        if systems.lattice is not None:
            if own:
                return Found(Systems.of([]), ())
            raise ValueError(f"data.path: {path} holds crystals; give molecules")
        return _checked(_of_systems(systems, str(path)), str(path), progress, len(systems))
    if is_qm9(path):
        return _qm9(path, progress)
    members = _members(path, own)
    if not members and not own:
        accepted = ", ".join(f".{suffix}(.gz)" for suffix in SUFFIXES)
        raise ValueError(f"data.path: {path} holds no molecules; accepted are {accepted}, and .npz or .zip of them")
    return _checked(_records(members), str(path), progress, None)


# ---- sets and their parts --------------------------------------------------------------------------------------------


def divide(systems: Systems, data: MoleculeData) -> tuple[Systems, Systems]:
    """Training and held-out molecules by the smallest hash of their names, so that more of them move few others."""
    order = by_hash(systems.names)
    if data.path is not None and is_qm9(Path(data.path).expanduser()):
        sizes = _qm9_sizes(len(systems))
        starts = {"validation": sizes["train"], "test": sizes["train"] + sizes["validation"]}
        start = starts[data.held_out_part]
        train, part = order[: sizes["train"]], order[start : start + sizes[data.held_out_part]]
        held_out = part if data.held_out is None else part[: share_of(data.held_out, len(part), len(part), "molecules")]
    else:
        wanted = 0.1 if data.held_out is None else data.held_out
        count = share_of(wanted, len(systems), len(systems) - 1, "molecules")
        held_out, train = order[:count], order[count:]
    return systems.take(sorted(train)), systems.take(sorted(held_out))


def _qm9_sizes(count: int) -> dict[str, int]:
    """Of the parts of QM9's 130,831 molecules; in proportion where some are missing."""
    total = sum(QM9_SPLIT.values())
    train, validation = (count * QM9_SPLIT[part] // total for part in ("train", "validation"))
    return {"train": train, "validation": validation, "test": count - train - validation}


def _found(data: MoleculeData, progress: Progress | None) -> Found:
    assert data.path is not None
    if data.path == OFFLINE:
        return Found(generator.cached(data.num, data.seed, CORES, progress), ())
    path = Path(data.path).expanduser()
    if not path.exists() or path.suffix.lower() == ".npz":
        return read(path, progress)
    kept = cache_folder() / "systems" / f"read-{_fingerprint(path)}.npz"
    beside = kept.with_suffix(".json")
    if kept.is_file() and beside.is_file():
        return Found(Systems.load(kept), tuple(read_json(beside, "delete it")["faults"]))
    found = read(path, progress)
    try:
        generator.keep(found.systems, kept)
        write_json(beside, {"faults": found.faults})
    except OSError as error:
        warnings.warn(f"{kept}: {error.strerror}; the molecules of {path} are read anew each time", stacklevel=2)
    return found


def _fingerprint(path: Path) -> str:
    """Of the name, size and time of every file."""
    files = sorted(other for other in path.rglob("*") if other.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256(f"{READING} {rdkit().version if _needs_rdkit(files) else ''}".encode())
    for file in files:
        about = file.stat()
        digest.update(f"{file.resolve()}\0{about.st_size}\0{about.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def _needs_rdkit(files: list[Path]) -> bool:
    return any(_bare(file.name).lower().endswith((".sdf", ".zip")) for file in files)


def _with_columns(systems: Systems, data: MoleculeData) -> Systems:
    wanted = systems.columns if data.columns is None else dict.fromkeys(data.columns)
    fields = {"data.label_column": data.label_column, "data.property_column": data.property_column}
    wanted = {**wanted, **{name: None for name in fields.values() if name is not None}}
    for name in wanted:
        if name not in systems.columns:
            known = ", ".join(systems.columns) or "none"
            field = next((field for field, own in fields.items() if name == own), "data.columns")
            raise ValueError(f"{field}: {data.path} has no column {name!r}; it has {known}")
    return replace(systems, columns={name: systems.columns[name] for name in wanted})


def _report(faults: list[str], total: int, data: MoleculeData) -> None:
    """A warning, or ValueError where there are too many."""
    if not faults:
        return
    named = "; ".join(faults[:SHOWN]) + ("; ..." if len(faults) > SHOWN else "")
    said = f"data.path: {data.path}: {len(faults)} of {total} records cannot be used ({named})"
    if len(faults) > data.bad_share * total:
        raise ValueError(f"{said}; mend or remove them, or allow more by data.bad_share={data.bad_share:g}")
    warnings.warn(f"{said}; they are left out", stacklevel=3)


# ---- records ---------------------------------------------------------------------------------------------------------

Record = tuple[str, "System | str"]
"""Where it lies, and what it holds or what is wrong with it."""


def _checked(records: Iterator[Record], where: str, progress: Progress | None, total: int | None) -> Found:
    systems, faults = [], []
    for count, (place, record) in enumerate(records, 1):
        fault = record if isinstance(record, str) else fault_of(record)
        if fault:
            faults.append(f"{place}: {fault}")
        elif isinstance(record, System):
            systems.append(record)
        if progress is not None and count % TOLD == 0:
            progress(f"reading {where}", TOLD, total or 0)
    return Found(Systems.of(systems), tuple(faults))


def _of_systems(systems: Systems, where: str) -> Iterator[Record]:
    starts = systems.starts
    for i, name in enumerate(systems.names):
        atoms = slice(starts[i], starts[i + 1])
        columns = {column: float(values[i]) for column, values in systems.columns.items()}
        system = System(systems.types[atoms], systems.coordinates[atoms], None, name, columns)
        bad = [number for number in system.types.tolist() if not 1 <= number <= 99]
        yield f"{where}, record {i + 1}", f"atomic number {bad[0]} is no element" if bad else system


def fault_of(system: System) -> str | None:
    """Why a molecule cannot be used; None if it can."""
    if not len(system.types):
        return "no atoms"
    if not np.isfinite(system.coordinates).all():
        atom = int(np.flatnonzero(~np.isfinite(system.coordinates).all(1))[0])
        return f"a coordinate of atom {atom + 1} is not a number"
    places = system.coordinates.astype(np.float64)
    distances = np.square(places[:, None] - places[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    if distances.min(initial=np.inf) < CLASH**2:
        a, b = np.unravel_index(int(distances.argmin()), distances.shape)
        return f"atoms {min(a, b) + 1} and {max(a, b) + 1} are {distances.min() ** 0.5:.2f} Angstrom apart"
    return None


@dataclass(frozen=True)
class _Member:
    """A file of a folder or archive. name: inside it, with forward slashes, without .gz; where: for messages."""

    name: str
    where: str
    read: Callable[[], bytes]


def _members(path: Path, own: bool = False) -> list[_Member]:
    """Files of molecules at a path, sorted by name; an .sdf is passed over beside an .xyz of its name. own: without
    those of crystals."""
    found = _all_members(path)
    return [one for one in found if not own or one.name.lower().endswith(".sdf") or not _is_crystal(one)]


def _is_crystal(member: _Member) -> bool:
    try:
        return is_periodic(member.read())
    except Exception:  # what cannot be read is named when it is read
        return False


def _all_members(path: Path) -> list[_Member]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        shown = {file.relative_to(path).as_posix(): file for file in files}
        return [_member(name, str(shown[name]), shown[name].read_bytes) for name in _once(shown)]
    if path.suffix.lower() != ".zip":
        return [_member(path.name, str(path), path.read_bytes)] if _is_molecule(path.name) else []
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data.path: {path} is not a whole zip archive ({error}); copy or make it again") from None

    def unpack(name: str) -> bytes:
        if archive.getinfo(name).file_size > MEMBER_BYTES:
            raise ValueError(f"unpacks to more than {MEMBER_BYTES >> 20} MiB")
        return archive.read(name)

    names = _once(sorted(set(archive.namelist())))
    return [_member(name, f"{name} in {path}", lambda name=name: unpack(name)) for name in names]  # type: ignore[misc]


def _member(name: str, where: str, read: Callable[[], bytes]) -> _Member:
    return _Member(_bare(name), where, lambda: unpacked(name, read()))


def _bare(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _once(names: Iterable[str]) -> list[str]:
    found = [name for name in names if _is_molecule(name)]
    split = {name: _bare(name).rpartition(".")[::2] for name in found}
    tables = {stem for stem, suffix in split.values() if suffix.lower() != "sdf"}
    return [name for name, (stem, suffix) in split.items() if suffix.lower() != "sdf" or stem not in tables]


def _is_molecule(name: str) -> bool:
    """By suffix; hidden files and what macOS adds to archives are none."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return _bare(name).rpartition(".")[2].lower() in SUFFIXES and not hidden


def _records(members: list[_Member]) -> Iterator[Record]:
    for member in members:
        stem, _, suffix = member.name.rpartition(".")
        try:
            content = member.read()
        except Exception as error:  # OSError, BadZipFile, zlib.error, RuntimeError when encrypted, ...
            yield member.where, f"cannot be read ({' '.join(str(error).split())})"
            continue
        if not content.strip():
            yield member.where, "empty"
        elif suffix.lower() == "sdf":
            yield from sdf_records(content, stem, member.where)
        else:
            yield from xyz_records(content.decode("utf-8", "replace"), stem, member.where)


# ---- .sdf ------------------------------------------------------------------------------------------------------------


def sdf_records(content: bytes, stem: str, where: str) -> Iterator[Record]:
    """Molecules of an .sdf, with its numeric tags as columns; hydrogens have to stand in it."""
    with rdkit().quiet():
        supplier = rdkit().Chem.ForwardSDMolSupplier(io.BytesIO(content), removeHs=False, sanitize=False)
        for i, mol in enumerate(supplier):
            yield f"{where}, record {i + 1}", "not a molecule block" if mol is None else _of_mol(mol, f"{stem}:{i + 1}")


def _of_mol(mol: Any, name: str) -> System | str:
    if not mol.GetNumConformers():
        return "no coordinates"
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    for i, (number, atom) in enumerate(zip(numbers, mol.GetAtoms(), strict=True)):
        if not 1 <= number <= 99:
            return f"atom {i + 1} is {atom.GetSymbol()!r}, not an element"
    positions = mol.GetConformer().GetPositions().astype(np.float32).reshape(-1, 3)
    columns = {tag: value for tag in mol.GetPropNames() if (value := _number(mol.GetProp(tag))) is not None}
    title = mol.GetProp("_Name") if mol.HasProp("_Name") else ""
    return System(np.array(numbers, np.uint8), positions, None, title or name, columns)


def _number(text: str) -> float | None:
    try:
        return float(text.replace("*^", "e"))
    except ValueError:
        return None


# ---- .xyz and .extxyz ------------------------------------------------------------------------------------------------

PAIR = re.compile(r"""([A-Za-z_][\w.\-]*)\s*=\s*("[^"]*"|'[^']*'|\S+)""")


def xyz_records(text: str, stem: str, where: str) -> Iterator[Record]:
    """Molecules of an .xyz, one after another; `key=value` of the second line are columns where they are numbers, and
    `Properties=` says which columns of the table are species and positions (extxyz)."""
    lines = text.splitlines()
    at = number = 0
    single = True
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        number += 1
        place = f"{where}, record {number}"
        try:
            count = int(lines[at])
        except ValueError:
            yield place, f"line {at + 1}: {lines[at].strip()[:20]!r} is no number of atoms"
            return
        table = lines[at + 2 : at + 2 + count]
        if count < 0 or len(table) < count:
            yield place, f"{count} atoms announced, {len(table)} lines follow"
            return
        comment = lines[at + 1] if at + 1 < len(lines) else ""
        single = single and not any(line.strip() for line in lines[at + 2 + count :])
        name = stem if number == 1 and single else f"{stem}:{number}"
        yield place, _of_table(table, comment, name)
        at += 2 + count
        if comment.startswith("gdb "):
            return  # frequencies, SMILES and InChI follow


def _of_table(table: list[str], comment: str, name: str) -> System | str:
    pairs = {key: value.strip("\"'") for key, value in PAIR.findall(comment)}
    if is_periodic(f"\n{comment}".encode()):
        return "it has a lattice: not a molecule"
    columns = {key: value for key in pairs if (value := _number(pairs[key])) is not None}
    if comment.startswith("gdb "):
        words = comment.split()
        name = f"gdb_{words[1]}"
        columns = dict(zip(QM9_COLUMNS, map(float, words[2:]), strict=False))
    try:
        species, first = _places(pairs.get("Properties"))
    except ValueError as error:
        return str(error)
    types, positions = [], []
    for i, line in enumerate(table):
        words = line.split()
        if len(words) < max(species, first + 2) + 1:
            return f"atom {i + 1}: {len(words)} words, not a symbol and three coordinates"
        number = NUMBERS.get(words[species].capitalize()) or _atomic_number(words[species])
        if number is None:
            return f"atom {i + 1} is {words[species]!r}, not an element"
        types.append(number)
        place = [_number(word) for word in words[first : first + 3]]
        positions.append([np.nan if value is None else value for value in place])
    return System(
        np.array(types, np.uint8), np.array(positions, np.float32).reshape(-1, 3), None, name, columns
    )  # fmt: skip


def _atomic_number(word: str) -> int | None:
    return int(word) if word.isdigit() and 1 <= int(word) <= 99 else None


def _places(properties: str | None) -> tuple[int, int]:
    """Columns of the species and of the first coordinate in an extxyz table."""
    if properties is None:
        return 0, 1
    parts, at, found = properties.split(":"), 0, {}
    for name, width in zip(parts[::3], parts[2::3], strict=False):
        found[name] = at
        at += int(width) if width.isdigit() else 1
    if "pos" not in found or not {"species", "Z"} & found.keys():
        raise ValueError(f"Properties={properties} has no species and pos")
    return found.get("species", found.get("Z", 0)), found["pos"]


# ---- QM9 -------------------------------------------------------------------------------------------------------------


def is_qm9(path: Path) -> bool:
    """Whether a folder holds QM9's gdb9.sdf."""
    return (path / GDB9).is_file()


def _qm9(folder: Path, progress: Progress | None) -> Found:
    """gdb9.sdf without the molecules of uncharacterized.txt, with the numbers of gdb9.sdf.csv where that is there."""
    excluded = _uncharacterized(folder / UNCHARACTERIZED)
    numbers = _qm9_columns(folder / f"{GDB9}.csv")

    def records() -> Iterator[Record]:
        with rdkit().quiet():
            supplier = rdkit().Chem.SDMolSupplier(str(folder / GDB9), removeHs=False, sanitize=False)
            for i, mol in enumerate(supplier):
                if i in excluded:
                    continue
                record = "not a molecule block" if mol is None else _of_mol(mol, f"gdb_{i + 1}")
                if isinstance(record, System):
                    record = replace(record, columns={**record.columns, **numbers.get(record.name, {})})
                yield f"{folder / GDB9}, record {i + 1}", record

    return _checked(records(), str(folder / GDB9), progress, None)


def _uncharacterized(path: Path) -> set[int]:
    """Indices from 0 of molecules whose geometry QM9's authors could not confirm; every table line begins with one."""
    if not path.is_file():
        warnings.warn(f"{path} is missing: the 3,054 molecules that it names stay in the set", stacklevel=2)
        return set()
    words = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {int(line[0]) - 1 for line in words if len(line) > 1 and line[0].isdigit()}


def _qm9_columns(path: Path) -> dict[str, dict[str, float]]:
    """name -> column -> number."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["mol_id"]: {key: value for key, text in row.items() if (value := _number(text or "")) is not None}
        for row in rows
        if row.get("mol_id")
    }
