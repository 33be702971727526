"""Parsing one crystal from text: CIF, POSCAR or a frame of extended XYZ. ValueError says what is wrong.

Readers return the crystal as written; `prepared` converts it to the normal form of training data.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np

from .._atoms.elements import NUMBERS, SYMBOLS
from .._atoms.reading import TooLarge
from .._atoms.systems import System
from .elements import in_order
from .lattices import cell_matrix, distances_of, niggli, wrap

CLOSEST = 0.5
"""Smallest distance between two atoms in Angstrom, as in structural validity; a closer pair is an error."""
THINNEST = 1.0
"""Smallest distance from an atom to its own image in Angstrom; a closer one is an error."""
TOKENS = re.compile(r"'[^']*'|\"[^\"]*\"|\S+")
LENGTHS = ("_cell_length_a", "_cell_length_b", "_cell_length_c")
ANGLES = ("_cell_angle_alpha", "_cell_angle_beta", "_cell_angle_gamma")
COORDINATES = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")


def read_cif(text: str) -> System:
    """Read the first block of a CIF. Those without symmetry are parsed here, others by pymatgen (ten times slower)."""
    if not text.strip():
        raise ValueError("it is empty")
    if missing := [tag for tag in (*LENGTHS, *ANGLES) if tag not in text]:
        raise ValueError(f"no lattice ({missing[0]} is missing)")
    plain = _plain_cif(text)
    if plain is not None:
        return plain
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen repairs the text; `prepared` and `complete` check the result
        try:
            structure = CifParser.from_str(text).parse_structures(primitive=False, on_error="raise")[0]
        except Exception as error:  # ValueError, AssertionError, KeyError, ... on malformed files
            raise ValueError(f"it cannot be parsed as a structure ({' '.join(str(error).split())[:120]})") from None
    return _of_structure(structure)


def read_poscar(text: str) -> System:
    """Read a VASP 5 POSCAR, in which line 6 names the elements."""
    from pymatgen.io.vasp import Poscar

    lines = text.splitlines()
    if len(lines) < 8:
        raise ValueError(f"{len(lines)} lines are no POSCAR")
    if re.fullmatch(r"[\d\s]+", lines[5]):
        raise ValueError("line 6 names no elements (VASP 4); add a line with them before their numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            structure = Poscar.from_str(text).structure
        except Exception as error:
            raise ValueError(f"it cannot be parsed as a structure ({' '.join(str(error).split())[:120]})") from None
    return _of_structure(structure)


def read_frame(text: str) -> System:
    """Read a frame of extended XYZ, with Lattice="..." and Properties=species:S:1:pos:R:3..."""
    lines = text.splitlines()
    comment = lines[1] if len(lines) > 1 else ""
    lattice = re.search(r'\bLattice\s*=\s*"([^"]*)"', comment, re.IGNORECASE)
    if not lattice:
        raise ValueError('no lattice (Lattice="ax ay az bx by bz cx cy cz" on the second line)')
    matrix = np.array([_number(word) for word in lattice[1].split()])
    if matrix.size != 9:
        raise ValueError(f"Lattice has {matrix.size} numbers, not 9")
    properties = re.search(r"\bProperties\s*=\s*(\S+)", comment, re.IGNORECASE)
    columns, at = {}, 0
    fields = (properties[1].strip('"') if properties else "species:S:1:pos:R:3").split(":")
    for name, width in zip(fields[::3], fields[2::3], strict=False):
        columns[name.lower()] = at
        at += int(width)
    if not {"species", "pos"} <= columns.keys():
        raise ValueError(f"Properties={':'.join(fields)} has no species and pos")
    rows = [line.split() for line in lines[2:]]
    if any(len(row) < at for row in rows):
        raise ValueError(f"a line of an atom has less than {at} words")
    types = [_element(row[columns["species"]]) for row in rows]
    first = columns["pos"]
    positions = np.array([[_number(word) for word in row[first : first + 3]] for row in rows]).reshape(-1, 3)
    matrix = matrix.reshape(3, 3)
    _finite(matrix, "the lattice")
    if abs(np.linalg.det(matrix)) < 0.1:
        raise ValueError("its lattice has no volume")
    numbers = {}
    for key, value in re.findall(r"(\w+)\s*=\s*([^\s\"]+)", re.sub(r'\w+\s*=\s*"[^"]*"', "", comment)):
        if key.lower() != "properties" and re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", value):
            numbers[key] = float(value)
    return System(np.array(types), positions @ np.linalg.inv(matrix), _parameters(matrix), columns=numbers)


READERS = {"cif": read_cif, "poscar": read_poscar, "frame": read_frame}


def complete(one: System) -> System:
    """Check that values are finite and every atom is an element; return the crystal wrapped and in float32."""
    assert one.lattice is not None
    if not len(one.types):
        raise ValueError("it has no atoms")
    if one.types.min() < 1 or one.types.max() >= len(SYMBOLS):
        raise ValueError(f"atomic numbers {one.types.min()} to {one.types.max()} are not all of elements up to 99")
    _finite(one.lattice, "the lattice")
    _finite(one.coordinates, "the coordinates")
    return replace(one, coordinates=wrap(one.coordinates), lattice=np.asarray(one.lattice, np.float32))


def prepared(one: System, max_atoms: int, keep: bool = False) -> System:
    """Return the crystal checked, Niggli reduced, and with atoms sorted by electronegativity.

    keep: leave a cell that is already reduced unchanged. TooLarge above `max_atoms`; ValueError if it is invalid.
    """
    complete(one)
    if len(one.types) > max_atoms:
        raise TooLarge.of(len(one.types), max_atoms)
    lattice = np.asarray(one.lattice, np.float64)
    lengths, angles = lattice[:3], lattice[3:]
    if (lengths <= 0).any() or (angles <= 0).any() or (angles >= 180).any():
        raise ValueError(f"a lattice of {', '.join(f'{value:g}' for value in lattice)} is impossible")
    matrix = cell_matrix(lattice)
    if abs(np.linalg.det(matrix)) < 0.1:
        raise ValueError("its lattice has no volume")
    try:
        reduced, coordinates = niggli(matrix, one.coordinates, keep)
    except Exception as error:
        raise ValueError(f"its cell cannot be reduced ({' '.join(str(error).split())[:120]})") from None
    distances = distances_of(cell_matrix(reduced), coordinates.astype(np.float64))
    image_distances = distances.diagonal()
    if image_distances.min() < THINNEST:
        raise ValueError(f"atoms are {image_distances.min():.2f} A from their own images")
    if distances.min() < CLOSEST:
        i, j = sorted(divmod(int(distances.argmin()), len(one.types)))
        raise ValueError(f"atoms {i + 1} and {j + 1} are {distances.min():.2f} A apart")
    order = in_order(one.types)
    return replace(one, types=one.types[order], coordinates=coordinates[order], lattice=reduced)


def _of_structure(structure: object) -> System:
    """Convert a pymatgen Structure."""
    from pymatgen.core import Structure

    assert isinstance(structure, Structure)
    if not structure.is_ordered:
        disordered = next(site for site in structure if not site.is_ordered)
        raise ValueError(f"partial occupancy ({disordered.species_string})")
    types = [_element(site.specie.symbol) for site in structure]
    return System(np.array(types), structure.frac_coords, np.array(structure.lattice.parameters))


def _plain_cif(text: str) -> System | None:
    """Parse a CIF that lists every atom of its cell; None if it may have symmetry or has another layout.

    ValueError if such a CIF is invalid.
    """
    values, loops = _parsed(text)
    if values is None:
        return None
    operations = [word for header, rows in loops for word in _column(header, rows, OPERATIONS)]
    if operations:
        if len(operations) > 1 or re.sub(r"\s", "", operations[0]).lower() != "x,y,z":
            return None
    else:
        group = values.get("_symmetry_space_group_name_H-M", values.get("_space_group_name_H-M_alt", ""))
        if re.sub(r"\s", "", group) != "P1" and values.get("_symmetry_Int_Tables_number") != "1":
            return None
    if not all(values.get(tag) for tag in (*LENGTHS, *ANGLES)):
        return None
    lattice = np.array([_number(values[tag]) for tag in (*LENGTHS, *ANGLES)])
    sites = [(header, rows) for header, rows in loops if COORDINATES[0] in header]
    if len(sites) != 1:
        return None
    header, rows = sites[0]
    symbol_tag = "_atom_site_type_symbol" if "_atom_site_type_symbol" in header else "_atom_site_label"
    if symbol_tag not in header or any(tag not in header for tag in COORDINATES):
        return None
    if symbol_tag == "_atom_site_label" and not all(_is_element(row[header.index(symbol_tag)]) for row in rows):
        return None  # a label such as "CuA" means copper
    symbol, axes = header.index(symbol_tag), [header.index(tag) for tag in COORDINATES]
    if any(len(row) != len(header) for row in rows):
        return None  # a comment, or a row over several lines
    if "_atom_site_occupancy" in header:
        column = header.index("_atom_site_occupancy")
        for row in rows:
            if row[column] not in (".", "?") and abs(_number(row[column]) - 1) > 1e-3:
                raise ValueError(f"partial occupancy ({row[symbol]}: {row[column]})")
    types = [_element(row[symbol]) for row in rows]
    coordinates = np.array([[_number(row[axis]) for axis in axes] for row in rows]).reshape(-1, 3)
    return System(np.array(types, np.int64), coordinates, lattice)


def _parsed(text: str) -> tuple[dict[str, str] | None, list[tuple[list[str], list[list[str]]]]]:
    """Return values by tag, and loops as (tags, rows); None instead of values if a text spans several lines."""
    values: dict[str, str] = {}
    loops: list[tuple[list[str], list[list[str]]]] = []
    heading = inside = False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith(";"):
            return None, []
        if not line or line.startswith("#"):
            continue
        words = [word.strip("'\"") for word in TOKENS.findall(line)]
        if words[0].lower() == "loop_":
            loops.append(([], []))
            heading = inside = True
        elif words[0].startswith("_"):
            if heading:
                loops[-1][0].append(words[0])
            else:
                inside = False
                values[words[0]] = words[1] if len(words) > 1 else ""
        elif words[0].lower().startswith("data_"):
            heading = inside = False
        elif inside:
            loops[-1][1].append(words)
            heading = False
    return values, loops


def _column(header: list[str], rows: list[list[str]], tags: tuple[str, ...]) -> list[str]:
    """Return the column of a loop under the first of these tags that it has; [] if it has none."""
    columns = [header.index(tag) for tag in tags if tag in header]
    return [row[column] for column in columns[:1] for row in rows if len(row) > column]


def _number(word: str) -> float:
    """Parse a number, with an uncertainty or not: "4.27(3)"."""
    try:
        return float(word.partition("(")[0])
    except ValueError:
        raise ValueError(f"{word!r} is no number") from None


def _element(symbol: str) -> int:
    """Return the atomic number of a symbol, with a charge or index or not: "Cu2+", "Cu12"."""
    letters = re.match(r"[A-Za-z]+", symbol)
    name = letters[0].capitalize() if letters else symbol
    if name not in NUMBERS:
        raise ValueError(f"unknown element {symbol!r}")
    return NUMBERS[name]


def _is_element(symbol: str) -> bool:
    letters = re.match(r"[A-Za-z]+", symbol)
    return letters is not None and letters[0].capitalize() in NUMBERS


def _finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{what} holds NaN or infinity" if what == "the lattice" else f"{what} hold NaN or infinity")


def _parameters(matrix: np.ndarray) -> np.ndarray:
    """Return the parameters (6,) of row vectors (3, 3): lengths, and angles in degrees."""
    lengths = np.linalg.norm(matrix, axis=1)
    angles = [
        np.degrees(np.arccos(np.clip(matrix[i] @ matrix[j] / (lengths[i] * lengths[j]), -1, 1)))
        for i, j in ((1, 2), (0, 2), (0, 1))
    ]
    return np.array([*lengths, *angles])
