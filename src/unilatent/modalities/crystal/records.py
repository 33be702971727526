"""Parsing one crystal from text: CIF, POSCAR or a frame of extended XYZ. ValueError says what is wrong.

Readers return the crystal as written; `prepared` converts it to the normal form of training data.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...plain_text import count_of, split_lines
from .._atoms.elements import NUMBERS, SYMBOLS
from .._atoms.files import number, periodic_axes
from .._atoms.reading import TooLarge
from .._atoms.systems import System
from . import symmetry
from .elements import in_order
from .lattices import cell_matrix, distances_of, elongated, niggli, vacuum, wrap

CLOSEST = 0.5
"""Smallest distance between two atoms in Angstrom, as in structural validity; a closer pair is an error."""
Loop = tuple[list[str], list[list[str]]]
"""Tags of a loop of a CIF, and its rows."""
MOST_EXPANDED = 4096
"""Atoms of a cell above which a CIF is not expanded."""
SEPARATORS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""Characters that are no line ends, and that other parsers take for ones."""
THINNEST = 1.0
"""Smallest distance from an atom to its own image in Angstrom; a closer one is an error."""
VACUUM = 10.0
"""Angstrom without atoms along a direction of the lattice from which a structure is a slab or a molecule in a box."""
TOKENS = re.compile(r"""'(?:[^'\n]|'(?=\S))*'(?=\s|$)|"(?:[^"\n]|"(?=\S))*"(?=\s|$)|(?<!\S)\#[^\n]*|\S+""")
LENGTHS = ("_cell_length_a", "_cell_length_b", "_cell_length_c")
ANGLES = ("_cell_angle_alpha", "_cell_angle_beta", "_cell_angle_gamma")
COORDINATES = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
SYMBOL = (
    "_space_group_name_h-m_alt", "_symmetry_space_group_name_h-m", "_space_group_name_h-m_full",
    "_space_group_name_h-m_ref",
)  # fmt: skip
NUMBER = ("_space_group_it_number", "_symmetry_int_tables_number")
SYMMETRY = ("_symmetry", "_space_group", "_parent_space_group")
"""How tags begin that say something about symmetry."""
UNKNOWN = ("", ".", "?")
DUMMIES = re.compile(r"(?:xx?|du|dum|dummy|q)(?:\d+[a-z]?)?|cg\d*|cen\d*|ct\d*|d\?", re.IGNORECASE)
"""Symbols of points that are no atoms: dummies, peaks of a difference map, centres of rings."""
DUMMY_LABELS = re.compile(r"(?:xx?|du|dum|dummy|q)(?:[\d_]+[a-z]?)?", re.IGNORECASE)
"""Labels of such points where no symbol is given; others, such as CG1, may be atoms."""
LEAST_TOLERANCE = 2e-4
"""Fractional deviation up to which images of a site always are one atom."""
NO_SYMMETRY = "without symmetry information, read as P 1"


def read_cif(text: str) -> System:
    """Read one block of a CIF: its cell, and every atom that its symmetry makes of its sites.

    The operations are those that it lists, or else those of the space group that it names.
    """
    if not text.strip():
        raise ValueError("it is empty")
    values, loops = _parsed(text)
    if missing := [tag for tag in (*LENGTHS, *ANGLES) if values.get(tag, "?") in UNKNOWN]:
        raise ValueError(f"no lattice ({missing[0]} is missing)")
    lattice = np.array([_number(values[tag]) for tag in (*LENGTHS, *ANGLES)])
    types, coordinates, tolerances = _sites(values, loops)
    operations, note = _operations(values, loops, lattice)
    if operations is None or len(operations) == 1:
        return System(types, coordinates, lattice, note=note)
    types, coordinates = _expanded(types, coordinates, tolerances, operations)
    return System(types, coordinates, lattice)


def _operations(
    values: dict[str, str], loops: list[Loop], lattice: np.ndarray
) -> tuple[symmetry.Operations | None, str]:  # fmt: skip
    """Return the symmetry operations, None for P 1; and a remark if the file says nothing about symmetry.

    ValueError if it says something about symmetry, but nothing of what is understood here.
    """
    columns: dict[str, list[str]] = {tag: [value] for tag, value in values.items()}
    for header, rows in loops:
        columns |= {tag: [row[i] for row in rows] for i, tag in enumerate(header) if rows}
    columns = {
        tag: words
        for tag, column in columns.items()
        if tag.startswith(SYMMETRY) and (words := [word for word in column if word.strip() not in UNKNOWN])
    }

    def known(tags: tuple[str, ...]) -> str:
        return next((columns[tag][0] for tag in tags if len(columns.get(tag, ())) == 1), "")

    listed = list(dict.fromkeys(next((columns[tag] for tag in OPERATIONS if tag in columns), [])))
    names = symmetry.Names(known(HALL), known(SYMBOL), known(NUMBER))
    if not listed:
        found = symmetry.named(names, cell_matrix(lattice))
        strange = [tag for tag in columns if not tag.endswith("_id") and (tag not in NUMBER or len(columns[tag]) > 1)]
        if found is None and strange:
            raise ValueError(f"it has neither symmetry operations nor a space group that can be read, but {strange[0]}")
        return found, NO_SYMMETRY if found is None else ""
    operations = symmetry.parsed(listed)
    named = names.hall.replace(" ", ""), names.symbol.replace(" ", ""), names.number
    if len(operations) > 1 or any(name not in ("", "P1", "1") for name in named):
        symmetry.check(operations, names)
    return operations, ""


def _sites(values: dict[str, str], loops: list[Loop]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return atomic numbers (n,), fractional coordinates (n, 3) and their tolerances (n,) of the sites of atoms."""
    found = [loop for loop in loops if COORDINATES[0] in loop[0]]
    if not found and all(tag in values for tag in COORDINATES):  # one atom needs no loop
        tags = [tag for tag in values if tag.startswith("_atom_site_")]
        found = [(tags, [[values[tag] for tag in tags]])]
    if len(found) != 1:
        raise ValueError(f"it has {len(found) or 'no'} lists of fractional coordinates ({COORDINATES[0]})")
    header, rows = found[0]
    if missing := [tag for tag in COORDINATES if tag not in header]:
        raise ValueError(f"its sites have no {missing[0]}")

    def column(tag: str) -> list[str]:
        return [row[header.index(tag)] for row in rows] if tag in header else [""] * len(rows)

    symbols, labels = column("_atom_site_type_symbol"), column("_atom_site_label")
    if not {"_atom_site_type_symbol", "_atom_site_label"} & set(header):
        raise ValueError("its sites have neither _atom_site_type_symbol nor _atom_site_label")
    flags, occupancies = column("_atom_site_calc_flag"), column("_atom_site_occupancy")
    attached = column("_atom_site_attached_hydrogens")
    names = LabelNames.within(values, labels)
    types, coordinates, tolerances = [], [], []
    axes = [header.index(tag) for tag in COORDINATES]
    for i, row in enumerate(rows):
        name = "" if flags[i].lower() == "dum" else _site_symbol(symbols[i], labels[i], names)
        if not name:
            continue
        types.append(_element(name))
        if occupancies[i] not in UNKNOWN and abs(_number(occupancies[i]) - 1) > 1e-3:
            raise ValueError(f"partial occupancy ({name}: {occupancies[i]})")
        if attached[i] not in UNKNOWN and _number(attached[i]) > 0:
            raise ValueError(f"{labels[i]} has {attached[i]} hydrogens without coordinates")
        coordinates.append([_number(row[axis]) for axis in axes])
        tolerances.append(_tolerance([row[axis] for axis in axes]))
    return np.array(types, np.int64), np.array(coordinates).reshape(-1, 3), np.array(tolerances)


def _site_symbol(symbol: str, label: str, names: LabelNames) -> str:
    """Return the symbol of a site's element; "" if the site is no atom. ValueError if the file does not say which."""
    if symbol and symbol not in UNKNOWN:
        return "" if DUMMIES.fullmatch(symbol) else symbol
    if DUMMY_LABELS.fullmatch(label):
        return ""
    if symbol:
        if _candidates(label):
            raise ValueError(f"its site {label} has no element (_atom_site_type_symbol {symbol})")
        return ""
    return names.of(label)


def _candidates(label: str) -> list[str]:
    """Return the symbols with which a label may begin, the longer one first; T and D only where no longer one does."""
    letters = re.match(r"[A-Za-z]{0,2}", label)
    assert letters is not None
    found = [name for length in (2, 1) if (name := letters[0][:length].capitalize()) in NUMBERS]
    found = list(dict.fromkeys(found))
    return found[:1] if found[1:] in (["T"], ["D"]) else found


@dataclass(frozen=True)
class LabelNames:
    """Elements by labels of sites, where no symbols are given. formula: atomic numbers in _chemical_formula_sum.

    By convention Ho1 is holmium and HO1 hydrogen. Some programs write all in capitals, though, and CL1 is chlorine.
    labels: of all sites, which show how this file writes.
    """

    labels: Sequence[str]
    formula: frozenset[int]

    @classmethod
    def within(cls, values: dict[str, str], labels: Sequence[str]) -> LabelNames:
        words = re.findall(r"[A-Za-z]+", values.get("_chemical_formula_sum", ""))
        pieces = [
            piece
            for word in words
            for piece in ([word] if word.capitalize() in NUMBERS else re.findall("[A-Z][a-z]?", word))
        ]
        return cls(labels, frozenset(NUMBERS.get(piece.capitalize(), 0) for piece in pieces) - {0})

    def of(self, label: str) -> str:
        """Return the symbol; ValueError names a label that may be either of two elements."""
        names = _candidates(label)
        if not names:
            raise ValueError(f"unknown element {label!r}")
        if len(names) == 1:
            return names[0]
        known = [name for name in names if NUMBERS[name] in self.formula]
        if len(known) == 1:
            return known[0]
        two, one = names
        if label.startswith(two):
            return two
        if label[:2].isupper() and (self._writes_lower_case or self._is_attached(label)):
            return one
        raise ValueError(
            f"its site {label} may be {one} or {two}; add _atom_site_type_symbol, or _chemical_formula_sum"
        )

    @property
    def _writes_lower_case(self) -> bool:
        """Whether a label of this file begins with a symbol of two letters in the usual case."""
        return any(label.startswith(name) for label in self.labels for name in _candidates(label)[:1] if len(name) > 1)

    def _is_attached(self, label: str) -> bool:
        """Whether a label is that of a hydrogen, followed by that of its neighbour: HO1 beside O1."""
        return label[0] == "H" and any(_candidates(other) == [label[1]] for other in self.labels)


def _tolerance(words: list[str]) -> float:
    """Return how far images of a site may be apart for being one atom, by the digits of its coordinates.

    Coordinates of three digits are right within 0.0005, and their images within three times as much.
    """
    digits = max(len(word.partition("(")[0].partition(".")[2].rstrip("0")) for word in words)
    return max(1.6 * 10.0 ** -max(digits, 2), LEAST_TOLERANCE)


def _expanded(
    types: np.ndarray, coordinates: np.ndarray, tolerances: np.ndarray, operations: symmetry.Operations
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the atoms that symmetry makes of sites; sites that make the same atoms are one."""
    all_types: list[int] = []
    atoms = np.zeros((0, 3))
    for z, site, tolerance in zip(types.tolist(), coordinates, tolerances.tolist(), strict=True):
        orbit = symmetry.orbit(operations, site, tolerance)
        apart = orbit[:, None] - atoms
        same = (np.abs(apart - np.round(apart)) < tolerance).all(-1)
        if same.any():
            other = all_types[int(np.flatnonzero(same.any(0))[0])]
            if other != z:
                raise ValueError(f"{SYMBOLS[other]} and {SYMBOLS[z]} are on the same site")
            continue
        all_types += [z] * len(orbit)
        atoms = np.concatenate([atoms, orbit])
        if len(atoms) > MOST_EXPANDED:
            raise TooLarge.of(len(atoms), MOST_EXPANDED)
    return np.array(all_types, np.int64), atoms


def read_poscar(text: str) -> System:
    """Read a VASP 5 POSCAR, in which line 6 names the elements."""
    from pymatgen.io.vasp import Poscar

    lines = split_lines(SEPARATORS.sub(" ", text))
    if len(lines) < 8:
        raise ValueError(f"a POSCAR has 8 lines or more, this has {len(lines)}")
    if re.fullmatch(r"[\d\s]+", lines[5]):
        raise ValueError("line 6 names no elements (VASP 4); add a line with them before their numbers")
    counts = [int(word) for line in lines[6:18] if re.fullmatch(r"[\d\s]+", line, re.ASCII) for word in line.split()]
    if sum(counts) > len(lines):
        raise ValueError(f"{count_of(sum(counts), 'atom')} announced in {count_of(len(lines), 'line')}")
    mode = _mode_line(lines)
    lines[mode] = lines[mode].strip(" \t'\"")  # in quotes, pymatgen reads "Cartesian" as Direct
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            structure = Poscar.from_str("\n".join(lines)).structure
        except Exception as error:
            raise ValueError(f"it cannot be parsed as a structure ({' '.join(str(error).split())[:120]})") from None
    for warning in caught:
        if "efaulting" in str(warning.message):  # pymatgen goes on with something that the file does not say
            raise ValueError(str(warning.message))
    _check_counts(lines, mode, len(structure))
    return _of_structure(structure)


def _mode_line(lines: list[str]) -> int:
    """Return the index of the line of a POSCAR that says whether coordinates are Direct or Cartesian.

    Elements and their numbers may be on several lines each.
    """
    several = next((n for n in range(1, 11) if re.match(r"\s*\d+(\s|$)", "".join(lines[5 + n : 6 + n]))), 1)
    at = 5 + 2 * several
    if at < len(lines) and re.match(r"[\s'\"]*[sS]", lines[at]):
        lines[at] = lines[at].strip(" \t'\"")
        at += 1
    if at >= len(lines) or not re.match(r"[\s'\"]*[A-Za-z]", lines[at]):
        raise ValueError(f"line {at + 1} says neither Direct nor Cartesian")
    return at


def _check_counts(lines: list[str], mode: int, atoms: int) -> None:
    """ValueError if the numbers of atoms in a POSCAR fit neither its elements nor its lines of coordinates."""
    words = lines[5].split(), lines[6].split()
    if all(word.isdigit() for word in words[1]) and len(words[0]) != len(words[1]):
        raise ValueError(f"line 6 has {len(words[0])} elements, and line 7 {len(words[1])} numbers of atoms")
    first = mode + 1
    after = lines[first + atoms].split()[:3] if len(lines) > first + atoms else []
    if len(after) == 3 and all(number(word) is not None for word in after):
        raise ValueError(f"line {first + atoms + 1} has coordinates of an atom after the {atoms} announced")


def read_frame(text: str) -> System:
    """Read a frame of extended XYZ, with Lattice="..." and Properties=species:S:1:pos:R:3..."""
    lines = split_lines(text)
    comment = lines[1] if len(lines) > 1 else ""
    lattice = re.search(r'\bLattice\s*=\s*"([^"]*)"', comment, re.IGNORECASE)
    if not lattice:
        raise ValueError('no lattice (Lattice="ax ay az bx by bz cx cy cz" on the second line)')
    if not all(axes := periodic_axes(comment)):
        free = [axis for axis, is_periodic in zip("abc", axes, strict=False) if not is_periodic]
        raise ValueError(f"pbc is false along {', '.join(free)}: a slab or a molecule in a box, not a crystal")
    matrix = np.array([_number(word) for word in lattice[1].split()])
    if matrix.size != 9:
        raise ValueError(f"Lattice has {matrix.size} numbers, not 9")
    properties = re.search(r"\bProperties\s*=\s*(\S+)", comment, re.IGNORECASE)
    columns, at = {}, 0
    fields = (properties[1].strip('"') if properties else "species:S:1:pos:R:3").split(":")
    for name, width in zip(fields[::3], fields[2::3], strict=False):
        columns[name.lower()] = at
        at += int(width) if width.isdigit() else 1
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
        if key.lower() not in ("properties", "pbc") and (known := number(value)) is not None:
            numbers[key] = known
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
    if elongated(matrix):
        raise ValueError(f"a lattice of {', '.join(f'{value:g}' for value in lattice)} is too long for its width")
    try:
        reduced, coordinates = niggli(matrix, one.coordinates, keep)
    except Exception as error:
        raise ValueError(f"its cell cannot be reduced ({' '.join(str(error).split())[:120]})") from None
    widest, axis = vacuum(cell_matrix(reduced), coordinates.astype(np.float64))
    if widest > VACUUM:
        along = f"{widest:.1f} A without atoms along {'abc'[axis]}"
        raise ValueError(f"{along}: a slab or a molecule in a box, not a crystal")
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


def _parsed(text: str) -> tuple[dict[str, str], list[Loop]]:
    """Return values by tag in lower case, and loops as (tags, rows). ValueError if a loop is not whole."""
    values: dict[str, str] = {}
    loops: list[tuple[list[str], list[str]]] = []
    state, tag = "", ""
    for word, is_bare in _words(text):
        lower = word.lower() if is_bare else ""
        if lower == "loop_":
            loops.append(([], []))
            state, tag = "header", ""
        elif lower.startswith("_"):
            lower = lower.replace(".", "_")  # dictionaries write _cell_length_a or _cell.length_a
            if state == "header":
                loops[-1][0].append(lower)
            else:
                state, tag = "", lower
        elif lower.startswith(("data_", "save_")):
            state = tag = ""
        elif state:
            state = "rows"
            loops[-1][1].append(word)
        elif tag:
            values[tag] = word
            tag = ""
    rows = []
    for header, cells in loops:
        if header and len(cells) % len(header):
            raise ValueError(f"the list of {header[0]} has {len(cells)} values, not a multiple of {len(header)}")
        rows.append((header, [cells[i : i + len(header)] for i in range(0, len(cells), len(header) or 1)]))
    return values, rows


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words of a CIF, and whether each is without quotes. A text over several lines is one word."""
    paragraph: list[str] | None = None
    for line in split_lines(text):
        if line.startswith(";"):
            if paragraph is not None:
                yield "\n".join(paragraph), False
                paragraph, line = None, line[1:]
            else:
                paragraph = [line[1:]]
                continue
        if paragraph is not None:
            paragraph.append(line)
            continue
        for word in TOKENS.findall(line):
            if word[0] in "'\"" and len(word) > 1 and word[-1] == word[0]:
                yield word[1:-1], False
            elif word[0] != "#":
                yield word, True


def _number(word: str) -> float:
    """Parse a number, with an uncertainty or not: "4.27(3)"."""
    value = number(word.partition("(")[0])
    if value is None:
        raise ValueError(f"{word[:40]!r} is no number")
    return value


def _element(symbol: str) -> int:
    """Return the atomic number of a symbol, with a charge or index or not: "Cu2+", "Cu12"."""
    letters = re.match(r"[A-Za-z]+", symbol)
    name = letters[0].capitalize() if letters else symbol
    if name not in NUMBERS:
        raise ValueError(f"unknown element {symbol!r}")
    return NUMBERS[name]


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
