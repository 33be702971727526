"""What other programs write: files of molecules and crystals are read as what they say, or refused with the reason."""

from __future__ import annotations

import codecs
import gzip
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen.core")

from unilatent.modalities._atoms.files import frames, is_periodic, number
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.crystal import data as crystals
from unilatent.modalities.crystal import symmetry
from unilatent.modalities.crystal.data import CrystalData
from unilatent.modalities.crystal.lattices import vacuum
from unilatent.modalities.crystal.records import READERS, prepared
from unilatent.modalities.molecule import bond_orders
from unilatent.modalities.molecule import data as molecules
from unilatent.modalities.molecule.data import MoleculeData


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- space groups ----------------------------------------------------------------------------------------------------

CUBE = (5.64, 5.64, 5.64, 90, 90, 90)
HEXAGON = (3.2094, 3.2094, 5.2105, 90, 90, 120)
SALT = "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\n"
GENERAL = "Zn1 Zn 0.1 0.2 0.3\nS1 S 0.4 0.45 0.2\n"


def cif(sites: str, symmetry: str = "", cell: tuple[float, ...] = CUBE) -> str:
    tags = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_x", *(f"_cell_{tag} {value}" for tag, value in zip(tags, cell, strict=True)), symmetry, "loop_"]
    lines += [f"_atom_site_{tag}" for tag in ("label", "type_symbol", "fract_x", "fract_y", "fract_z")]
    return "\n".join([*lines, sites])


def named(symbol: str) -> str:
    return f"_symmetry_space_group_name_H-M '{symbol}'"


def listed(*operations: str) -> str:
    return "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(f"'{one}'" for one in operations) + "\n"


@pytest.mark.parametrize(
    ("names", "cell", "sites", "atoms"),
    [
        (named("F m -3 m"), CUBE, SALT, 8), (named("F m 3 m"), CUBE, SALT, 8), (named("Fm3m"), CUBE, SALT, 8),
        (named("F 4/m -3 2/m"), CUBE, SALT, 8), ("_space_group_name_Hall '-F 4 2 3'", CUBE, SALT, 8),
        ("_space_group_name_H-M_alt 'F m -3 m'", CUBE, SALT, 8), ("_SYMMETRY_INT_TABLES_NUMBER 225", CUBE, SALT, 8),
        ("_space_group_IT_number 225", CUBE, SALT, 8), (named("P m 3 m"), CUBE, SALT, 2),
        (named("P 21/c"), (6, 7, 8, 90, 95, 90), GENERAL, 8), (named("P 1 21/c 1"), (6, 7, 8, 90, 95, 90), GENERAL, 8),
        (named("P2(1)/n"), (6, 7, 8, 90, 95, 90), GENERAL, 8), (named("P 1 1 21/b"), (6, 7, 8, 90, 90, 95), GENERAL, 8),
        ("_symmetry_Int_Tables_number 14", (6, 7, 8, 90, 90, 95), GENERAL, 8),
        (named("F d -3 m :1"), (5.43, 5.43, 5.43, 90, 90, 90), "Si1 Si 0 0 0\n", 8),
        (named("F d -3 m S"), (5.43, 5.43, 5.43, 90, 90, 90), "Si1 Si 0 0 0\n", 8),
        (named("F d 3 m:2"), (5.43, 5.43, 5.43, 90, 90, 90), "Si1 Si 0.125 0.125 0.125\n", 8),
        (named("R -3 m :H"), (4, 4, 10, 90, 90, 120), "Bi1 Bi 0 0 0.234\n", 6),
        (named("R -3 m"), (4, 4, 10, 90, 90, 120), "Bi1 Bi 0 0 0.234\n", 6),
        (named("R -3 m R"), (4.7, 4.7, 4.7, 57, 57, 57), "Bi1 Bi 0.234 0.234 0.234\n", 2),
        (named("R -3 m"), (4.7, 4.7, 4.7, 57, 57, 57), "Bi1 Bi 0.234 0.234 0.234\n", 2),
        (named("C m c a"), (5, 6, 7, 90, 90, 90), "Ga1 Ga 0.1 0.2 0.3\n", 16),
        (named("P b n m"), (5, 6, 7, 90, 90, 90), "Fe1 Fe 0.1 0.2 0.3\n", 8),
    ],
)  # fmt: skip
def test_a_space_group_without_operations_has_those_of_its_name(
    names: str, cell: tuple[float, ...], sites: str, atoms: int
) -> None:
    assert len(READERS["cif"](cif(sites, names, cell)).types) == atoms


def test_operations_by_name_make_the_atoms_that_listed_ones_make() -> None:
    """P 21/c: the four operations of the International Tables, and the coordinates they give."""
    cell = (6, 7, 8, 90, 95, 90)
    operations = listed("x,y,z", "-x, 1/2+y, -z+1/2", "-x,-y,-z", "x,0.5-y,z+.5")
    by_name, by_list = (
        READERS["cif"](cif("Zn1 Zn 0.1 0.2 0.3\n", text, cell)) for text in (named("P 21/c"), operations)
    )
    expected = [[0.1, 0.2, 0.3], [0.1, 0.3, 0.8], [0.9, 0.7, 0.2], [0.9, 0.8, 0.7]]
    for one in (by_name, by_list):
        assert np.allclose(sorted(one.coordinates.round(6).tolist()), expected)


@pytest.mark.parametrize(
    ("names", "cell", "words"),
    [
        (named("Q m m"), CUBE, "there is no space group 'Q m m'"),
        ("_symmetry_Int_Tables_number 231", CUBE, "there is no space group number '231'"),
        ("_space_group_name_Hall '-Z 4'", CUBE, "there is no Hall symbol"),
        (named("F m -3 m") + "\n_symmetry_Int_Tables_number 221", CUBE, r"not of one group \(F m -3 m, 221\)"),
        (named("F m -3 m"), (5.64, 5.64, 6, 90, 90, 90), "its cell does not have the symmetry of its space group"),
        (named("F d -3 m"), CUBE, "two choices of origin"),
        (named("F m -3 m") + "\n" + listed("x,y,z"), CUBE, "names the space group F m -3 m, and lists .* number 1"),
        (named("P 21/c") + "\n" + listed("x,y,z", "-x,-y,-z"), CUBE, "lists the operations of number 2"),
        ("_space_group_name_Hall '-F 4 2 3'\n" + listed("x,y,z"), CUBE, "names the space group .* lists .* number 1"),
        ("_symmetry_space_group_name_Hall 'P 1'\n" + listed("x,y,z", "-x,-y,-z"), CUBE, "lists the .* number 2"),
        (listed("x,y,z", "-x,-y,z+1/3"), CUBE, "2 symmetry operations are no space group"),
        (listed("x,y,z", "x,y"), CUBE, "'x,y' is no symmetry operation"),
        (listed("x,y,z", "x,y,w"), CUBE, "'x,y,w' is no symmetry operation"),
    ],
)
def test_a_space_group_that_cannot_be_known_is_refused(names: str, cell: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        READERS["cif"](cif(SALT, names, cell))


DOTTED = "loop_\n_space_group_symop.id\n_space_group_symop.operation_xyz\n1 'x,y,z'\n2 '-x,-y,-z'\n"


@pytest.mark.parametrize(
    ("text", "atoms"),
    [
        ("_space_group.name_H-M_alt 'F m -3 m'", 8), ("_space_group.IT_number 225", 8),
        ("_symmetry.space_group_name_H-M 'F m -3 m'", 8), ("_space_group_name_H-M_ref 'F m -3 m'", 8),
        ("_space_group.name_Hall '-F 4 2 3'", 8), ("_space_group_name_H-M_full 'F 4/m -3 2/m'", 8),
        ("loop_\n_space_group_id\n_space_group_name_H-M_alt\n1 'F m -3 m'\n", 8),
        ("loop_\n_space_group.IT_number\n225\n", 8), (DOTTED, 4),
        (DOTTED + listed("x,y,z", "-x,-y,-z"), 4), (listed("x,y,z", "-x,-y,-z", "x,y,z"), 4),
        ("_symmetry_equiv_pos_as_xyz 'x,y,z'", 2), ("_space_group_name_Hall 'P 1'\n" + listed("x,y,z"), 2),
    ],
)  # fmt: skip
def test_symmetry_is_found_under_every_tag(text: str, atoms: int) -> None:
    sites = SALT if atoms != 4 else GENERAL
    one = READERS["cif"](cif(sites, text))
    assert (len(one.types), one.note) == (atoms, "")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1\n", "_space_group_symop_magn_operation"),
        ("_parent_space_group.name_H-M_alt 'P m -3 m'", "_parent_space_group_name_h-m_alt"),
        ("_space_group_magn.name_BNS 'P m -3 m'", "_space_group_magn_name_bns"),
        ("_space_group_ssg_name 'X'", "_space_group_ssg_name"),
        ("_symmetry_cell_setting cubic", "_symmetry_cell"),
        ("loop_\n_space_group_name_H-M_alt\n'P 1'\n'F m -3 m'\n", "_space_group_name_h-m_alt"),
    ],
)
def test_symmetry_that_is_not_understood_is_refused(text: str, tag: str) -> None:
    with pytest.raises(ValueError, match=f"neither symmetry operations nor a space group that can be read, but {tag}"):
        READERS["cif"](cif(SALT, text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "_symmetry_space_group_name_H-M ?",
        "_symmetry_Int_Tables_number 0",
        "_symmetry.entry_id x",
        "_symmetry_cell_setting .",
    ],
)
def test_symmetry_that_is_unknown_is_p1_with_a_note(text: str) -> None:
    one = READERS["cif"](cif(SALT, text))
    assert len(one.types) == 2 and one.note == "without symmetry information, read as P 1"


def test_every_setting_is_found_by_its_own_symbols() -> None:
    import spglib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = [spglib.get_spacegroup_type(hall) for hall in symmetry.GROUPS]
    for hall, kind in zip(symmetry.GROUPS, kinds, strict=True):
        for symbol in (kind.international_full, kind.international_full.replace(" ", "")):
            numbers = {setting.number for setting in symmetry._by_symbol(symbol)}
            assert numbers == {kind.number}, symbol
        operations = symmetry._operations(hall)
        assert symmetry._type_of(operations) == kind.number


def test_without_symmetry_a_cif_is_p1_and_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bare.cif").write_text(cif(SALT))
    (tmp_path / "known.cif").write_text(cif(SALT, named("P 1")))
    with pytest.warns(UserWarning, match=r"1 record without symmetry information, read as P 1: .*bare\.cif$"):
        train, _ = crystals.load(CrystalData(path=str(tmp_path), held_out=0))
    assert train.sizes.tolist() == [2, 2]
    with pytest.warns(UserWarning, match=r"bare\.cif: no symmetry in the file; read as P 1$"):
        crystals.read_files(tmp_path)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("0.33", "0.67"), ("0.333", "0.667"), ("0.33300", "0.66700"), ("0.3333", "0.6667"), ("0.33333", "0.66667"),
        ("0.333333", "0.666667"), ("0.3333(2)", "0.6667(2)"),
    ],
)  # fmt: skip
def test_rounded_coordinates_keep_their_symmetry(x: str, y: str) -> None:
    """Magnesium has two atoms in its cell, at 1/3 2/3 1/4 and 2/3 1/3 3/4."""
    one = READERS["cif"](cif(f"Mg1 Mg {x} {y} 0.25\n", named("P6_3/mmc"), HEXAGON))
    assert np.allclose(one.coordinates, [[1 / 3, 2 / 3, 1 / 4], [2 / 3, 1 / 3, 3 / 4]], atol=0.004)
    assert len(prepared(one, 20).types) == 2


def test_atoms_that_are_close_and_not_on_one_site_stay_an_error() -> None:
    with pytest.raises(ValueError, match="A apart"):
        prepared(READERS["cif"](cif("Mg1 Mg 0.34 0.66 0.25\n", named("P 63/m m c"), HEXAGON)), 256)


def test_a_list_of_all_atoms_with_the_name_of_their_group_is_not_multiplied() -> None:
    places = ("0 0 0", ".5 .5 0", ".5 0 .5", "0 .5 .5", ".5 .5 .5", "0 0 .5", "0 .5 0", ".5 0 0")
    sites = "".join(f"A{i} {'Na' if i < 4 else 'Cl'} {place}\n" for i, place in enumerate(places))
    assert READERS["cif"](cif(sites, named("F m -3 m"))).types.tolist() == [11] * 4 + [17] * 4
    with pytest.raises(ValueError, match="Na and Cl are on the same site"):
        READERS["cif"](cif(sites.replace("Cl .5 .5 .5", "Cl 0 0 0"), named("F m -3 m")))


@pytest.mark.parametrize("site", ["X1 X", "Du1 .", "Q1 ?", "D1 D?", "Cg1 Cg", "XX1 Xx", "Dum Dum"])
def test_points_that_are_no_atoms_are_not_read(site: str) -> None:
    assert READERS["cif"](cif(SALT + f"{site} 0.2 0.2 0.2\n", named("P 1"))).types.tolist() == [11, 17]


def test_sites_flagged_as_dummies_are_not_read() -> None:
    text = cif("Na1 Na 0 0 0 d\nO1 O 0.5 0.5 0.5 dum\nXe1 Xe 0.2 0.2 0.2 .\nD1 D 0.3 0.3 0.3 d\n", named("P 1"))
    text = text.replace("_atom_site_fract_z", "_atom_site_fract_z\n_atom_site_calc_flag")
    assert READERS["cif"](text).types.tolist() == [11, 54, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (cif(SALT + "O1 ? 0.2 0.2 0.2\n", named("P 1")), r"its site O1 has no element \(_atom_site_type_symbol \?\)"),
        (cif(SALT + "O1 O ? ? ?\n", named("P 1")), r"'\?' is no number"),
        (cif(SALT + "O1 O 0.1 0.2\n", named("P 1")), "has 14 values, not a multiple of 5"),
        (
            cif("C1 C 0 0 0 3\n", named("P 1")).replace("fract_z", "fract_z\n_atom_site_attached_hydrogens"),
            "C1 has 3 hydrogens without coordinates",
        ),
    ],
)
def test_sites_that_a_cif_leaves_open_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        READERS["cif"](text)


def test_labels_name_elements_where_no_symbols_are() -> None:
    text = cif("CuA 0 0 0\nO1' 0.5 0.5 0.5\nX1 0.2 0.2 0.2\n", named("P 1")).replace("_atom_site_type_symbol\n", "")
    assert READERS["cif"](text).types.tolist() == [29, 8]


@pytest.mark.parametrize(
    ("labels", "formula", "numbers"),
    [
        ("HO1 O1", "", [1, 8]), ("Ho1 O1", "", [67, 8]), ("HO1 Ho1 O1", "", [1, 67, 8]), ("HO1 OW1", "", [1, 8]),
        ("HF1 F1", "", [1, 9]), ("HO1 N1", "H N", [1, 7]), ("HO1 O1", "Ho2 O3", [67, 8]), ("HG1 S1", "Hg S", [80, 16]),
        ("CA1 CB1 Cl1", "", [6, 6, 17]), ("Ca1 F1", "", [20, 9]), ("CA1 F1", "Ca F2", [20, 9]),
        ("CA1 O1", "C2 O", [6, 8]), ("Ca1 O1", "C2 O", [6, 8]), ("Ca1 C1", "C2 Ca", [20, 6]), ("Co1 O1", "", [27, 8]),
        ("CO1 O1", "Co O", [27, 8]), ("CO1 O1", "C O", [6, 8]), ("NA1 CL1", "Na Cl", [11, 17]),
        ("NA1 CL1", "NA1CL1", [11, 17]), ("NA1 CL1", "NaCl", [11, 17]), ("cl1 na1", "Na Cl", [17, 11]),
        ("ZN1 LI1", "", [30, 3]), ("TI1 O1", "", [22, 8]), ("DY1 D1", "", [66, 1]), ("OW1 Ox2", "", [8, 8]),
        ("FE1 O1", "Fe2 O3", [26, 8]), ("FE1 Fe2", "", [9, 26]), ("Cu1+ O2-", "", [29, 8]), ("CuA c1", "", [29, 6]),
    ],
)  # fmt: skip
def test_elements_by_labels_and_formula(labels: str, formula: str, numbers: list[int]) -> None:
    assert READERS["cif"](labelled(labels, formula)).types.tolist() == numbers


@pytest.mark.parametrize(
    ("labels", "formula", "words"),
    [
        ("HO1 N1", "", "site HO1 may be H or Ho; add _atom_site_type_symbol, or _chemical_formula_sum"),
        ("CA1 O1", "", "site CA1 may be C or Ca"), ("N1 CO1", "", "site CO1 may be C or Co"),
        ("O1 CL1", "?", "site CL1 may be C or Cl"), ("CA1 C1", "C2 Ca", "site CA1 may be C or Ca"),
        ("ca1 O1", "", "site ca1 may be C or Ca"), ("HG1 O1", "", "site HG1 may be H or Hg"),
        ("O1 Jx1", "", "unknown element 'Jx1'"),
    ],
)  # fmt: skip
def test_labels_of_either_element_are_refused(labels: str, formula: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        READERS["cif"](labelled(labels, formula))


def labelled(labels: str, formula: str) -> str:
    """A CIF whose sites have labels only."""
    sites = "".join(f"{label} 0.{2 + 5 * i} 0 0\n" for i, label in enumerate(labels.split()[:2]))
    sites += "".join(f"{label} 0.4 0.5 0.5\n" for label in labels.split()[2:])
    text = f"_chemical_formula_sum '{formula}'\n" if formula else ""
    return cif(sites, named("P 1") + "\n" + text).replace("_atom_site_type_symbol\n", "")


def test_a_symbol_is_not_a_label() -> None:
    """The element is what _atom_site_type_symbol says, in any case."""
    assert READERS["cif"](cif("HO1 HO 0 0 0\nCa1 C 0.5 0 0\n", named("P 1"))).types.tolist() == [67, 6]


# ---- slabs, relaxations, POSCAR --------------------------------------------------------------------------------------

FRAME = '2\nLattice="4 0 0 0 4 0 0 0 4" {}\nCs 0 0 0\nCl 2 2 2\n'


@pytest.mark.parametrize("pbc", ['pbc="T T F"', 'pbc="1 1 0"', "pbc=[True, True, False]", 'PBC="F T T"'])
def test_a_slab_is_no_crystal_and_no_molecule(pbc: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pbc is false along [ac]: a slab"):
        READERS["frame"](FRAME.format(pbc))
    (tmp_path / "a.xyz").write_text(FRAME.format(pbc))
    assert "it has a lattice" in molecules.read(tmp_path / "a.xyz").bad[0]


@pytest.mark.parametrize(
    ("comment", "periodic"),
    [
        ('Lattice="4 0 0"', True), ('Lattice="4" pbc="T T T"', True), ('Lattice="4" pbc="1 1 1"', True),
        ('Lattice="4" pbc="F F F"', False), ('Lattice="4" pbc="0 0 0"', False), ("energy=1", False), ("", False),
    ],
)  # fmt: skip
def test_what_a_frame_says_about_its_periods(comment: str, periodic: bool) -> None:
    assert is_periodic(comment) == periodic


def test_an_obvious_vacuum_is_no_crystal() -> None:
    cell = (4, 4, 25, 90, 90, 90)
    with pytest.raises(ValueError, match=r"25\.0 A without atoms along c: a slab"):
        prepared(READERS["cif"](cif("C1 C 0 0 0.5\nC2 C 0.3 0.6 0.5\n", named("P 1"), cell)), 20)
    assert len(prepared(READERS["cif"](cif("C1 C 0 0 0.1\nC2 C 0 0 0.5\nC3 C 0 0 .9\n", named("P 1"), cell)), 20).types)
    skewed = np.array([[4.0, 0, 0], [2, 3, 0], [1, 1, 12]])
    assert vacuum(skewed, np.array([[0, 0, 0.9], [0.5, 0, 0.4]]))[0] == pytest.approx(6)


POSCAR = "CsCl\n1.0\n4 0 0\n0 4 0\n0 0 {}\nCs Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"


@pytest.mark.parametrize("held_out", [1, 2, 3, 4, 5, 6, 7])
def test_steps_of_one_relaxation_are_on_one_side(held_out: int, tmp_path: Path) -> None:
    for i in range(5):
        for name in ("POSCAR", "CONTCAR"):
            folder = tmp_path / f"run{i}"
            folder.mkdir(exist_ok=True)
            (folder / (f"{name}.vasp" if i == 4 else name)).write_text(POSCAR.format(4 + i / 10))
    train, part = crystals.load(CrystalData(path=str(tmp_path), held_out=held_out))
    folders = [{name.partition("/")[0] for name in one.names} for one in (train, part)]
    assert not folders[0] & folders[1] and len(folders[1]) == max(1, held_out // 2)
    assert len(train) + len(part) == 10


def test_files_without_a_partner_are_split_as_before(tmp_path: Path) -> None:
    from unilatent.modalities._atoms.reading import hash_order

    for i in range(9):
        (tmp_path / f"POSCAR_{i}").write_text(POSCAR.format(4 + i / 10))
    _, part = crystals.load(CrystalData(path=str(tmp_path), held_out=4))
    names = [f"POSCAR_{i}" for i in range(9)]
    assert set(part.names) == {names[i] for i in hash_order(names)[:4]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (POSCAR.format(4) + "0.2 0.2 0.2\n", "line 11 has coordinates of an atom after the 2 announced"),
        (POSCAR.format(4).replace("1 1\n", "2\n"), "line 6 has 2 elements, and line 7 1 numbers of atoms"),
        (POSCAR.format(4).replace("0.5 0.5 0.5\n", ""), "cannot be parsed"),
    ],
)
def test_a_poscar_that_does_not_add_up_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        READERS["poscar"](text)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n0 0 0\n0 0 0\n", lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"), lambda text: text.replace("CsCl", "caf\xe9\u2028CsCl"),
        lambda text: text.replace("Direct", "Selective dynamics\nDirect"),
    ],
)  # fmt: skip
def test_other_ways_to_write_a_poscar(change: Callable[[str], str]) -> None:
    assert READERS["poscar"](change(POSCAR.format(4))).types.tolist() == [55, 17]


# ---- drawings and missing hydrogens ----------------------------------------------------------------------------------


def sdf(smiles: str, hydrogens: bool = True, flat: bool = False) -> str:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.MolFromSmiles(smiles)
    mol = Chem.AddHs(mol) if hydrogens else mol
    if flat:
        AllChem.Compute2DCoords(mol)
    else:
        AllChem.EmbedMolecule(mol, randomSeed=1)
    mol.SetProp("_Name", smiles)
    return Chem.MolToMolBlock(mol) + "$$$$\n"


def read(tmp_path: Path, content: str | bytes, name: str = "a.sdf") -> tuple[int, tuple[str, ...]]:
    """The number of molecules of a file, and what is wrong with the others."""
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = molecules.read(tmp_path / name)
    return len(found.systems), found.bad


SOUND = (
    "CCO", "c1ccccc1", "CC(=O)[O-]", "[NH3+]CC(=O)[O-]", "C[N+](=O)[O-]", "OS(=O)(=O)O", "CS(C)=O", "C[N+]#[C-]",
    "C1=CC=CN1", "C[Si](C)(C)C", "FS(F)(F)(F)(F)F", "[CH3]", "[C-]#[O+]", "O=[O+][O-]", "CB(O)O", "OP(=O)(O)O",
)  # fmt: skip


@pytest.mark.parametrize("smiles", SOUND)
def test_geometries_with_their_hydrogens_are_read(smiles: str, tmp_path: Path) -> None:
    assert read(tmp_path, sdf(smiles)) == (1, ())


@pytest.mark.parametrize(
    ("smiles", "missing"),
    [
        ("CCO", 6), ("C#C", 2), ("CC(=O)[O-]", 3), ("c1ccncc1", 5), ("O", 2), ("[NH3+]CC(=O)[O-]", 5), ("CS(C)=O", 6),
        ("C(Cl)(Cl)Cl", 1),
    ],
)  # fmt: skip
def test_missing_hydrogens_are_counted(smiles: str, missing: int, tmp_path: Path) -> None:
    count, [fault] = read(tmp_path, sdf(smiles, hydrogens=False))
    assert count == 0 and f"record 1: its bonds leave room for {missing} more hydrogen" in fault


def test_a_zwitterion_without_charges_lacks_no_hydrogen(tmp_path: Path) -> None:
    """QM9's .sdf has such records: N with four bonds, O with one."""
    text = "\n".join(line for line in sdf("[NH3+]CC(=O)[O-]").split("\n") if not line.startswith("M  CHG"))
    assert read(tmp_path, text) == (1, ())


@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1", "C#C", "O"])
@pytest.mark.parametrize("mark", ["2D", "  ", "3D"])
def test_drawings_are_refused(smiles: str, mark: str, tmp_path: Path) -> None:
    """By their mark, or where atoms are that no plane holds or no bond puts there."""
    text = sdf(smiles, flat=True)
    assert text.count("2D") == 1
    assert "record 1: a drawing" in read(tmp_path, text.replace("2D", mark))[1][0]


def ring() -> list[str]:
    angles = [i * math.pi / 3 for i in range(6)]
    return [
        f"{s} {r * math.cos(a):.4f} {r * math.sin(a):.4f} 0.0" for s, r in (("C", 1.395), ("H", 2.48)) for a in angles
    ]


def test_real_molecules_in_a_plane_are_read(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    benzene = "\n".join(["12", "", *ring(), ""])
    assert (
        read(tmp_path, benzene, "a.xyz")
        == read(tmp_path, "3\n\nO 0 0 0\nH .96 0 0\nH -.24 .93 0\n", "b.xyz")
        == (1, ())
    )
    mol = Chem.MolFromXYZBlock(benzene)
    rdDetermineBonds.DetermineBonds(mol)
    block = Chem.MolToMolBlock(mol)
    assert read(tmp_path, block) == read(tmp_path, block.replace("3D", "  ", 1)) == (1, ())
    assert "a drawing" in read(tmp_path, block.replace("3D", "2D", 1))[1][0]


def test_an_xyz_of_a_drawing_is_refused(tmp_path: Path) -> None:
    methane = "5\n\nC 0 0 0\nH 1.09 0 0\nH -1.09 0 0\nH 0 1.09 0\nH 0 -1.09 0\n"
    assert "a drawing" in read(tmp_path, methane, "a.xyz")[1][0]


# ---- .mol2 -----------------------------------------------------------------------------------------------------------

SYBYL = {"SP3": ".3", "SP2": ".2", "SP": ".1"}


def mol2(smiles: str, hydrogens: bool = True, flat: bool = False, aromatic: bool = True, charge: float = 0) -> str:
    """A record as other programs write it; carboxylates have the type O.co2 and aromatic bonds."""
    from rdkit import Chem

    mol = Chem.MolFromMolBlock(sdf(smiles, hydrogens, flat), removeHs=False)
    if not aromatic:
        Chem.Kekulize(mol, clearAromaticFlags=True)
    places = mol.GetConformer().GetPositions()
    carboxylate = Chem.MolFromSmarts("[OX1]=[#6][O-]")
    shared = {i for match in mol.GetSubstructMatches(carboxylate) for i in (match[0], match[2])} if aromatic else set()
    lines = ["@<TRIPOS>MOLECULE", smiles, f" {mol.GetNumAtoms()} {mol.GetNumBonds()} 0 0 0", "SMALL", "USER_CHARGES"]
    lines += ["", "@<TRIPOS>ATOM"]
    for i, (atom, (x, y, z)) in enumerate(zip(mol.GetAtoms(), places, strict=True)):
        kind = ".co2" if i in shared else ".ar" if atom.GetIsAromatic() else SYBYL.get(str(atom.GetHybridization()), "")
        kind = kind if atom.GetSymbol() in "CNOSP" else ""
        lines.append(f"{i + 1} {atom.GetSymbol()}{i} {x:.4f} {y:.4f} {z:.4f} {atom.GetSymbol()}{kind} 1 UNL "
                     f"{charge / mol.GetNumAtoms():.4f}")  # fmt: skip
    lines.append("@<TRIPOS>BOND")
    for i, bond in enumerate(mol.GetBonds()):
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        order = "ar" if bond.GetIsAromatic() or shared & set(ends) else str(int(bond.GetBondTypeAsDouble()))
        lines.append(f"{i + 1} {ends[0] + 1} {ends[1] + 1} {order}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("aromatic", [True, False])
@pytest.mark.parametrize(
    ("smiles", "charge"),
    [("CCO", 0), ("c1ccccc1", 0), ("CC(=O)[O-]", -1), ("[NH3+]CC(=O)[O-]", 0), ("C[N+](=O)[O-]", 0), ("CS(C)=O", 0),
     ("OS(=O)(=O)O", 0), ("C1=CC=CN1", 0), ("c1cnc[nH]1", 0), ("c1ccc2ccccc2c1", 0), ("CC(=O)NC", 0), ("CBr", 0),
     ("Cn1cnc2c1c(=O)n(C)c(=O)n2C", 0), ("C[NH3+]", 1), ("NC(=[NH2+])N", 1), ("C[Si](C)(C)C", 0), ("O", 0)],
)  # fmt: skip
def test_molecules_of_a_mol2_are_read(smiles: str, charge: float, aromatic: bool, tmp_path: Path) -> None:
    (tmp_path / "a.sdf").write_text(sdf(smiles))
    (tmp_path / "b.mol2").write_text(mol2(smiles, aromatic=aromatic, charge=charge))
    first, second = (molecules.read(tmp_path / name) for name in ("a.sdf", "b.mol2"))
    assert second.bad == () and second.systems.names == (smiles,)
    assert np.array_equal(first.systems.types, second.systems.types)
    assert np.allclose(first.systems.coordinates, second.systems.coordinates, atol=1e-4)


@pytest.mark.parametrize(("smiles", "missing"), [("CCO", 6), ("c1ccncc1", 5), ("CC(=O)[O-]", 3), ("O", 2), ("CBr", 3)])
def test_missing_hydrogens_and_drawings_of_a_mol2(smiles: str, missing: int, tmp_path: Path) -> None:
    count, [fault] = read(tmp_path, mol2(smiles, hydrogens=False), "a.mol2")
    assert count == 0 and f"record 1: its bonds leave room for {missing} more hydrogen" in fault
    assert "record 1: a drawing" in read(tmp_path, mol2(smiles, flat=True), "a.mol2")[1][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: text.index("@<TRIPOS>BOND") - 40], lambda text: text.replace(" C.3 ", " Qq.3 ", 1),
        lambda text: text.replace(" C.3 ", " Du ", 1), lambda text: text.replace(" 9 8 ", " 19 8 "),
        lambda text: text.replace("C0 ", "C0 nan ", 1), lambda text: text.replace("1 1 2 1", "1 1 20 1"),
        lambda text: text.replace("@<TRIPOS>ATOM", "@<TRIPOS>ATOMS"),
        lambda text: text[: text.index("SMALL")], lambda text: text.replace(" C.3 ", " ca ", 1),
        lambda text: text.replace(" C.3 ", " CA ", 1), lambda text: text.replace("1 1 2 1", "1 1 1 1"),
        lambda text: text.replace("1 1 2 1", "1 1 2 x"), lambda text: text.replace("1 1 2 1\n", ""),
        lambda text: text.replace("@<TRIPOS>MOLECULE", "MOLECULE"), lambda text: text.replace("MOLECULE\n", "MOL\n"),
    ],
)  # fmt: skip
def test_damage_to_a_mol2_costs_one_record(change: Callable[[str], str], tmp_path: Path) -> None:
    parts = ["# made elsewhere\n" + mol2("CC"), mol2("CCO"), mol2("CC=O")]
    assert change(parts[1]) != parts[1]
    count, [fault] = read(tmp_path, parts[0] + change(parts[1]) + parts[2], "a.mol2")
    assert count == 2 and "a.mol2, record 2: " in fault
    assert read(tmp_path, "".join(parts), "b.mol2") == (3, ())


@pytest.mark.parametrize("way", ["mol2", "mol2.gz", "zip"])
def test_ways_to_store_a_mol2(way: str, tmp_path: Path) -> None:
    text = (mol2("CCO") + mol2("CC")).replace("\n", "\r\n").replace("CCO", "caf\xe9").encode("latin-1")
    path = tmp_path / f"a.{way}"
    if way == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("in/a.MOL2", text)
    else:
        path.write_bytes(gzip.compress(text) if way.endswith("gz") else text)
    place = "in/a" if way == "zip" else "a"
    assert molecules.read(path).systems.names == (f"{place}:1 caf\xe9", f"{place}:2 CC")


# ---- records ---------------------------------------------------------------------------------------------------------


def trajectory(count: int = 300) -> list[str]:
    return [f"3\nstep {i}\nO 0 0 0.1\nH 0.9{i:03d} 0 0\nH -0.24 0.9{i:03d} 0\n" for i in range(count)]


@pytest.mark.parametrize(
    ("change", "good", "bad"),
    [
        (lambda frame: frame + "# restarted here\n", 300, 1),
        (lambda frame: frame + "\n\n", 300, 0),
        (lambda frame: frame.replace("H -", "# restarted\nH -"), 299, 1),
        (lambda frame: frame.replace("H -", "written by a b\nH -"), 299, 1),
        (lambda frame: frame + frame.split("\n")[4] + "\n", 299, 1),
        (lambda frame: frame[: frame.index("H -")], 299, 1),
        (lambda frame: frame[2:], 299, 1),
        (lambda frame: frame.replace("step 5\n", ""), 299, 1),
        (lambda frame: "4" + frame[1:], 299, 1),
        (lambda frame: "2" + frame[1:], 299, 1),
        (lambda frame: "303" + frame[1:], 299, 1),
        (lambda frame: "3003" + frame[1:], 299, 1),
        (lambda frame: frame.replace("0.9005", "near"), 299, 1),
        (lambda frame: frame.replace("0.9005", "nan"), 299, 1),
        (lambda frame: frame.replace("step 5", "5")[: -len("H -0.24 0.9005 0\n")], 299, 1),
    ],
)  # fmt: skip
def test_damage_costs_the_frame_it_is_in(change: Callable[[str], str], good: int, bad: int, tmp_path: Path) -> None:
    parts = trajectory()
    parts[5] = change(parts[5])
    count, faults = read(tmp_path, "".join(parts), "a.xyz")
    assert (count, len(faults)) == (good, bad), faults


def test_frames_that_are_lost_together_are_all_counted(tmp_path: Path) -> None:
    parts = [
        part.replace("H -", "H ", 1)[:-20] + "\n" if i in (5, 6, 7) else part for i, part in enumerate(trajectory(20))
    ]
    count, faults = read(tmp_path, "".join(parts), "a.xyz")
    assert count + len(faults) == 20 and count == 17
    assert list(frames("")) == [] and len(list(frames("1\n\nHe 0 0 0\nx"))) == 2


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " \n\t\n", "\r\n"])
def test_blank_lines_at_the_end_of_an_sdf_are_no_record(end: str, tmp_path: Path) -> None:
    assert read(tmp_path, sdf("CCO") + sdf("CC") + end) == (2, ())


def test_records_of_an_sdf_are_told_apart(tmp_path: Path) -> None:
    first, second = sdf("CCO"), sdf("CC")
    assert read(tmp_path, first.replace("$$$$\n", "") + second) == (2, ())
    assert read(tmp_path, first + second[:-5]) == (2, ())
    assert read(tmp_path, first + second[:200])[0] == 1 and len(read(tmp_path, first + second[:200])[1]) == 1
    count, [fault] = read(tmp_path, first + "$$$$\n" + second)
    assert count == 2 and "record 2" in fault
    (tmp_path / "b.mol").write_text(first.replace("$$$$\n", ""))
    assert molecules.read(tmp_path / "b.mol").systems.names == ("CCO",)


@pytest.mark.parametrize(
    ("comment", "name", "columns"),
    [
        ("gdb ", "a", {}), ("gdb frame 1", "a", {}), ("gdb 1 2 3", "a", {}),
        ("gdb 1 energy=-1.5*^-2", "a", {"energy": -0.015}),
        ("gdb 7\t" + " ".join(["1.5"] * 14) + " 2*^1", "gdb_7", {"mu": 1.5, "Cv": 20.0}),
    ],
)  # fmt: skip
def test_only_the_second_line_of_qm9_is_read_as_such(
    comment: str, name: str, columns: dict[str, float], tmp_path: Path
) -> None:
    (tmp_path / "a.xyz").write_text(f"3\n{comment}\nO 0 0 .1\nH .96 0 0\nH -.24 .93 1*^-6\n")
    found = molecules.read(tmp_path / "a.xyz")
    assert found.systems.names == (name,) and found.bad == ()
    assert {key: found.systems.columns[key][0] for key in columns} == columns


def test_an_unknown_property_of_qm9_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("1\ngdb 7 " + " ".join(["1.5"] * 14) + " nan\nHe 0 0 0\n")
    columns = molecules.read(tmp_path / "a.xyz").systems.columns
    assert columns["mu"][0] == 1.5 and "Cv" not in columns


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-1.5e-2", -0.015), ("1*^-3", 0.001), (".5D1", 5), ("+2.", 2), ("1_0", None), ("1,5", None), ("", None),
     ("e5", None), ("0x1", None), ("\u0661", None)],
)  # fmt: skip
def test_numbers_as_programs_write_them(text: str, value: float | None) -> None:
    assert number(text) == (None if value is None else pytest.approx(value))


# ---- text ------------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "Latin-1": lambda text: text.replace("TITLE", "caf\xe9 \xb0C").encode("latin-1"),
    "carriage returns": lambda text: text.replace("\n", "\r").encode(),
    "both line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "other separators": lambda text: text.replace("TITLE", "a\u2028b\x85c\x0bd").encode(),
}
CIF_TEXT = cif(SALT, named("F m -3 m")).replace("data_x", "data_x\n# TITLE")
TEXTS = {
    "a.xyz": "3\nTITLE\nO 0 0 .1\nH .96 0 0\nH -.24 .93 0\n" * 2, "a.cif": CIF_TEXT,
    "a.sdf": sdf("CCO").replace("CCO", "TITLE") + sdf("CC").replace("$$$$", "> <note>\nTITLE\n\n$$$$"),
    "POSCAR": POSCAR.format(4).replace("CsCl", "TITLE"), "a.extxyz": FRAME.format("name=TITLE"),
    "a.csv": f'cif,material_id\n"{CIF_TEXT}",TITLE\n',
}  # fmt: skip
ATOMS = {"a.xyz": [3, 3], "a.cif": [8], "a.sdf": [9, 8], "POSCAR": [2], "a.extxyz": [2], "a.csv": [8]}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("way", WAYS)
def test_text_of_any_program_is_read(name: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WAYS[way](TEXTS[name]))
    if name in ("a.xyz", "a.sdf"):
        train, _ = molecules.load(MoleculeData(path=str(path), held_out=0))
    else:
        train, _ = crystals.load(CrystalData(path=str(path), held_out=0))
    assert train.sizes.tolist() == ATOMS[name]
    if (name, way) == ("a.csv", "byte order mark"):
        assert train.names == ("TITLE",)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_names_of_tables(delimiter: str, tmp_path: Path) -> None:
    for part, count in (("Train", 3), ("VAL", 1)):
        rows = [delimiter.join(("CIF", "material_id", "gap"))]
        rows += [delimiter.join((f'"{cif(SALT, named("F m -3 m"))}"', f"m-{i}", f"{i}.5")) for i in range(count)]
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    train, part = crystals.load(CrystalData(path=str(tmp_path)))
    assert (len(train), len(part)) == (3, 1) and train.columns["gap"].tolist() == [0.5, 1.5, 2.5]


# ---- nothing is passed over ------------------------------------------------------------------------------------------


def test_files_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.xyz").write_text(trajectory()[i])
        (folder / f"{i}.pdb").write_text("none")
    for name in ("a.cml", "b.PDB.gz", "notes.txt", ".hidden.pdb", "metrics.json"):
        (folder / name).write_bytes(gzip.compress(b"none"))
    for _ in range(2):  # also from the cache
        with pytest.warns(UserWarning, match=r"set: not read: 4 \.pdb, 1 \.cml$"):
            molecules.load(MoleculeData(path=str(folder)))
    with pytest.raises(ValueError, match=r"holds no crystals; accepted .*\(not read: 4 \.pdb, 1 \.cml\)"):
        for path in folder.glob("*.xyz"):
            path.unlink()
        crystals.load(CrystalData(path=str(folder)))


def test_of_files_with_one_stem_the_preferred_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(trajectory()[0])
    for name in ("a.sdf", "a.mol", "b.mol", "b.sdf", "c.mol"):
        (tmp_path / name).write_text(sdf("CC" if name.endswith("mol") else "CCO"))
    assert molecules.read(tmp_path).systems.sizes.tolist() == [3, 9, 8]


def test_files_skipped_for_another_form_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("".join(trajectory(3)))
    for name in ("a.sdf", "a.mol", "b.sdf"):
        (tmp_path / name).write_text(sdf("CCO"))
    with pytest.warns(UserWarning, match=r"not read: 2 files next to another form of the same name: a\.mol, a\.sdf$"):
        molecules.load(MoleculeData(path=str(tmp_path), held_out=0))


@pytest.mark.parametrize("folder", ["part/", "part\\", "./part\\", ".\\part/"])
def test_names_in_zip_archives_have_either_slash(folder: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, text in enumerate(trajectory(2)):
            archive.writestr(zipfile.ZipInfo(f"{folder}{i}.xyz"), text)
        for name in (".hidden.xyz", "__MACOSX\\._0.xyz", "__MACOSX/1.xyz"):
            archive.writestr(folder + name, "none")
    found = molecules.read(tmp_path / "set.zip")
    assert (found.systems.names, found.bad, found.notes) == (("part/0", "part/1"), (), ())


@pytest.mark.parametrize("error", [NotImplementedError, ValueError, OverflowError, zipfile.BadZipFile, OSError])
def test_archives_that_cannot_be_opened_are_one_line(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error("zip file version 9.9")

    (tmp_path / "set.zip").write_bytes(b"PK")
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    for load in (
        lambda: molecules.load(MoleculeData(path=str(tmp_path / "set.zip"))),
        lambda: crystals.load(CrystalData(path=str(tmp_path / "set.zip"))),
    ):
        with pytest.raises(
            ValueError, match=r"data\.path: .*set\.zip is not a whole zip archive \(zip file version 9\.9\)"
        ):
            load()


# ---- bonds in a process of its own -----------------------------------------------------------------------------------


def test_a_long_search_in_a_process_of_its_own_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bond_orders, "SECONDS", 60)
    molecules = [([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]), ([6, 8], [[0, 0, 0], [9, 0, 0]])]
    (mol, fault), (_, rejected) = bond_orders.find_long(molecules)
    assert fault is None and mol.GetNumBonds() == 2
    assert rejected == bond_orders.REJECTED == bond_orders.find_soon(*molecules[1])[1]


# ---- POSCAR ----------------------------------------------------------------------------------------------------------

CESIUM = "CsCl\n1.0\n4 0 0\n0 4 0\n0 0 4\nCs Cl\n1 1\n{}0 0 0\n{} {} {}\n"


@pytest.mark.parametrize(
    ("mode", "place"),
    [("Direct\n", 0.5), ("direct\n", 0.5), ("'Direct'\n", 0.5), ("Fractional\n", 0.5), ("Cartesian\n", 2), ("  k\n", 2),
     ('"Cartesian"\n', 2), ("Selective dynamics\n'cart'\n", 2), ("'Selective'\nDirect\n", 0.5)],
)  # fmt: skip
def test_the_mode_of_a_poscar_in_any_spelling(mode: str, place: float) -> None:
    text = CESIUM.format(mode, place, place, place)
    if "elective" in mode:
        text = text.replace("0 0 0\n" + str(place), f"0 0 0 T T T\n{place}").rstrip() + " T T T\n"
    assert np.allclose(READERS["poscar"](text).coordinates, [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize(("mode", "line"), [("", 8), ("\n", 8), ("0.1 0.1 0.1\n", 8), ("Selective\n", 9), ("#\n", 8)])
def test_a_poscar_without_a_mode_is_refused(mode: str, line: int, tmp_path: Path) -> None:
    text = CESIUM.format(mode, 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=f"line {line} says neither Direct nor Cartesian"):
        READERS["poscar"](text)
    (tmp_path / "POSCAR").write_text(text)
    with pytest.raises(ValueError, match=f"POSCAR: line {line} says neither"):
        crystals.load(CrystalData(path=str(tmp_path)))


@pytest.mark.parametrize("error", [StopIteration, IndexError, KeyError, ZeroDivisionError])
def test_any_failure_of_a_record_is_its_fault(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> System:
        raise error("why")

    (tmp_path / "a.cif").write_text(cif(SALT, named("P 1")))
    monkeypatch.setitem(READERS, "cif", fail)
    with pytest.raises(ValueError, match=rf"a\.cif: it cannot be read \({error.__name__}: '?why'?\)"):
        crystals.load(CrystalData(path=str(tmp_path)))
    with pytest.raises(ValueError, match=rf"a\.cif: it cannot be read \({error.__name__}"):
        crystals.read_files(tmp_path)


def test_columns_with_few_numbers_are_named(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.xyz").write_text(
            trajectory()[i].replace("step", "gap=1.5 note=1,5" if i < 4 else "gap=x step")
        )
    with pytest.warns(UserWarning, match=r"most molecules have no number in gap \(4 of 9\)"):
        molecules.load(MoleculeData(path=str(tmp_path), held_out=0, property_column="gap"))


# ---- arrays of other programs ----------------------------------------------------------------------------------------

PLACES = np.array([[0, 0, 0], [0.96, 0, 0.1], [-0.24, 0.93, 0]]) + np.arange(5)[:, None, None] / 100
WATER = np.array([8, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "count", "columns"),
    [
        ({"R": PLACES, "z": WATER, "E": np.arange(5.0)[:, None], "F": PLACES, "r_unit": np.array("Ang")}, 5, {"E"}),
        ({"coords": PLACES, "nuclear_charges": WATER.astype(np.uint8), "energies": np.arange(5.0)}, 5, {"energies"}),
        ({"positions": PLACES[0], "numbers": WATER.astype(float), "name": np.array("water")}, 1, set()),
        ({"R": PLACES, "z": np.tile(WATER, (5, 1)), "objects": np.array([{}], object)}, 5, set()),
        ({"R": np.pad(PLACES, ((0, 0), (0, 2), (0, 0))), "z": np.tile([8, 1, 1, 0, 0], (5, 1))}, 5, set()),
    ],
)
def test_plain_arrays_of_other_programs_are_read(
    arrays: dict[str, np.ndarray], count: int, columns: set[str], tmp_path: Path
) -> None:
    np.savez(tmp_path / "md.npz", **arrays)  # type: ignore[arg-type]
    train, _ = molecules.load(MoleculeData(path=str(tmp_path / "md.npz"), held_out=0))
    assert len(train) == count and set(train.columns) == columns and train[0].types.tolist() == [8, 1, 1]
    assert np.allclose(train[count - 1].coordinates, PLACES[count - 1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": PLACES}, r"no array of coordinates \(R, coords.*, but a; rename it"),
        ({"R": PLACES}, "no array of atomic numbers"),
        ({"R": PLACES, "z": WATER[:2]}, r"atomic numbers of shape \(2,\) .* do not fit 5 frames of 3 atoms"),
        ({"R": PLACES, "z": WATER + 0.5}, "do not fit"),
        ({"R": PLACES, "z": WATER, "r_unit": np.array("Bohr")}, "in bohr .*not in Angstrom"),
        ({"R": PLACES[..., :2], "z": WATER}, r"not \(T, N, 3\)"),
    ],
)
def test_arrays_that_are_not_plain_are_described(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "md.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words) as refused:
        molecules.load(MoleculeData(path=str(tmp_path / "md.npz")))
    assert "again" not in str(refused.value)
    with pytest.raises(ValueError):
        crystals.load(CrystalData(path=str(tmp_path / "md.npz")))


def test_an_impossible_atomic_number_costs_its_frame(tmp_path: Path) -> None:
    numbers = np.tile(WATER, (5, 1))
    numbers[2, 0] = 300
    np.savez(tmp_path / "md.npz", R=PLACES, z=numbers)
    found = molecules.read(tmp_path / "md.npz")
    assert len(found.bad) == 1 and "record 3: atomic number" in found.bad[0]


def test_arrays_with_the_right_names_and_wrong_types_are_refused(tmp_path: Path) -> None:
    Systems.of([System(WATER, PLACES[0], None, "w")]).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    for name, wrong in {
        "sizes": np.array([-3]),
        "types": np.ones(3),
        "names": np.arange(1),
        "coordinates": WATER,
    }.items():
        np.savez(tmp_path / "b.npz", **{**arrays, name: wrong})
        with pytest.raises(ValueError, match=r"b\.npz: its arrays"):
            Systems.load(tmp_path / "b.npz")
