"""Files that hold one system twice or in several steps: what is on one side of the split, and what is counted once."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen.core")

from test_atom_files import CUBE, POSCAR, SALT, cif, named, sdf

from unilatent.modalities import crystal, molecule
from unilatent.modalities._atoms import grouping
from unilatent.modalities._atoms.reading import hash_order
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.crystal import data as crystals
from unilatent.modalities.crystal.data import CrystalData
from unilatent.modalities.molecule import data as molecules
from unilatent.modalities.molecule.data import MoleculeData


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- relaxations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [1, 2, 5, 6])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("s{}_POSCAR.vasp", "s{}_CONTCAR.vasp"), ("POSCAR.{}", "CONTCAR.{}"), ("s{}.poscar", "s{}.contcar"),
        ("s{}.POSCAR", "s{}.CONTCAR"), ("POSCAR-{}.vasp", "CONTCAR-{}.vasp"), ("poscar{}.vasp", "contcar{}.vasp"),
        ("s{}_POSCAR", "s{}_CONTCAR"), ("s{}/POSCAR", "s{}/CONTCAR.vasp"), ("s{}_initial.cif", "s{}_relaxed.cif"),
        ("initial/s{}.cif", "final/s{}.cif"), ("s{}.cif", "s{}.opt.cif"), ("s{}_unrelaxed.vasp", "s{}_relaxed.vasp"),
    ],
)  # fmt: skip
def test_steps_of_one_relaxation_are_on_one_side(first: str, last: str, held_out: int, tmp_path: Path) -> None:
    for i in range(6):
        for name, length in ((first, 4 + i / 10), (last, 4.02 + i / 10)):
            path = tmp_path / name.format(i)
            path.parent.mkdir(exist_ok=True)
            is_cif = name.endswith("cif")
            path.write_text(cif(SALT, named("P 1"), (length,) * 3 + CUBE[3:]) if is_cif else POSCAR.format(length))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, part = crystals.load(CrystalData(path=str(tmp_path), held_out=held_out))
    assert len(train) + len(part) == 12 and len(part) == max(2, held_out // 2 * 2)
    volumes = [(one.lattice[:, 2] * 10 - 0.1).round().astype(int) for one in (train, part)]  # of step i: 40 + i
    assert all((np.bincount(found)[40:] != 1).all() for found in volumes) and not set(volumes[0]) & set(volumes[1])


def test_names_with_the_same_words_and_other_elements_are_no_steps() -> None:
    place = np.zeros((1, 3))
    names = ["a_initial", "a_relaxed", "b_initial", "b_final", "c_opt", "d_opt", "POSCAR", "posters", "end"]
    numbers = [6, 6, 7, 8, 6, 6, 6, 6, 7]
    systems = Systems.of([System(np.array([z]), place, None, name) for z, name in zip(numbers, names, strict=True)])
    assert grouping.relaxations(systems) == ["a_initial", "a_initial", *names[2:]]


def test_molecules_before_and_after_are_on_one_side(tmp_path: Path) -> None:
    for i in range(4):
        for word in ("initial", "optimized"):
            (tmp_path / f"{i}_{word}.xyz").write_text(f"2\n\nC 0 0 0\nO 0 0 1.{i + 1}\n")
    _, part = molecules.load(MoleculeData(path=str(tmp_path), held_out=4))
    assert len(part) == 4 and len({name[0] for name in part.names}) == 2


@pytest.mark.parametrize("names", [["POSCAR.1", "POSCAR.2", "POSCAR.3"], ["1.vasp", "2.vasp", "3.vasp"]])
def test_files_without_a_partner_keep_their_names(names: list[str], tmp_path: Path) -> None:
    for i, name in enumerate(names):
        (tmp_path / name).write_text(POSCAR.format(4 + i / 10))
    _, part = crystals.load(CrystalData(path=str(tmp_path), held_out=2))
    stems = [name.rpartition(".")[0] for name in names]
    assert part.lattice is not None
    assert sorted((part.lattice[:, 2] * 10 - 40).round().astype(int)) == sorted(hash_order(stems)[:2])


# ---- trajectories ----------------------------------------------------------------------------------------------------

PLACES = np.array([[0, 0, 0.1], [0.96, 0, 0], [-0.24, 0.93, 0]])
WATER, WATERS = ["O", "H", "H"], np.array([8, 1, 1])


def moved(frame: int, amount: float = 1e-3) -> np.ndarray:
    return PLACES + np.array([0, 0, 1]) * np.arange(3)[:, None] * frame * amount


def xyz(symbols: list[str], places: np.ndarray, comment: str = "") -> str:
    rows = [" ".join([s, *map("{:.5f}".format, place)]) for s, place in zip(symbols, places, strict=True)]
    return "\n".join([str(len(rows)), comment, *rows, ""])


def written(way: str, path: Path, count: int) -> Path:
    """A trajectory of water in which the z of the last hydrogen tells the frame."""
    if way == "npz":
        np.savez(path.with_suffix(".npz"), R=np.array([moved(i) for i in range(count)]), z=WATERS)
        return path.with_suffix(".npz")
    if way == "sdf":
        from rdkit import Chem

        blocks = [Chem.MolToMolBlock(Chem.MolFromXYZBlock(xyz(WATER, moved(i)))) for i in range(count)]
        path.with_suffix(".sdf").write_text("".join(block + "$$$$\n" for block in blocks))
        return path.with_suffix(".sdf")
    path.with_suffix(f".{way}").write_text("".join(xyz(WATER, moved(i), f"step={i}") for i in range(count)))
    return path.with_suffix(f".{way}")


@pytest.mark.parametrize("way", ["xyz", "extxyz", "npz", "sdf"])
@pytest.mark.parametrize(("held_out", "last"), [(None, 12), (0.25, 30), (1, 1), (119, 119)])
def test_of_one_trajectory_the_last_frames_are_held_out(
    way: str, held_out: float | None, last: int, tmp_path: Path
) -> None:
    path = written(way, tmp_path / "md", 120)
    words = rf"md\.{way}: 120 frames of one molecule; successive ones are alike, so the last {last} are held out$"
    with pytest.warns(UserWarning, match=words):
        train, part = molecules.load(MoleculeData(path=str(path), held_out=held_out))
    steps = [(one.coordinates[2::3, 2] * 500).round().astype(int).tolist() for one in (train, part)]
    assert steps == [list(range(120 - last)), list(range(120 - last, 120))]


def test_without_held_out_systems_nothing_is_said(tmp_path: Path) -> None:
    path = written("xyz", tmp_path / "md", 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(molecules.load(MoleculeData(path=str(path), held_out=0))[0]) == 20


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize(("held_out", "whole", "rest"), [(10, 1, 0), (30, 3, 0), (29, 3, 0), (15, 1, 5)])
def test_trajectories_are_held_out_as_a_whole_but_for_one(
    one_file: bool, held_out: int, whole: int, rest: int, tmp_path: Path
) -> None:
    """Ten frames each of ten molecules: water whose hydrogens are heavier elements."""
    symbols = [["O", "H", one] for one in ["H", "F", "Cl", "Br", "I", "Na", "Li", "K", "Se", "S"]]
    scale = np.array([[1], [1], [1.8]])
    for i, names in enumerate(symbols):
        text = "".join(xyz(names, moved(frame) * scale) for frame in range(10))
        with (tmp_path / f"{0 if one_file else i}.xyz").open("a") as file:
            file.write(text)
    words = "100 of 100 records are frames of 10 trajectories; all frames of one are on one side"
    words += rf", but the last {rest} of 10 of \d are held out$" if rest else "$"
    with pytest.warns(UserWarning, match=words):
        train, part = molecules.load(MoleculeData(path=str(tmp_path), held_out=held_out))
    counts = np.bincount(part.types[2::3], minlength=54)
    assert sorted(counts[counts > 0]) == sorted([10] * whole + [rest] * (rest > 0))
    assert len(train) + len(part) == 100


@pytest.mark.parametrize("title", ["{smiles} conf{i}", "{smiles}", "conformer {i}", ""])
def test_conformers_are_on_one_side_whatever_their_titles(title: str, tmp_path: Path) -> None:
    """As RDKit and conformer tools write them: ten molecules with six conformers each, in one file."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    known = ("CCO", "CCN", "CC=O", "CCC", "C#CC", "CO", "CN", "CCF", "CC#N", "CCCC")
    with Chem.SDWriter(str(tmp_path / "all.sdf")) as file:
        for smiles in known:
            mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
            for i in AllChem.EmbedMultipleConfs(mol, 6, randomSeed=1):
                mol.SetProp("_Name", title.format(smiles=smiles, i=i))
                file.write(mol, confId=i)
    with pytest.warns(UserWarning, match="60 of 60 records are frames of 10 trajectories; all frames of one are on"):
        train, part = molecules.load(MoleculeData(path=str(tmp_path), held_out=12))
    kinds = [{system.types.tobytes() for system in systems} for systems in (train, part)]
    assert len(train) == 48 and len(part) == 12 and not kinds[0] & kinds[1]
    assert all(name.startswith("all:") for name in train.names), "each can be found again"


def test_a_relaxation_of_a_crystal_in_one_file(tmp_path: Path) -> None:
    frames = []
    for step in range(40):
        a = 4.2 - step / 200
        comment = f'Lattice="{a} 0 0 0 {a} 0 0 0 {a}" step={step}'
        frames.append(xyz(["Cs", "Cl"], np.array([[0, 0, 0], [a / 2, a / 2, a / 2 + step / 500]]), comment))
    (tmp_path / "relax.extxyz").write_text("".join(frames))
    with pytest.warns(UserWarning, match="40 frames of one crystal; .* the last 4 are held out"):
        _, part = crystals.load(CrystalData(path=str(tmp_path / "relax.extxyz")))
    assert part.columns["step"].tolist() == [36, 37, 38, 39]


def test_a_file_of_different_molecules_is_split_as_before(tmp_path: Path) -> None:
    """Of which some have the same elements in the same order: ethanol and dimethyl ether in turns, and two of water."""
    from rdkit import Chem

    texts = [Chem.MolToXYZBlock(Chem.MolFromMolBlock(sdf(smiles), removeHs=False)) for smiles in ("CCO", "COC")]
    rows = [line.split() for line in texts[1].split("\n")[2:-1]]
    rows[1], rows[2] = rows[2], rows[1]  # C, C, O, H ...
    ether = xyz([row[0] for row in rows], np.array([row[1:] for row in rows], float))
    assert [line.split()[0] for line in ether.split("\n")[2:-1]] == [
        line.split()[0] for line in texts[0].split("\n")[2:-1]
    ]
    (tmp_path / "a.xyz").write_text((texts[0] + ether) * 10 + xyz(WATER, PLACES) * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, part = molecules.load(MoleculeData(path=str(tmp_path / "a.xyz"), held_out=5))
    names = [f"a:{i + 1}" for i in range(22)]
    assert set(part.names) == {names[i] for i in hash_order(names)[:5]}


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_frames_of_a_hot_molecule_are_one_molecule(sigma: float, tmp_path: Path) -> None:
    """Conformers of pentanol in random order, with Gaussian noise on all coordinates."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles("CCCCCO"))
    AllChem.EmbedMultipleConfs(mol, 30, randomSeed=2)
    noise = np.random.default_rng(0).normal(size=(30, mol.GetNumAtoms(), 3)) * sigma
    places = np.array([conformer.GetPositions() for conformer in mol.GetConformers()]) + noise
    np.savez(tmp_path / "md.npz", R=places, z=np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]))
    with pytest.warns(UserWarning, match="30 frames of one molecule"):
        molecules.load(MoleculeData(path=str(tmp_path / "md.npz")))


# ---- one system in two files -----------------------------------------------------------------------------------------


def test_samples_in_two_forms_are_counted_once_without_a_word(tmp_path: Path) -> None:
    atoms = molecule.Molecule(molecule.MoleculeConfig(max_atoms=3))
    places = torch.tensor(np.array([moved(i, 0.01) for i in range(4)]), dtype=torch.float32)
    atoms.write({"types": torch.tensor([[8, 1, 1]] * 4), "positions": places}, tmp_path / "m")
    cells = crystal.Crystal(crystal.CrystalConfig(max_atoms=2))
    lattice = torch.tensor([[4.0 + i, 4, 4, 90, 90, 90] for i in range(4)])
    fractional = torch.tensor([[[0.0, 0, 0], [0.5, 0.5, 0.999999]]] * 4)
    types = torch.tensor([[55, 17]] * 4)
    cells.write({"types": types, "fractional": fractional, "lattice": lattice}, tmp_path / "c")
    assert len(list((tmp_path / "m").glob("*.sdf"))) == len(list((tmp_path / "c").glob("*.extxyz"))) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(molecules.read_files(tmp_path / "m")) == len(crystals.read_files(tmp_path / "c")) == 4
        for load, data in ((molecules.load, MoleculeData), (crystals.load, CrystalData)):
            assert len(load(data(path=str(tmp_path / data.kind.plural[0]), held_out=0))[0]) == 4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.sdf", sdf("CCO")), ("a.sdf", "damaged"), ("a.mol", sdf("C")),
        ("a.sdf", "w\n\n\n  3  2  0  0  0  0            999 V2000\n"
         "    0.0000    0.0000    0.1000 O   0  0\n    0.9500    0.0000    0.0000 H   0  0\n"
         "   -0.2400    0.9300    0.0000 H   0  0\n  1  2  1  0\n  1  3  1  0\nM  END\n$$$$\n"),
    ],
)  # fmt: skip
def test_files_of_one_name_with_other_molecules_are_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(xyz(WATER, PLACES))
    (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=rf"not read: 1 file next to another form of the same name: {name}$"):
        molecules.load(MoleculeData(path=str(tmp_path), held_out=0))


def test_crystals_of_one_name_that_differ_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(cif(SALT, named("P 1")))
    (tmp_path / "a.extxyz").write_text(xyz(["Cs", "Cl"], PLACES[:2] * 3, 'Lattice="4 0 0 0 4 0 0 0 4"'))
    with pytest.warns(UserWarning, match=r"not read: 1 file next to another form of the same name: a\.extxyz$"):
        crystals.load(CrystalData(path=str(tmp_path), held_out=0))


@pytest.mark.parametrize(
    ("name", "file", "title"),
    [("a:3", "a", "a:3"), ("a:3 CN conf0", "a", "CN conf0"), ("run#1 b/all:3 x:4 y", "run#1 b/all", "x:4 y"),
     ("C:12", "C", "C:12"), ("a/b#2", "a/b", "a/b#2"), ("water", None, "water"), ("C1:CC:C1 x", None, "C1:CC:C1 x")],
)  # fmt: skip
def test_names_of_records(name: str, file: str | None, title: str) -> None:
    assert grouping.file_of(name) == file and grouping.title_of(name) == title


def test_a_record_that_is_removed_moves_no_other_between_the_splits(tmp_path: Path) -> None:
    """Records are told apart by their titles, whatever their place in the file is."""
    blocks = [sdf(smiles) for smiles in ("CCO", "CCN", "CC=O", "CCC", "C#CC", "CO", "CN", "CCF", "CC#N", "CCCC")]
    held_out = []
    for number, kept in enumerate((blocks, blocks[1:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "all.sdf").write_text("".join(kept))
        train, part = molecules.load(MoleculeData(path=str(folder), held_out=3))
        held_out.append({grouping.title_of(name) for name in part.names})
        assert len(train) == len(kept) - 3
    assert len(held_out[0] & held_out[1]) >= 2
