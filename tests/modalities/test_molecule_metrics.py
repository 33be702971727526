"""Metrics of molecules: their baselines, and the changes that each of them must detect."""

from __future__ import annotations

import builtins
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_molecules import batch, geometry
from torch import Tensor

pytest.importorskip("rdkit")

from unilatent.maths.streams import Streams
from unilatent.modalities._atoms import bounded
from unilatent.modalities.base import Evidence, Row, Space
from unilatent.modalities.molecule import Molecule, chemistry, conformers, generator, metrics
from unilatent.records import MemoryRows

CPU = torch.device("cpu")
LIGHT = ("atoms", "edm", "rdkit")


@pytest.fixture(scope="module")
def sets() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    made = generator.compose(128, seed=5)
    return batch(made, range(64)), batch(made, range(64, 128))


def stored(data: dict[str, Tensor], names: tuple[str, ...] = LIGHT, **extra: Tensor) -> MemoryRows:
    tensors = dict(extra)
    for space in metrics.spaces():
        if space.name in names:
            tensors |= space(data)
    return MemoryRows(tensors)


def rows(evidence: Evidence, names: tuple[str, ...] = LIGHT) -> dict[str, Row]:
    """The results by key, of the metrics that need no other spaces."""
    results = [metric(evidence) for metric in metrics.metrics() if metric.space in (*names, None)]
    return {row.key: row for rows in results for row in rows}


def test_real_molecules_as_samples_reach_the_reference(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    """Held-out molecules as samples reach the real-data reference; training molecules as samples are not novel."""
    train, held_out = sets
    found = rows(Evidence(stored(train), stored(held_out), stored(held_out)))
    for key in ("valid_rdkit", "valid_connected_rdkit", "mol_stable", "atom_stable", "valid_edm", "novel_rdkit"):
        row = found[key]
        assert row.value == row.beside["held-out real"] == 100, key
        assert set(row.beside) == {"held-out real", "noise 0.05 A", "noise 1 A"}
    assert found["mol_stable"].beside["noise 0.05 A"] < 30 and found["mol_stable"].beside["noise 1 A"] == 0
    assert found["valid_connected_rdkit"].beside["noise 1 A"] == 0
    for key in ("atoms_w1", "elements_tv", "bond_lengths_w1", "rings_w1"):
        assert found[key].value == found[key].beside["held-out real"] >= 0
    assert found["bond_lengths_w1"].value < found["bond_lengths_w1"].beside["noise 0.05 A"]
    copies = rows(Evidence(stored(train), stored(held_out), stored(train)))
    assert copies["novel_rdkit"].value == copies["novel_edm"].value == 0
    assert copies["valid_unique_rdkit"].value == 100


def test_molecules_that_are_not_judged_stand_beside_the_valid(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    """Validity stays what the published protocol says; a further row says how many it does not judge, and why."""
    train, held_out = sets
    samples = {name: value.clone() for name, value in held_out.items()}
    for i, smiles in enumerate(["FS(F)(F)F", "O=[N+]([O-])c1ccc([N+](=O)[O-])cc1", "ClP(Cl)(Cl)(Cl)Cl"]):
        types, places = geometry(smiles)
        samples["types"][i], samples["positions"][i] = 0, 0
        samples["types"][i, : len(types)] = torch.from_numpy(types)
        samples["positions"][i, : len(types)] = torch.from_numpy(places).float()
    found = rows(Evidence(stored(train), stored(held_out), stored(samples)))
    row = found["not_judged_rdkit"]
    assert row.value == pytest.approx(100 * 3 / 64) and found["valid_rdkit"].value == pytest.approx(100 * 61 / 64)
    assert "1 whose charges RDKit does not place" in row.name and "2 with an element that has more bonds" in row.name
    assert row.beside["held-out real"] == 0 and row.beside["noise 1 A"] < 2
    edm = found["not_judged_edm"]
    assert edm.value == pytest.approx(100 / 64) and "1 with an element that has no table" in edm.name
    whole = rows(Evidence(stored(train), stored(held_out), stored(held_out)))["not_judged_rdkit"]
    assert whole.value == 0 and whole.name == "not judged by this protocol (RDKit)"


def test_searches_that_were_given_up_are_named(
    sets: tuple[dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
):
    train, held_out = sets
    given_up = chemistry.Perception(None, chemistry.GAVE_UP)
    with monkeypatch.context() as patch:
        patch.setattr(chemistry, "perceptions", lambda molecules, _: [given_up] * len(molecules))
        samples = stored(held_out)
    row = rows(Evidence(stored(train), None, samples))["not_judged_rdkit"]
    assert row.value == 100 and ": 64 whose search for bond orders was given up" in row.name


def test_repeated_samples_are_not_unique(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    train, held_out = sets
    again = {name: value[:16].repeat(4, *[1] * (value.ndim - 1)) for name, value in held_out.items()}
    found = rows(Evidence(stored(train), stored(held_out), stored(again)))
    assert found["valid_rdkit"].value == 100
    assert found["unique_rdkit"].value == found["valid_unique_edm"].value == 25
    assert found["unique_rdkit"].beside["held-out real"] == 100


def test_distributions_notice_what_changed(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    train, _ = sets
    bare = {"types": torch.where(train["types"] == 1, 0, train["types"]), "positions": train["positions"]}
    stretched = {**train, "positions": train["positions"] * 1.03}
    same, without, longer = (rows(Evidence(stored(train), None, stored(d))) for d in (train, bare, stretched))
    assert same["atoms_w1"].value == same["elements_tv"].value == same["rings_w1"].value == 0
    assert same["bond_lengths_w1"].value == pytest.approx(0, abs=1e-6)
    hydrogens = float((train["types"] == 1).sum(1).float().mean())
    assert without["atoms_w1"].value == pytest.approx(hydrogens, rel=1e-6)
    assert without["elements_tv"].value == pytest.approx(hydrogens / float((train["types"] > 0).sum(1).float().mean()))
    assert 0.01 < longer["bond_lengths_w1"].value < 0.06
    assert set(same["valid_rdkit"].beside) == {"noise 0.05 A", "noise 1 A"}  # of training molecules


def test_errors_of_turned_mirrored_and_shifted_molecules(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    data = sets[0]
    mask = (data["types"] > 0)[..., None]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn * torch.det(turn)  # proper
    moved = {**data, "positions": (data["positions"] @ turn + 3) * mask}
    found = metrics.errors(moved, data)
    assert max(found["rmsd"]) < 1e-5 and found["close"] == [100.0] * 64 and found["types_right"] == [100.0] * 64
    mirrored = metrics.errors({**data, "positions": data["positions"] * torch.tensor([-1.0, 1, 1])}, data)
    assert sorted(mirrored["rmsd"])[32] > 0.3
    wrong = {**data, "types": data["types"].clone()}
    wrong["types"][:, 0] = 15
    found = metrics.errors(wrong, data)
    assert found["types_right"] == found["close"] == [0.0] * 64 and max(found["rmsd"]) < 1e-6
    assert found["type_accuracy"][0] == pytest.approx(100 - 100 / float((data["types"][0] > 0).sum()))


@pytest.mark.parametrize("sigma", [0.02, 0.05])
def test_rmsd_of_noise_is_what_statistics_says(sigma: float, sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    """Superposition removes six of 3 n degrees of freedom: the mean square is sigma^2 (3 n - 6) / n."""
    data = sets[0]
    n = (data["types"] > 0).sum(1).double()
    expected = (sigma**2 * (3 * n - 6) / n).mean().sqrt()
    found = torch.tensor(metrics.errors(metrics.with_noise(data, sigma), data)["rmsd"], dtype=torch.float64)
    assert float(found.square().mean().sqrt()) == pytest.approx(float(expected), rel=0.06)


def test_reconstruction_rows(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    train, held_out = sets
    made = metrics.with_noise(held_out, 0.02)
    tensors = {name: torch.tensor(values) for name, values in metrics.errors(made, held_out).items()}
    found = rows(Evidence(stored(train), stored(held_out), None, stored(made, **tensors)))
    assert found["rmsd"].value < found["rmsd"].beside["noise 0.05 A"] < found["rmsd"].beside["noise 1 A"]
    assert found["type_accuracy"].value == 100 > found["type_accuracy"].beside["one element"] > 40
    assert found["same_graph"].value > 90 and found["same_graph"].beside["held-out real"] == 100
    assert 60 < found["reconstruction_stable"].value < 97
    assert found["close"].value > found["close"].beside["noise 0.05 A"]


def test_match_rate_by_inchi(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    pytest.importorskip("openbabel")
    pytest.importorskip("pymatgen")
    held_out = {name: value[:48] for name, value in sets[1].items()}
    made = metrics.with_noise(held_out, 0.02)
    space = metrics.Matched()
    space.prepare(CPU)
    found = rows(Evidence(None, stored(held_out), None, MemoryRows(space.against(made, held_out))), ("match",))
    assert found["match_rate"].value >= 90 and found["match_rate"].beside["held-out real"] == 100
    assert 0.01 < found["match_rmsd"].value < 0.1
    assert found["match_rate"].beside["noise 1 A"] == 0


KNOWN = {  # Crippen's logP, TPSA in square Angstrom, rings, heavy atoms
    "CCO": (-0.0014, 20.23, 0, 3), "c1ccccc1": (1.6866, 0.0, 1, 6), "CC(=O)O": (0.0909, 37.30, 0, 4),
    "C1CCCCC1": (2.3406, 0.0, 1, 6),
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    """The molecules of KNOWN, as atoms in space."""
    made = {"types": torch.zeros(len(KNOWN), 20, dtype=torch.int64), "positions": torch.zeros(len(KNOWN), 20, 3)}
    for row, (types, places) in enumerate(map(geometry, KNOWN)):
        made["types"][row, : len(types)] = torch.from_numpy(types)
        made["positions"][row, : len(types)] = torch.from_numpy(places).float()
    return made


def test_properties_are_those_of_known_molecules(known: dict[str, Tensor]):
    found = metrics.Perceived()(known)
    for place, column in enumerate(("rdkit_logp", "rdkit_tpsa", "rdkit_rings", "rdkit_heavy_atoms")):
        assert found[column].tolist() == pytest.approx([values[place] for values in KNOWN.values()], abs=5e-3), column
    nothing = metrics.Perceived()({**known, "positions": known["positions"] * 3})
    assert all(bool(nothing[column].isnan().all()) for column in ("rdkit_logp", "rdkit_tpsa", "rdkit_heavy_atoms"))


@pytest.mark.parametrize(("column", "place"), [("logP", 0), ("TPSA", 1), ("num_rings", 2), ("heavy atoms", 3)])
def test_properties_are_compared_with_what_was_asked_for(known: dict[str, Tensor], column: str, place: int):
    """Four samples asked for half more than they have, one asked for nothing, and one in pieces."""
    values = torch.tensor([numbers[place] for numbers in KNOWN.values()])
    six = {name: torch.cat([value, value[:2]]) for name, value in known.items()}
    six["positions"][5] *= 3
    asked = torch.cat([values + 0.5, torch.tensor([math.nan, 0.0])])
    free = {name: value[1:3] for name, value in known.items()}
    evidence = Evidence(
        None, stored(known, properties=values.clone()), stored(six, properties=asked),
        unconditional=stored(free, properties=values[:2].clone()), columns={"labels": "class", "properties": column},
    )  # fmt: skip
    metric = metrics.PropertyError()
    assert metric.needs_unconditional(evidence.columns)
    error, correlation = metric(evidence)
    assert error.value == pytest.approx(0.5, abs=5e-3) and "of the 4 of 6 samples" in error.name
    assert error.beside["held-out real"] == pytest.approx(0, abs=5e-3)
    each = [abs(float(a) - float(b)) for a in values[1:3] for b in (*asked[:4], asked[5])]
    assert error.beside["unconditional"] == pytest.approx(sum(each) / len(each), abs=5e-3)
    assert correlation.value == pytest.approx(1, abs=1e-4) == correlation.beside["held-out real"]


def test_properties_that_rdkit_does_not_compute_are_left_out(known: dict[str, Tensor]):
    samples = stored(known, properties=torch.zeros(len(KNOWN)))
    for columns in ({}, {"properties": "gap"}, {"properties": "logp_of_a_salt"}):
        assert not metrics.PropertyError().needs_unconditional(columns)
        assert metrics.PropertyError()(Evidence(None, None, samples, columns=columns)) == []


def test_posebusters_on_real_molecules_and_noise(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    pytest.importorskip("posebusters")
    few = {name: value[:12] for name, value in sets[1].items()}
    share, given_up = metrics.passing(few, energy=False)
    assert share >= 90 and given_up == 0
    assert metrics.passing(metrics.with_noise(few, 1.0), energy=False) == (0, 0)


PACKAGE = """
from pathlib import Path
import time
import pandas
class PoseBusters:
    def __init__(self, config): self.names = [module["function"] for module in config["modules"]]
    def bust(self, mols, _, __):
        [mol] = mols
        if mol.GetNumAtoms() == 4: time.sleep(1000)
        ratio = [True] if "energy_ratio" in self.names else []
        return pandas.DataFrame([[mol.GetNumAtoms() != 5, *ratio]])
"""
ENERGY = "{name: b, function: energy_ratio}"
CONFIG = f"modules: [{{name: a, function: flatness}}, {ENERGY}, {ENERGY}]"


@pytest.mark.parametrize("energy", [False, True])
def test_posebusters_without_end_is_given_up_and_named(energy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in that takes for ever for ammonia, and rejects methane; the third molecule, water, passes."""
    pytest.importorskip("pandas")
    (tmp_path / "posebusters" / "config").mkdir(parents=True)
    (tmp_path / "posebusters" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "posebusters" / "config" / "mol.yml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "posebusters", raising=False)
    monkeypatch.setattr(chemistry, "BUST_SECONDS", 3.0)
    chemistry.posebusters.cache_clear()
    bounded.stop()
    chem = chemistry.rdkit().Chem
    mols = [chem.AddHs(chem.MolFromSmiles(smiles)) for smiles in ("N", "C", "O")]
    assert chemistry.bust([*mols, None], energy) == [None, False, True, False]
    bounded.stop()
    sys.modules.pop("posebusters", None)
    monkeypatch.setattr(chemistry, "bust", lambda found, energy, done: [None, True, False, None])
    data = {"types": torch.tensor([[8, 1, 1]] * 4), "positions": torch.rand(4, 3, 3)}
    [row] = metrics.PoseBusters(energy)(Evidence(None, None, MemoryRows(data), None))
    assert row.value == 25 and "; 2 took longer than 3 s, counted as not passing" in row.name


def test_samples_of_nan_are_refused(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    broken = {**sets[0], "positions": sets[0]["positions"] * math.nan}
    for space in metrics.spaces():
        if space.name in LIGHT:
            with pytest.raises(ValueError, match="NaN or infinity"):
                space(broken)


def test_garbage_of_an_untrained_model_is_invalid_and_quick(sets: tuple[dict[str, Tensor], dict[str, Tensor]]):
    types, positions = sets[0]["types"], sets[0]["positions"]
    xenon = torch.where(types > 0, 54, 0)
    for data in (
        {"types": types * 0, "positions": positions * 0},  # no atoms
        {"types": types, "positions": positions * 0},  # all in one place
        {"types": types, "positions": positions * 0.6},
        {"types": xenon, "positions": positions},
    ):
        edm, rdkit = metrics.DistanceTables()(data), metrics.Perceived()(data)
        for verdict in (edm["edm_valid"], edm["edm_stable"], rdkit["rdkit_connected"]):
            assert not verdict.any()
        assert set(rdkit["rdkit_rings"].tolist()) == {-1}


def test_empty_evidence_is_silent():
    assert [metric(Evidence()) for metric in metrics.metrics()] == [[] for _ in metrics.metrics()]


@pytest.mark.parametrize(
    ("space", "blocked", "words"),
    [
        (metrics.Perceived(), "rdkit", r"rdkit: pip install 'unilatent\[atoms\]'"),
        (metrics.Babel(), "openbabel", r"openbabel: pip install 'unilatent\[atoms-eval\]'"),
        (metrics.Busters(), "posebusters", r"posebusters: pip install 'unilatent\[atoms-eval\]'"),
    ],
)
def test_missing_packages_are_named(space: Space, blocked: str, words: str, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.split(".")[0] == blocked:
            raise ImportError(name)
        return real(name, *rest)

    for made in (chemistry.rdkit, chemistry.openbabel, chemistry.posebusters):
        made.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=words):
        space.prepare(CPU)


def test_copies_are_nearer_to_training_molecules_than_held_out_ones_are() -> None:
    """Conformers of a few molecules: what is 0.05 A off a training one, however turned, is found to be so."""
    made = conformers.make(240, seed=0)
    data, others = batch(made, range(200)), batch(made, range(200, 240))
    turned = Molecule(Molecule.Config.small()).augment(data, Streams(("turn",), range(200)))
    train, held_out = stored(data), stored(others)
    (row,) = metrics.NearestConformer()(
        Evidence(train, held_out, stored(metrics.with_noise(turned, 0.05 / 3**0.5)))
    )  # fmt: skip
    assert 0.025 < row.value < 0.05 < row.beside["held-out real"], "superposition takes a part of the noise away"
    (itself,) = metrics.NearestConformer()(Evidence(train, held_out, train))
    assert itself.value < 1e-6
    other = stored({**data, "types": torch.where(data["types"] > 1, 14, data["types"])})
    assert metrics.NearestConformer()(Evidence(train, held_out, other)) == []


def test_the_small_set_has_every_molecule_in_turn_and_no_geometry_twice() -> None:
    made, again = conformers.make(230, seed=0), conformers.make(120, seed=0)
    assert again.names == made.names[:120] and (again.coordinates == made.coordinates[: len(again.coordinates)]).all()
    smiles = [name.split(":")[0] for name in made.names]
    assert 90 < len(set(smiles)) < 120 and len(set(made.names)) == 230 and made.sizes.max() <= 14
    assert max(int((one.types > 1).sum()) for one in made) == 4
    assert chemistry.stability(*batch(made, range(230)).values()).molecules.all()
    water = [one.coordinates for one in made if one.name.startswith("O:")]
    assert len(water) > 1 and abs(np.ptp([np.linalg.norm(x[0] - x[1]) for x in water])) > 1e-4
    assert set(made.columns) == {"logp", "tpsa"}
