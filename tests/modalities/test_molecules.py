"""Molecules: bonds and validity, the generated set, reading and writing files, images."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("rdkit")

from unilatent.maths.streams import Streams
from unilatent.modalities._atoms import bounded
from unilatent.modalities._atoms.grid import paste_grid
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.molecule import Molecule, bond_orders, chemistry, conformers, data, generator, metrics, render
from unilatent.modalities.molecule.data import MoleculeData, load, read

MOLECULES = Molecule(Molecule.Config.small())
QM7 = Path(__file__).parents[3] / "shared" / "data" / "qm7.zip"
TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
HYDROGENS = np.array([[0, 0.92, 0.57], [0, -0.92, 0.57], [0, 0.92, -1.91], [0, -0.92, -1.91]])  # of ethene
KNOWN = {
    "methane": ([6, 1, 1, 1, 1], np.concatenate([np.zeros((1, 3)), 1.09 * TETRAHEDRON]), 1),
    "ethene": ([6, 6, 1, 1, 1, 1], np.concatenate([[[0, 0, 0], [0, 0, -1.34]], HYDROGENS]), 2),
    "ethyne": ([6, 6, 1, 1], np.array([[0, 0, 0], [0, 0, 1.20], [0, 0, -1.06], [0, 0, 2.26]]), 3),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made() -> Systems:
    return generator.compose(256, seed=0, workers=2)


def batch(systems: Systems, rows: range | None = None) -> dict[str, Tensor]:
    """Systems as padded data of the modality."""
    rows = range(len(systems)) if rows is None else rows
    types = torch.zeros(len(rows), 29, dtype=torch.int64)
    positions = torch.zeros(len(rows), 29, 3)
    for i, row in enumerate(rows):
        system = systems[row]
        types[i, : len(system.types)] = torch.from_numpy(system.types.astype(np.int64))
        positions[i, : len(system.types)] = torch.from_numpy(system.coordinates)
    return {"types": types, "positions": positions}


def one(types: list[int], places: np.ndarray) -> dict[str, Tensor]:
    return {"types": torch.tensor([types]), "positions": torch.tensor(places, dtype=torch.float32)[None]}


# ---- bonds and validity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_distance_tables_on_known_molecules(name: str):
    types, places, order = KNOWN[name]
    found = chemistry.stability(**one(types, places))
    carbon = 1 if types[1] == 6 else 2  # methane's partner is a hydrogen
    assert found.orders[0, 0, carbon if order > 1 else 1] == order
    assert found.molecules.tolist() == [True]
    assert (found.orders[0] == found.orders[0].T).all() and found.orders[0].diagonal().sum() == 0
    apart = chemistry.stability(**one(types, places * 1.3))
    assert not apart.molecules.any()


@pytest.mark.parametrize(("name", "smiles"), [("methane", "C"), ("ethene", "C=C"), ("ethyne", "C#C")])
def test_three_protocols_agree_on_known_molecules(name: str, smiles: str):
    types, places, _ = KNOWN[name]
    mol = chemistry.perceive(np.array(types), places)
    assert chemistry.plain_smiles(mol) == smiles and chemistry.fragments(mol) == 1
    atoms = one(types, places)
    assert metrics.DistanceTables()(atoms)["edm_valid"].tolist() == [1]
    if not metrics.Babel.on_request:
        assert metrics.Babel()(atoms)["openbabel_connected"].tolist() == [1]


def test_padding_changes_no_verdict(made: Systems):
    alone, padded = made[5], batch(made, range(8))
    unpadded = one(alone.types.tolist(), alone.coordinates)
    for space in (metrics.DistanceTables(), metrics.Perceived()):
        few, many = space(unpadded), space(padded)
        assert {name: value[0].item() for name, value in few.items()} == {n: v[5].item() for n, v in many.items()}


def test_two_molecules_are_valid_and_not_connected():
    types, places, _ = KNOWN["methane"]
    both = one(types * 2, np.concatenate([places, places + 5.0]))
    assert metrics.Perceived()(both)["rdkit_valid"].tolist() == [1]
    assert metrics.Perceived()(both)["rdkit_connected"].tolist() == [0]


def test_graphs_do_not_depend_on_the_order_or_pose_of_atoms(made: Systems):
    system = made[3]
    order = np.random.default_rng(0).permutation(len(system.types))
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    space = metrics.Perceived()
    first = space(one(system.types.tolist(), system.coordinates))
    second = space(one(system.types[order].tolist(), (system.coordinates @ turned)[order]))
    assert first["rdkit_graph"] == second["rdkit_graph"] != 0


def test_open_babel_in_memory_is_open_babel_through_files(made: Systems, tmp_path: Path):
    pytest.importorskip("openbabel")
    babel, Chem = chemistry.openbabel(), chemistry.rdkit().Chem
    conversion = babel.OBConversion()
    conversion.SetInAndOutFormats("xyz", "pdb")
    verdicts = []
    noisy = metrics.with_noise(batch(made, range(20)), 0.1)
    atoms = {name: torch.cat([batch(made, range(20))[name], noisy[name]]) for name in noisy}
    paths = render.write(atoms, tmp_path)
    for (types, _), path in zip(chemistry.each(**atoms), paths, strict=True):
        written = data.read_files(path)[0].coordinates.astype(np.float64)
        mol = babel.OBMol()
        conversion.ReadFile(mol, str(path))
        conversion.WriteFile(mol, str(path.with_suffix(".pdb")))
        with chemistry.rdkit().quiet():
            theirs = Chem.MolFromPDBFile(str(path.with_suffix(".pdb")), removeHs=False)
            ours = chemistry.babel_perceive(types, written)
            verdicts.append([mol and chemistry.fragment_smiles(mol) for mol in (ours, theirs)])
    assert all(ours == theirs for ours, theirs in verdicts)
    assert any(ours is None for ours, _ in verdicts) and sum(ours is not None for ours, _ in verdicts) >= 20


# ---- molecules that RDKit does not perceive --------------------------------------------------------------------------


def nitrates(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A chain of carbon atoms with a nitrate group at each: more combinations of valences with each group."""
    return geometry("O=[N+]([O-])OC" + "C(O[N+](=O)[O-])" * (count - 2) + "CO[N+](=O)[O-]")


def geometry(smiles: str) -> tuple[np.ndarray, np.ndarray]:
    kit = chemistry.rdkit()
    mol = kit.Chem.AddHs(kit.Chem.MolFromSmiles(smiles))
    assert kit.Embed.EmbedMolecule(mol, randomSeed=1) == 0
    if kit.Force.MMFFHasAllMoleculeParams(mol):
        kit.Force.MMFFOptimizeMolecule(mol, maxIters=2000)
    return np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]), mol.GetConformer().GetPositions()


def octahedron(length: float) -> np.ndarray:
    return length * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])


@pytest.mark.parametrize("count", [3, 4])
def test_long_searches_in_a_process_of_their_own_find_what_short_ones_find(count: int):
    types, places = nitrates(count)
    mol = chemistry.perceive(types, places)
    direct = bond_orders.atoms_only(types.tolist(), places)
    assert bond_orders.search(direct, 10**7) is None and chemistry._sanitised(direct)
    assert chemistry.plain_smiles(mol) == chemistry.plain_smiles(direct)
    assert chemistry.rdkit().Chem.MolToMolBlock(mol) == chemistry.rdkit().Chem.MolToMolBlock(direct)
    assert (mol.GetConformer().GetPositions() == places).all()


@pytest.mark.parametrize("limit", ["steps", "seconds"])
def test_a_search_without_end_is_given_up(limit: str, monkeypatch: pytest.MonkeyPatch):
    if limit == "seconds":
        monkeypatch.setattr(bond_orders, "SECONDS", 0.3)
    types, places = nitrates(7)
    start = time.monotonic()
    found = chemistry.perception(types, places)
    assert found.mol is None and found.judged == chemistry.GAVE_UP
    assert time.monotonic() - start < 60
    monkeypatch.setattr(bond_orders, "find_long", lambda *_: pytest.fail("searched again"))
    assert chemistry.perception(types, places) == found
    assert render._formula(System(types, places)) is None and render._sdf(System(types, places)) is not None


def test_long_searches_of_a_batch_are_done_at_once_and_counted(monkeypatch: pytest.MonkeyPatch):
    """Water, four nitrates and six nitrates, each twice: two long searches, side by side. The second is given up."""
    batches: list[int] = []
    ask_all, more = bounded.ask_all, list[int]()
    monkeypatch.setattr(bounded, "ask_all", lambda *a: (batches.append(len(a[1])), ask_all(*a))[1])
    monkeypatch.setattr(chemistry, "_long", {})
    monkeypatch.setattr(bond_orders, "STEPS", 10_000)
    monkeypatch.setattr(bond_orders, "SECONDS", 20.0)
    water = np.array([8, 1, 1]), np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    several = [nitrates(4), water, nitrates(6), water, nitrates(4), (np.zeros(0, int), np.zeros((0, 3)))]
    found = chemistry.perceptions(several, more.append)
    assert batches == [2] and more == [1, 1]
    smiles = [None if one.mol is None else chemistry.plain_smiles(one.mol) for one in found]
    assert smiles[1] == smiles[3] == "O" and smiles[0] == smiles[4] is not None and smiles[2] is smiles[5] is None
    assert [one.judged for one in found] == [0, 0, chemistry.GAVE_UP, 0, 0, chemistry.JUDGED]
    assert found[0].mol is not found[4].mol, "nobody changes another's molecule"
    again = chemistry.perceptions(several, more.append)
    assert batches == [2] and [one.judged for one in again] == [one.judged for one in found]


def test_signals_are_obeyed_while_bonds_are_searched(monkeypatch: pytest.MonkeyPatch):
    """An exception of a handler, such as KeyboardInterrupt, ends the search and its process at once."""
    monkeypatch.setattr(bond_orders, "SECONDS", 300)
    monkeypatch.setattr(chemistry, "_long", {})
    bounded.stop()
    started: list[subprocess.Popen[str]] = []
    popen, soon = subprocess.Popen, threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGUSR2))

    def start(*a: Any, **k: Any) -> subprocess.Popen[str]:
        started.append(popen(*a, **k))
        soon.start()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    types, places = nitrates(7)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            chemistry.perception(types, places)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("smiles", "judged"),
    [
        ("O=[N+]([O-])c1cccc([N+](=O)[O-])c1", chemistry.CHARGES),
        ("O=[N+]([O-])c1ccc([N+](=O)[O-])cc1", chemistry.CHARGES),
        ("Cc1c([N+](=O)[O-])cc([N+](=O)[O-])cc1[N+](=O)[O-]", chemistry.CHARGES),
        ("ClP(Cl)(Cl)(Cl)Cl", chemistry.BONDS), ("FS(F)(F)F", chemistry.BONDS),
        ("FS(F)(F)(F)(F)F", chemistry.BONDS), ("FP(F)(F)(F)F", chemistry.BONDS),
    ],
)  # fmt: skip
def test_sound_molecules_that_rdkit_rejects_are_not_judged(smiles: str, judged: int):
    assert chemistry.perception(*geometry(smiles)) == chemistry.Perception(None, judged)


@pytest.mark.parametrize(
    ("types", "places"),
    [
        ([7, 1, 1, 1, 1, 1], octahedron(1.0)[:6]),  # NH5
        ([6, 9, 9, 9, 9, 9, 9], octahedron(1.4)),  # CF6
        ([8, 1, 1, 1], octahedron(0.97)[:4]),  # OH3
        ([16, 9, 9, 9, 9, 9, 9, 1], np.concatenate([octahedron(1.56), [[9, 9, 9]]])),  # SF6 and a hydrogen
    ],
)
def test_impossible_molecules_are_invalid(types: list[int], places: np.ndarray):
    assert chemistry.perception(np.array(types), places) == chemistry.Perception(None, chemistry.JUDGED)


def test_noise_is_judged(made: Systems):
    found = metrics.Perceived()(metrics.with_noise(batch(made), 1.0))["rdkit_rings"]
    assert (found == -1).float().mean() > 0.9 and (found < -1).float().mean() < 0.01


# ---- the generated set -----------------------------------------------------------------------------------------------


def test_the_set_is_the_same_for_one_and_two_processes_and_after_an_interruption(made: Systems, tmp_path: Path):
    alone = generator.compose(64, seed=0, workers=1)
    alone.save(tmp_path / "alone.npz")
    made.take(range(64)).save(tmp_path / "first.npz")
    assert (tmp_path / "alone.npz").read_bytes() == (tmp_path / "first.npz").read_bytes()
    assert len(set(made.names)) == len(made) == 256

    def stop(what: str, more: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.compose(64, seed=0, workers=1, progress=stop, parts=tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("[0-9]*.npz"))) == 1
    written = (tmp_path / "parts" / "000000.npz").stat().st_mtime_ns
    assert generator.compose(8, seed=0, parts=tmp_path / "parts").names == made.names[:8]
    assert (tmp_path / "parts" / "000000.npz").stat().st_mtime_ns == written


def test_the_generated_set_is_valid_and_distinct(made: Systems):
    atoms = batch(made)
    assert chemistry.stability(**atoms).molecules.all()
    features = metrics.Perceived()(atoms)
    assert features["rdkit_connected"].float().mean() >= 0.99
    assert len(features["rdkit_graph"].unique()) == len(made)
    assert np.abs(made[0].coordinates.mean(0)).max() < 1e-5
    sizes = made.sizes
    assert 17.0 < sizes.mean() < 20.5 and sizes.max() <= 29
    heavy = [int((made[i].types > 1).sum()) for i in range(len(made))]
    assert max(heavy) == 9 and 0.75 < np.mean(np.array(heavy) == 9) < 0.93


def test_make_molecules_writes_a_file_that_data_path_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from unilatent.cli import main

    out = tmp_path / "set.npz"
    for arguments, code in ((["--num", "24", "--out", str(out)], 0), (["--out", str(tmp_path / "set.csv")], 2)):
        with pytest.raises(SystemExit) as left:
            main(["data", "make-molecules", "--workers", "1", *arguments])
        assert left.value.code == code
    output = capsys.readouterr()
    assert f"24 samples in {out}" in output.out and "--out" in output.err
    assert sum(map(len, load(MoleculeData(path=str(out))))) == 24


def test_other_rules_are_cached_under_another_name(monkeypatch: pytest.MonkeyPatch):
    before = generator.cache_name(0)
    monkeypatch.setattr(generator, "RULES", generator.RULES + 1)
    assert generator.cache_name(0) != before


def test_another_seed_gives_other_molecules(made: Systems):
    other = generator.compose(32, seed=1)
    assert len(set(other.names) & set(made.names)) < 4


SHOWN = ("edm_atoms", "edm_stable", "edm_valid", "rdkit_valid", "openbabel_valid", "openbabel_connected")
NOISE_TABLE = {
    0.02: (98.3, 84.9, 94.3, 98.3, 98.0, 98.0),
    0.05: (80.0, 9.2, 64.1, 95.5, 95.1, 95.1),
    0.1: (54.4, 0.0, 35.2, 87.7, 87.3, 85.7),
    0.2: (38.8, 0.0, 20.4, 45.0, 66.9, 19.1),
    0.5: (22.7, 0.0, 18.8, 8.4, 61.0, 0.0),
    1.0: (14.7, 0.0, 35.5, 4.0, 76.9, 0.0),
}
"""Noise in Angstrom -> percentages measured by other code on 1,000 to 1,500 other molecules of the same recipe."""


def shares_with_noise(molecules: dict[str, Tensor], sigma: float) -> dict[str, float]:
    """The percentages of SHOWN over three draws of noise per molecule; those of Open Babel only if it is installed."""
    noisy = metrics.with_noise(
        {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in molecules.items()}, sigma
    )
    features = metrics.DistanceTables()(noisy) | metrics.Perceived()(noisy)
    if not metrics.Babel.on_request:
        features |= metrics.Babel()(noisy)
    found = {
        name: 100 * float(features[name].float().mean()) for name in (*SHOWN[1:], "rdkit_connected") if name in features
    }
    return {"edm_atoms": 100 * float(features["edm_stable_atoms"].sum() / features["edm_atoms"].sum()), **found}


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_noise_baselines_are_close_to_earlier_measurements(made: Systems, sigma: float):
    """On a few molecules; EDM's validity and Open Babel depend most on which molecules these are."""
    found = shares_with_noise(batch(made), sigma)
    for name, elsewhere in zip(SHOWN, NOISE_TABLE[sigma], strict=True):
        if name in found:
            assert found[name] == pytest.approx(elsewhere, abs=6 if name in SHOWN[2::2] else 3), (sigma, name)
    if sigma == 1.0:
        assert found["rdkit_connected"] < 1


@pytest.fixture(scope="module")
def many() -> Systems:
    return generator.compose(1500)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", NOISE_TABLE)
def test_noise_baselines_match_earlier_measurements(many: Systems, sigma: float):
    """Within three percentage points in every protocol, for a set of the same size and composition."""
    found = shares_with_noise(batch(many), sigma)
    assert set(found) >= set(SHOWN[:4])
    for name, elsewhere in zip(SHOWN, NOISE_TABLE[sigma], strict=True):
        if name in found:
            assert found[name] == pytest.approx(elsewhere, abs=3), (sigma, name)


# ---- files -----------------------------------------------------------------------------------------------------------


WATER = "3\ncharge=0 gap=7.5\nO 0 0 0.12\nH 0 0.76 -0.48\nH 0 -0.76 -0.48\n"


def test_xyz_with_columns_and_several_frames(tmp_path: Path):
    (tmp_path / "a.xyz").write_text(WATER + "\n1\n\n2 0 0 0\n")
    found = read(tmp_path / "a.xyz")
    assert found.bad == () and found.systems.names == ("a:1", "a:2")
    assert found.systems[0].types.tolist() == [8, 1, 1] and found.systems[1].types.tolist() == [2]
    assert found.systems.columns["gap"][0] == 7.5 and np.isnan(found.systems.columns["gap"][1])


def test_extxyz_says_where_species_and_positions_stand(tmp_path: Path):
    (tmp_path / "a.extxyz").write_text('1\nProperties=id:I:1:pos:R:3:species:S:1 energy=-1.5 pbc="F F F"\n7 1 2 3 Cl\n')
    system = read(tmp_path / "a.extxyz").systems[0]
    assert system.types.tolist() == [17] and system.coordinates.tolist() == [[1, 2, 3]]
    assert system.columns == {"energy": -1.5}


def test_a_file_of_qm9_itself(tmp_path: Path):
    numbers = " ".join(str(i + 0.5) for i in range(15))
    atoms = "C 0 0 0 -0.5\nH 0 0 1.09 0.1\nH 1.0276 0 -0.3633*^0 0.1\n"
    tail = "1341.3 1341.4\nC C\nInChI=1S/CH4/h1H4 InChI=1S/CH4/h1H4\n"
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(f"3\ngdb 1\t{numbers}\n{atoms}{tail}")
    found = read(tmp_path)
    assert found.bad == () and found.systems.names == ("gdb_1",)
    assert found.systems.columns["mu"][0] == 3.5 and found.systems.columns["Cv"][0] == 14.5
    assert found.systems[0].coordinates[2].tolist() == pytest.approx([1.0276, 0, -0.3633])


BAD = {
    "empty": ("", "bad.xyz: is empty"),
    "element": (WATER.replace("O 0", "Qq 0"), "bad.xyz, record 1: atom 1 is 'Qq', not an element"),
    "nan": (WATER.replace("0.12", "nan"), "bad.xyz, record 1: a coordinate of atom 1 is not a number"),
    "text": (WATER.replace("0.12", "near"), "bad.xyz, record 1: a coordinate of atom 1 is not a number"),
    "clash": (WATER.replace("-0.76", "0.70"), "bad.xyz, record 1: atoms 2 and 3 are 0.06 Angstrom apart"),
    "short": (WATER.replace("3\n", "4\n", 1), "bad.xyz, record 1: 4 atoms announced, 3 lines follow"),
    "second": (WATER + WATER.replace("O 0 0 0.12", "O 0 0"), "bad.xyz, record 2: atom 1: 3 words"),
    "lattice": (WATER.replace("gap=7.5", 'Lattice="9 0 0 0 9 0 0 0 9"'), "bad.xyz, record 1: it has a lattice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_reported_and_the_others_are_read(kind: str, tmp_path: Path):
    content, words = BAD[kind]
    for i in range(9):
        (tmp_path / f"good{i}.xyz").write_text(WATER)
    (tmp_path / "bad.xyz").write_text(content)
    with pytest.warns(UserWarning, match="1 of 1[01] records") as warned:
        train, held_out = load(MoleculeData(path=str(tmp_path), held_out=2))
    assert words in str(warned[0].message)
    assert (len(train), len(held_out)) == (7 + (kind == "second"), 2)
    (tmp_path / "other.xyz").write_text("")
    with pytest.raises(ValueError, match=r"2 of 1[12] records cannot be used") as refused:
        load(MoleculeData(path=str(tmp_path)))
    assert words in str(refused.value) and "data.bad_share" in str(refused.value)


def test_broken_records_of_an_sdf(made: Systems, tmp_path: Path):
    render.write(batch(made, range(3)), tmp_path)
    blocks = [(tmp_path / f"{i:06d}.sdf").read_text() for i in range(3)]
    blocks[1] = blocks[1].replace(" C ", " C2", 1)
    (tmp_path / "all.sdf").write_text("".join(blocks))
    found = read(tmp_path / "all.sdf")
    assert len(found.systems) == 2 and "all.sdf, record 2" in found.bad[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": ("gap", "mass")}, "data.columns: .* has no column of numbers 'mass'; it has charge, gap"),
        ({"label_column": "gap"}, "data.label_column: 'gap' of .* is 7.5, not a whole number"),
        ({"held_out": 40}, "data.held_out: 40, but there are only 9 molecules"),
    ],
)
def test_settings_that_do_not_fit_the_files(settings: dict[str, object], words: str, tmp_path: Path):
    for i in range(9):
        (tmp_path / f"good{i}.xyz").write_text(WATER)
    with pytest.raises(ValueError, match=words):
        MOLECULES.splits(MoleculeData.parse({"path": str(tmp_path), **settings}))


def test_paths_that_hold_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"missing\.sdf does not exist"):
        load(MoleculeData(path=str(tmp_path / "missing.sdf")))
    with pytest.raises(ValueError, match="holds no molecules; accepted are"):
        load(MoleculeData(path=str(tmp_path)))
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not a whole zip archive"):
        load(MoleculeData(path=str(tmp_path / "a.zip")))


def test_qm9_folder(made: Systems, tmp_path: Path):
    render.write(batch(made, range(40)), tmp_path / "blocks")
    blocks = [(tmp_path / "blocks" / f"{i:06d}.sdf").read_text() for i in range(40)]
    (tmp_path / "gdb9.sdf").write_text("".join(f"gdb_{i + 1}\n" + b.partition("\n")[2] for i, b in enumerate(blocks)))
    head = "Molecules that failed the consistency check\n\nIndex  Initial SMILES\n" + "=" * 20 + "\n"
    (tmp_path / "uncharacterized.txt").write_text(head + "   2  C  N\n  40  C  O\n" + "=" * 20 + "\n2 molecules\n")
    (tmp_path / "gdb9.sdf.csv").write_text("mol_id,gap\n" + "".join(f"gdb_{i + 1},{i / 4}\n" for i in range(40)))
    parts = {part: load(MoleculeData(path=str(tmp_path), held_out_part=part)) for part in ("validation", "test")}
    (train, validation), (again, test) = parts["validation"], parts["test"]
    names = [*train.names, *validation.names, *test.names]
    assert train.names == again.names and len(set(names)) == len(names) == 38
    assert not {"gdb_2", "gdb_40"} & set(names)
    assert (len(train), len(validation)) == (38 * 100_000 // 130_831, 38 * 18_000 // 130_831)
    first = int(train.names[0].removeprefix("gdb_")) - 1
    assert train.columns["gap"][0] == first / 4
    assert np.abs(train[0].coordinates - made[first].coordinates).max() < 1e-4
    assert (train[0].types == made[first].types).all()


def test_what_was_read_is_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(9):
        (folder / f"good{i}.xyz").write_text(WATER)
    settings = MoleculeData(path=str(folder))
    first = load(settings)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read", lambda *_: pytest.fail("read again"))
        assert load(settings)[0].names == first[0].names
    (folder / "more.xyz").write_text(WATER)
    assert sum(map(len, load(settings))) == 10


def test_splits_move_few_molecules(made: Systems, tmp_path: Path):
    made.take(range(200)).save(tmp_path / "few.npz")
    made.save(tmp_path / "more.npz")
    few, more = (load(MoleculeData(path=str(tmp_path / f"{name}.npz"), held_out=0.2)) for name in ("few", "more"))
    assert len(few[1]) == 40 and len(more[1]) == 51
    assert len(set(few[1].names) - set(more[1].names)) <= 8


def test_the_generated_set_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = load(MoleculeData(path="qm9-like", num=20))
    assert (len(first[0]), len(first[1])) == (18, 2)
    monkeypatch.setattr(generator, "make", lambda *_: pytest.fail("made again"))
    assert load(MoleculeData(path="qm9-like", num=20))[1].names == first[1].names
    assert not list((tmp_path / "cache" / "systems").glob("*.parts"))


@pytest.mark.skipif(not QM7.is_file(), reason="without QM7")
def test_real_molecules():
    train, held_out = load(MoleculeData(path=str(QM7)))
    assert len(train) + len(held_out) == 6086 and not set(train.names) & set(held_out.names)
    assert set(train.types.tolist()) == {1, 6, 7, 8, 16} and train.sizes.max() == 23
    features = metrics.Perceived()(batch(train, range(0, 5000, 25)))
    assert features["rdkit_connected"].float().mean() > 0.97


# ---- files and images out ------------------------------------------------------------------------------------------


def test_written_molecules_are_read_back(made: Systems, tmp_path: Path):
    paths = render.write(batch(made, range(5)), tmp_path, start=7)
    assert [path.name for path in paths] == [f"{i:06d}.xyz" for i in range(7, 12)]
    again = data.read_files(tmp_path)
    assert len(again) == 5 and len(list(tmp_path.glob("*.sdf"))) == 5
    for i in range(5):
        assert (again[i].types == made[i].types).all()
        assert np.abs(again[i].coordinates - made[i].coordinates).max() < 1e-6
    bonds = chemistry.rdkit().Chem.MolFromMolFile(str(paths[0].with_suffix(".sdf")))
    assert chemistry.rdkit().Chem.MolToSmiles(bonds, isomericSmiles=False) == made.names[0]
    (tmp_path / "000008.xyz").write_text("nothing")
    with pytest.raises(ValueError, match=r"000008\.xyz, record 1"):
        data.read_files(tmp_path)


def test_the_viewer_draws_bonds_of_elements_without_a_table():
    """Chloroethene: EDM's tables have its double bond, and none of chlorine."""
    kit = chemistry.rdkit()
    mol = kit.Chem.AddHs(kit.Chem.MolFromSmiles("C=CCl"))
    kit.Embed.EmbedMolecule(mol, randomSeed=0)
    types = torch.tensor([[atom.GetAtomicNum() for atom in mol.GetAtoms()]])
    positions = torch.tensor(mol.GetConformer().GetPositions()).float()[None]
    (view,) = render.scenes({"types": types, "positions": positions})
    bonds = {tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))) for bond in mol.GetBonds()}
    assert {(a, b) for a, b, _ in view.bonds} == bonds and (1, 2, 1) in view.bonds and types[0, 2] == 17
    assert (0, 1, 2) in view.bonds


def test_a_grid_of_molecules_and_of_noise(made: Systems, tmp_path: Path):
    from PIL import Image

    real = batch(made, range(5))
    paste_grid([render.cells(row) for row in [real, metrics.with_noise(real, 3.0)]], tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * render.CELL, 4 * 2 * render.CELL)
        pixels = np.asarray(image.convert("L"))
    cells = pixels.reshape(8, render.CELL, 3, render.CELL).min(axis=(1, 3))
    assert (cells[0] < 128).all() and (cells[1] < 128).all()  # balls above formulas
    assert (cells[2] < 128).all()
    assert ((cells[3] > 100) & (cells[3] < 255)).all()  # no formula of noise, only what atoms there are
    assert cells[4, 2] == 255  # only five


def test_failures_of_rdkit_cost_no_image_and_no_xyz(made: Systems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Pre-condition Violation: Atomic number not found")

    kit = chemistry.rdkit()
    monkeypatch.setattr(kit.Chem, "MolToMolBlock", fails)
    monkeypatch.setattr(kit.Draw, "MolToImage", fails)
    monkeypatch.setattr(render, "rdkit", lambda: kit)
    data = batch(made, range(2))
    assert [path.name for path in render.write(data, tmp_path)] == ["000000.xyz", "000001.xyz"]
    assert not list(tmp_path.glob("*.sdf")) and len(render.cells(data)) == 2


def test_atoms_are_counted_carbon_and_hydrogen_first():
    system = System(np.array([8, 6, 6, 1, 1, 1, 1, 1, 1, 7], np.uint8), np.zeros((10, 3), np.float32))
    assert render.sum_formula(system) == "C2H6NO"


def test_generated_molecules_have_columns_to_condition_on(made: Systems):
    Chem, Descriptors = chemistry.rdkit().Chem, chemistry.rdkit().Descriptors
    assert set(made.columns) == {"logp", "tpsa", "energy"} and np.isfinite(made.columns["energy"]).all()
    for i in range(3):
        mol = Chem.AddHs(Chem.MolFromSmiles(made.names[i]))
        assert made.columns["tpsa"][i] == pytest.approx(Descriptors.CalcTPSA(mol))
        assert made.columns["logp"][i] == pytest.approx(Descriptors.CalcCrippenDescriptors(mol)[0])


def test_a_system_without_its_padding(made: Systems):
    system = render.to_system(batch(made, range(3)), 2)
    assert isinstance(system, System) and (system.types == made[2].types).all()


@pytest.mark.parametrize("frame", ["principal", "first"])
def test_a_network_sees_the_same_tokens_however_a_molecule_is_turned(made: Systems, frame: str) -> None:
    framed = Molecule(Molecule.Config.small().model_copy(update={"frame": frame}))
    data = batch(made, range(64))
    if frame == "principal":  # exactly symmetric molecules have no unique axes: those whose spreads are apart
        spreads = torch.linalg.svdvals(data["positions"])
        apart = (-spreads.diff(dim=1) > 0.1).all(1)
        data = {key: value[apart] for key, value in data.items()}
    assert len(data["types"]) > 30
    turned = MOLECULES.augment(data, Streams(("turn",), range(len(data["types"]))))
    one, two = framed.pack(data), framed.pack(turned)
    torch.testing.assert_close(one.values, two.values, atol=2e-3, rtol=0)
    assert (MOLECULES.pack(data).values - MOLECULES.pack(turned).values).abs().max() > 1
    terms = framed.reconstruction_loss(framed.ideal(turned), data)
    assert terms["positions"] < 1e-8, "the loss compares in the frame that the network sees"


def test_a_small_set_is_generated_once_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = MoleculeData(path="small-molecules", num=60, held_out=6, seed=3)
    train, held_out = load(data)
    assert (len(train), len(held_out)) == (54, 6) and not set(train.names) & set(held_out.names)
    monkeypatch.setattr(conformers, "make", None)  # from here on, the cache answers
    assert load(data)[1].names == held_out.names
    assert "generates" in Molecule.origin_of(data)
    with pytest.raises(TypeError):
        load(MoleculeData(path="small-molecules", num=60, held_out=6, seed=4))
    monkeypatch.undo()
    other = load(MoleculeData(path="small-molecules", num=60, held_out=6, seed=4))[0]
    assert other.names != train.names or not np.array_equal(other.coordinates, train.coordinates)


def test_a_set_without_conformers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformers, "conformer", lambda *arguments: None)
    with pytest.raises(ValueError, match="10 conformers, but RDKit made only 0"):
        conformers.make(10)
