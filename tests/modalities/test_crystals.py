"""Crystals: the generated set, reading and writing files, invalid records, images."""

from __future__ import annotations

import csv
import gzip
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("pymatgen.core")

from unilatent.maths.geometry import nearest_image
from unilatent.maths.streams import Streams
from unilatent.modalities._atoms.grid import paste_grid
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.crystal import Crystal, CrystalConfig, generator, metrics, render
from unilatent.modalities.crystal.data import CrystalData, load, read_files
from unilatent.modalities.crystal.lattices import cell_matrix, distances_of
from unilatent.modalities.crystal.records import READERS, prepared

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def crystals() -> Systems:
    return generator.make(150, seed=3)


def batch(systems: Systems, size: int = 20) -> dict[str, Tensor]:
    """Systems as padded data of the modality."""
    types, places = np.zeros((len(systems), size), np.int64), np.zeros((len(systems), size, 3), np.float32)
    for i in range(len(systems)):
        one = systems[i]
        types[i, : len(one.types)], places[i, : len(one.types)] = one.types, one.coordinates
    lattice = torch.from_numpy(np.asarray(systems.lattice))
    return {"types": torch.from_numpy(types), "fractional": torch.from_numpy(places), "lattice": lattice}


# ---- the generated set ---------------------------------------------------------------------------------------------


def test_two_workers_generate_the_bits_of_one(crystals: Systems) -> None:
    reports: list[int] = []
    other = generator.make(150, seed=3, workers=2, progress=lambda what, more, total: reports.append(more))
    assert other.names == crystals.names and other.types.tobytes() == crystals.types.tobytes()
    assert other.coordinates.tobytes() == crystals.coordinates.tobytes()
    assert np.asarray(other.lattice).tobytes() == np.asarray(crystals.lattice).tobytes()
    assert sum(reports) == 150
    assert generator.make(20, seed=4).names != crystals.names[:20]
    assert generator.make(20, seed=3).names == crystals.names[:20]


def test_generated_crystals_are_what_their_names_say(crystals: Systems) -> None:
    """spglib finds the space group again, no formula occurs twice in a prototype, and no atoms are too close."""
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    assert (
        len(set(crystals.names)) == 150
        and crystals.sizes.max() <= 20
        and np.asarray(crystals.lattice)[:, 3:].min() > 59
    )
    for i in range(0, 150, 3):
        one = crystals[i]
        assert one.lattice is not None
        lattice = Lattice.from_parameters(*one.lattice.astype(float))
        structure = Structure(lattice, one.types.tolist(), one.coordinates.astype(float))
        assert SpacegroupAnalyzer(structure, 0.02).get_space_group_number() == one.columns["spacegroup"], one.name
        assert distances_of(lattice.matrix, one.coordinates.astype(float)).min() >= generator.NEAREST - 1e-3
        niggli = lattice.get_niggli_reduced_lattice()
        assert np.allclose(niggli.parameters, one.lattice, atol=2e-2)


def test_every_prototype_has_its_atoms_and_charges() -> None:
    counts = {prototype.name: prototype.counts for prototype in generator.PROTOTYPES}
    assert len(counts) == 36
    assert counts["spinel"] == {"A": 2, "B": 4, "X": 8} and counts["A4"] == {"A": 2} and counts["A15"]["B"] == 6
    assert counts["double perovskite"] == {"A": 2, "B": 1, "C": 1, "X": 6} and counts["corundum"] == {"A": 4, "X": 6}
    for number, prototype in enumerate(generator.PROTOTYPES):
        if prototype.ionic and prototype.name != "pyrite-like":
            for charges in generator._balances(number):
                signed = {role: -charge if role == "X" else charge for role, charge in charges.items()}
                assert sum(signed[role] * count for role, count in prototype.counts.items()) == 0


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_fresh", lambda seed, candidates: iter(range(5)))
    with pytest.raises(ValueError, match=r"num: 9 crystals, but the prototypes gave only [0-5]; ask for fewer"):
        generator.make(9)


def test_generated_crystals_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CrystalData(path="prototypes", num=40, held_out=8)
    train, held_out = load(data)
    monkeypatch.setattr(generator, "make", None)
    again = load(data)
    assert (len(train), len(held_out)) == (32, 8) and not set(train.names) & set(held_out.names)
    assert again[0].names == train.names and again[1].coordinates.tobytes() == held_out.coordinates.tobytes()
    with pytest.raises(ValueError, match=r"data\.held_out: 40, but there are only 40 crystals"):
        load(CrystalData(path="prototypes", num=40, held_out=40))


def test_a_generated_set_is_read_unchanged(tmp_path: Path, crystals: Systems) -> None:
    crystals.save(tmp_path / "made.npz")
    found, _ = load(CrystalData(path=str(tmp_path / "made.npz"), held_out=0))
    assert found.names == crystals.names and found.types.tobytes() == crystals.types.tobytes()
    assert np.allclose(found.lattice, crystals.lattice, rtol=1e-5)
    same = (np.abs(found.coordinates - crystals.coordinates) < 1e-6).all(1)
    assert same.all(), f"{(~same).sum()} of {len(same)} atoms moved"


# ---- files ---------------------------------------------------------------------------------------------------------


def salt(a: float = 4.0, symbols: tuple[str, str] = ("Cs", "Cl"), name: str = "x") -> System:
    numbers = np.array([{"Cs": 55, "Cl": 17, "Na": 11, "Br": 35}[symbol] for symbol in symbols])
    places = np.array([[0, 0, 0], [0.5, 0.5, 0.5]], np.float32)
    return System(numbers, places, np.array([a, a, a, 90, 90, 90], np.float32), name)


def test_every_kind_of_file_gives_the_same_crystal(tmp_path: Path) -> None:
    one = salt()
    poscar = "CsCl\n1.0\n4 0 0\n0 4 0\n0 0 4\nCs Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
    texts = {"a.cif": render.cif(one), "a.xyz": render.frame(one), "POSCAR_1": poscar}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found, _ = load(CrystalData(path=str(tmp_path / name), held_out=0))
        assert found.types.tolist() == [55, 17], name
        assert np.allclose(found.coordinates, one.coordinates, atol=1e-6), name
        assert np.allclose(found.lattice, [one.lattice], atol=1e-4), name
    frames = "".join(render.frame(salt(a)) for a in (4.0, 5.0))
    (tmp_path / "b.extxyz.gz").write_bytes(gzip.compress(frames.encode()))
    found, _ = load(CrystalData(path=str(tmp_path / "b.extxyz.gz"), held_out=0))
    assert np.asarray(found.lattice)[:, 0].tolist() == [4.0, 5.0]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"in/{i}.cif", render.cif(salt(4 + i)))
            archive.writestr(f"__MACOSX/{i}.cif", "nothing")
    found, held_out = load(CrystalData(path=str(tmp_path / "all.zip"), held_out=1))
    assert (len(found), len(held_out)) == (3, 1)


def test_symmetry_is_unfolded_and_cells_are_reduced() -> None:
    """Conventional rocksalt, two sites in space group 225, has eight atoms; a skewed cell becomes cubic."""
    text = render.cif(salt(5.6, ("Na", "Cl"))).replace("'P 1'", "'F m -3 m'").replace("number   1", "number   225")
    text = text.replace(" _symmetry_equiv_pos_site_id\n", "").replace("loop_\n _symmetry_equiv_pos_as_xyz\n", "")
    one = READERS["cif"](text.replace("  1  'x, y, z'\n", ""))
    assert sorted(one.types.tolist()) == [11] * 4 + [17] * 4
    skewed = cell_matrix(np.array([4, 4, 4, 90, 90, 90])) @ np.eye(3)
    skewed[2] += 2 * skewed[0] - skewed[1]
    lines = ["2", f'Lattice="{" ".join(map(str, skewed.ravel()))}" energy=-1.5', "Cl 2 2 2", "Cs 0 0 0"]
    made = prepared(READERS["frame"]("\n".join(lines)), 20)
    assert np.allclose(made.lattice, [4, 4, 4, 90, 90, 90], atol=1e-4) and made.types.tolist() == [55, 17]
    assert np.allclose(made.coordinates, [[0, 0, 0], [0.5, 0.5, 0.5]], atol=1e-5) and made.columns == {"energy": -1.5}


def table(path: Path, cifs: list[str], more: str = "") -> Path:
    rows = [f'{i},m-{i},"{cif}",{i / 2}' for i, cif in enumerate(cifs)]
    path.write_text("\n".join([",material_id,cif,gap", *rows, more]))
    return path


def test_the_splits_that_data_bring_are_kept(tmp_path: Path) -> None:
    for split, lengths in (("train", (4, 5, 6)), ("val", (7,)), ("test", (8, 9))):
        table(tmp_path / f"{split}.csv", [render.cif(salt(a)) for a in lengths])
    for part, wanted in (("validation", [7.0]), ("test", [8.0, 9.0])):
        train, held_out = load(CrystalData(path=str(tmp_path), held_out_part=part))
        assert np.asarray(train.lattice)[:, 0].tolist() == [4.0, 5.0, 6.0]
        assert np.asarray(held_out.lattice)[:, 0].tolist() == wanted
    assert train.columns["gap"].tolist() == [0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"data\.columns: .* has no column of numbers 'bulk'; it has gap"):
        load(CrystalData(path=str(tmp_path), columns=("bulk",)))


GOOD = render.cif(salt())
ATOM = "  Cl  Cl1  0.5  0.5  0.5  1"
BAD = {
    "it is empty": "",
    "unknown element 'Qq'": GOOD.replace("Cl  Cl1", "Qq  Qq1"),
    "the coordinates hold NaN or infinity": GOOD.replace("0.5  0.5  0.5", "nan  0.5  0.5"),
    "the lattice holds NaN or infinity": GOOD.replace("_cell_length_b   4", "_cell_length_b   nan"),
    "atoms 1 and 2 are 0.04 A apart": GOOD.replace("0.5  0.5  0.5", "0.01  0  0"),
    r"no lattice \(_cell_length_c is missing\)": GOOD.replace("_cell_length_c   4\n", ""),
    r"partial occupancy \(Cl: 0.25\)": GOOD.replace(ATOM, ATOM[:-1] + "0.25"),
    "21 atoms, more than 20": GOOD + "".join(f"  Cl  Cl{i}  0.5  0.5  {i / 40}  1\n" for i in range(19)),
    "it has no atoms": GOOD.replace(ATOM, "").replace("  Cs  Cs0  0  0  0  1", ""),
    "'zero' is no number": GOOD.replace("Cs0  0  0", "Cs0  zero  0"),
    "a lattice of 4, 4, 4, 90, 90, 190 is impossible": GOOD.replace("gamma   90", "gamma   190"),
    "its lattice has no volume": GOOD.replace("gamma   90", "gamma   0.001"),
    "a lattice of 99999, 4, 4, 90, 90, 90 is too long for its width": GOOD.replace("length_a   4", "length_a   99999"),
    "atoms are 0.50 A from their own images": GOOD.replace("length_a   4", "length_a   0.5"),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_record_is_reported_and_the_others_are_read(tmp_path: Path, words: str) -> None:
    path = table(tmp_path / "set.csv", [GOOD, BAD[words], GOOD])
    with pytest.warns(UserWarning, match=rf"set\.csv.* record 2 \(m-1\): {words}"):
        train, _ = load(CrystalData(path=str(path), held_out=0), max_atoms=20)
    assert train.names == ("m-0", "m-2")
    with pytest.warns(UserWarning, match=words):  # also when read from the cache
        load(CrystalData(path=str(path), held_out=0, max_atoms=20))


def test_too_many_bad_records_are_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "set.csv", [GOOD, "", GOOD, ""])
    with pytest.raises(
        ValueError, match=r"2 of 4 records cannot be used, more than data\.bad_share=0\.01 allows: .*m-1"
    ):
        load(CrystalData(path=str(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(load(CrystalData(path=str(path), bad_share=0.5, held_out=0))[0]) == 2


def test_paths_that_hold_no_crystals_are_named(tmp_path: Path) -> None:
    def refused(name: str, words: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load(CrystalData(path=str(tmp_path / name)))

    refused("none.cif", r"none\.cif does not exist")
    refused("a.txt", r"a\.txt holds no crystals; accepted are \.csv", b"x")
    refused("a.csv", r"a\.csv is empty", b"")
    refused("b.csv", r"b\.csv has no column cif \(it has id, x\)", b"id,x\n1,2\n")
    refused("c.csv", r"no record can be used: there is none", b"id,cif\n")
    refused("a.zip", r"a\.zip is not a whole zip archive", b"PK")
    refused("a.csv.gz", r"a\.csv\.gz cannot be read \(Not a gzipped file", b"no gzip")
    refused("POSCAR", r"POSCAR: line 6 names no elements", b"x\n1\n4 0 0\n0 4 0\n0 0 4\n1 1\nDirect\n0 0 0\n.5 .5 .5\n")
    refused("a.xyz", r"no lattice \(Lattice=", b"1\nwater\nO 0 0 0\n")
    refused("b.xyz", r"3 atoms announced, 1 line follows", b"3\nwater\nO 0 0 0\n")
    Systems.of([System(np.array([8]), np.zeros((1, 3)), None, "O")]).save(tmp_path / "m.npz")
    refused("m.npz", r"m\.npz holds systems without a lattice, not crystals")
    (tmp_path / "empty").mkdir()
    refused("empty", r"empty holds no crystals")


def test_perov5_is_read(tmp_path: Path) -> None:
    """Real files give the same atoms as pymatgen's parser and Niggli reduction."""
    from pymatgen.core import Structure

    source = SHARED / "perov_5_val.csv.gz"
    if not source.is_file():
        pytest.skip("needs the shared data")
    with gzip.open(source, "rt") as packed:
        rows = list(csv.reader(packed))[:41]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    train, _ = load(CrystalData(path=str(tmp_path / "p.csv"), held_out=0, columns=("heat_all",)))
    assert len(train) == 40 and list(train.columns) == ["heat_all"]
    for i in range(40):
        truth = Structure.from_str(rows[i + 1][2], "cif").get_reduced_structure("niggli")
        apart = train[i].coordinates - truth.frac_coords
        assert train[i].types.tolist() == [site.specie.Z for site in truth]
        assert np.abs(apart - apart.round()).max() < 1e-5
        assert np.allclose(train[i].lattice, truth.lattice.parameters, atol=1e-4)


# ---- files and images ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, crystals: Systems) -> None:
    data = batch(crystals.take(range(6)))
    data["fractional"][0, 0] = torch.tensor([0.1, 0.9999999, 1e-7])
    data["lattice"][1] = torch.tensor([3.0, 4.0, 5.0, 40.0, 140.0, 110.0])  # an impossible cell
    paths = render.write(data, tmp_path / "made", start=7)
    assert [path.name for path in paths] == [f"{i:06d}.cif" for i in range(7, 13)]
    found = batch(read_files(tmp_path / "made"))  # the .extxyz files hold the same crystals and are skipped
    assert all(torch.equal(found[key], data[key]) for key in data)
    from pymatgen.core import Structure

    structure = Structure.from_file(str(paths[3]))
    assert sorted(site.specie.Z for site in structure) == sorted(crystals[3].types.tolist())
    with pytest.raises(ValueError, match=r"bad\.cif: unknown element 'Qq'; repair or remove it"):
        (tmp_path / "bad.cif").write_text(BAD["unknown element 'Qq'"])
        read_files(tmp_path / "bad.cif")


def test_a_grid_shows_atoms_in_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    data = batch(Systems.of([salt(), salt(symbols=("Na", "Br"))]))
    paste_grid([render.cells(row) for row in [data, data]], tmp_path / "a" / "grid.png", columns=1)
    image = Image.open(tmp_path / "a" / "grid.png")
    assert image.size == (render.CELL, 4 * (render.CELL + render.LINE))
    first = image.crop((0, 0, render.CELL, render.CELL))
    shown = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in first.convert("RGB").get_flattened_data()}
    assert render.colour(17) in shown and render.colour(55) in shown and render.colour(35) not in shown
    data["lattice"][0] = torch.nan
    paste_grid([render.cells(row) for row in [data]], tmp_path / "a" / "grid.png")


def test_from_an_atom_of_the_rarest_element_tokens_are_the_same_wherever_the_origin_is(
    crystals: Systems,
) -> None:
    given, rarest = (Crystal(CrystalConfig(max_atoms=20, origin=origin)) for origin in ("given", "rarest"))
    data = batch(crystals)
    moved = given.augment(data, Streams(("move",), range(len(data["types"]))))
    one, two = (rarest.unpack(rarest.pack(each))["fractional"] for each in (data, moved))
    for types, places in zip(data["types"].tolist(), one, strict=True):
        atoms = [t for t in types if t]
        least = min(atoms.count(t) for t in atoms)
        assert places[[atoms.count(t) for t in atoms].index(least)].abs().max() == 0
    assert nearest_image(one - two).abs().max() < 1e-5
    assert nearest_image(data["fractional"] - moved["fractional"]).abs().max() > 0.4
    close = (one - two).abs().flatten(1).amax(1) < 1e-5  # without the nearest image, too: no atom near the seam
    assert close.double().mean() > 0.95
    assert rarest.reconstruction_loss(rarest.ideal(moved), data)["fractional"] < 1e-8
    assert max(metrics.errors(rarest.finish(rarest.unpack(rarest.pack(data))), data)["frac_rms"]) < 1e-5


def test_atoms_at_the_origin_are_not_torn_apart() -> None:
    """Caesium chloride with its atoms a little before or after 0: nearly the same tokens, Cartesian ones included."""
    data = {
        "types": torch.tensor([[55, 17, 17]] * 2), "lattice": torch.tensor([[4.0, 4, 4, 90, 90, 90]] * 2),
        "fractional": torch.tensor([[[0.0, 0, 0], [0.999, 0.5, 0.001], [0.5, 0.5, 0.5]],
                                    [[0.0, 0, 0], [0.001, 0.5, 0.999], [0.5, 0.5, 0.5]]]),
    }  # fmt: skip
    one, two = Crystal(CrystalConfig(max_atoms=3, origin="rarest")).pack(data).values
    assert (one - two).abs().max() < 0.02
    given = Crystal(CrystalConfig(max_atoms=3)).pack(data).values
    assert (given[0] - given[1]).abs().max() > 0.9


def test_random_coordinates_have_the_error_of_their_baseline(crystals: Systems) -> None:
    """Apart from a shift, that depends on the number of atoms: 0 for one atom."""
    data = batch(crystals)
    count = (data["types"] > 0).sum(1)
    anywhere = {**data, "fractional": torch.rand(data["fractional"].shape, generator=torch.Generator().manual_seed(0))}
    found = torch.tensor(metrics.errors(anywhere, data)["frac_rms"])
    assert found[count == 1].abs().max() < 1e-6 < 0.1 < found[count == 2].mean() < found[count == 5].mean() < 12**-0.5
