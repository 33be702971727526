"""Data of molecules, crystals and both: settings, splits, files and errors."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen.core")

from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.base import Evidence
from unilatent.modalities.crystal import Crystal, CrystalConfig, CrystalData, matching
from unilatent.modalities.crystal import data as crystal_files
from unilatent.modalities.crystal import metrics as crystal_metrics
from unilatent.modalities.crystal import render as crystal_render
from unilatent.modalities.crystal.records import READERS
from unilatent.modalities.joint import Joint, JointConfig
from unilatent.modalities.molecule import Molecule, MoleculeData, generator
from unilatent.modalities.molecule import data as molecule_files
from unilatent.modalities.molecule import render as molecule_render
from unilatent.outputs import RECORD, Outputs
from unilatent.records import MemoryRows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


def salt(a: float = 4.0, atoms: int = 2, kind: float = 0.0) -> System:
    """`atoms` atoms in a line, in a long cell."""
    places = np.array([[0, 0, i / atoms] for i in range(atoms)], np.float32)
    lattice = np.array([a, a, 3.0 * atoms, 90, 90, 90], np.float32)
    types = np.array([(55, 17)[i % 2] for i in range(atoms)])
    return System(types, places, lattice, f"{a}-{atoms}", {"kind": kind})


def molecules(count: int, kind: float = 1.0) -> Systems:
    places = np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]], np.float32)
    return Systems.of([System(np.array([8, 1, 1]), places, None, f"m-{i}", {"kind": kind}) for i in range(count)])


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("qm9-unite-s", ("data.path: not set", "qm9-like")),
        ("mp20-unite-s", ("data.path: not set", "prototypes")),
        ("joint-unite-s", ("data.parts.molecule.path: not set", "qm9-like")),
    ],
)
def test_a_published_preset_without_data_is_refused(
    preset: str, words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unilatent.cli import main

    with pytest.raises(SystemExit) as left:
        main(["train", preset, "--out", str(tmp_path / "run")])
    message = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and all(word in message for word in words)


def test_small_presets_use_generated_data() -> None:
    from unilatent.presets import preset

    names = ("molecules", "molecules-qm9-like", "crystals", "crystals-prototypes")
    paths = {name: preset(name).data.path for name in names}
    assert paths == {
        "molecules": "small-molecules", "molecules-qm9-like": molecule_files.OFFLINE,
        "crystals": crystal_files.SMALL, "crystals-prototypes": crystal_files.OFFLINE,
    }  # fmt: skip


def test_crystals_have_the_classes_of_their_column(tmp_path: Path) -> None:
    modality = Crystal(CrystalConfig(max_atoms=4))
    Systems.of([salt(4 + i / 10, kind=i % 3) for i in range(12)]).save(tmp_path / "c.npz")
    splits = modality.splits(CrystalData(path=str(tmp_path / "c.npz"), held_out=3, label_column="kind"))
    assert splits.train.facts == {"labels": {"class_names": ("0", "1", "2")}}
    found = [splits.train[i][1]["labels"] for i in range(9)]
    assert found == [round(10 * (float(name[:3]) - 4)) % 3 for name in splits.train.systems.names]
    Systems.of([salt(4 + i / 10, kind=i / 2) for i in range(12)]).save(tmp_path / "d.npz")
    with pytest.raises(ValueError, match=r"data\.label_column: 'kind' of .* is 0\.5, not a whole number"):
        modality.splits(CrystalData(path=str(tmp_path / "d.npz"), label_column="kind"))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_held_out_of_qm9_thins_its_part(part: str, tmp_path: Path) -> None:
    """Training molecules do not depend on how many are held out, and do not overlap with the other parts."""
    (tmp_path / "gdb9.sdf").touch()
    systems = molecules(600)
    documented = MoleculeData(path=str(tmp_path), held_out_part=part)
    train, whole = molecule_files.split(systems, documented)
    for held_out, count in ((5, 5), (0.1, round(0.1 * len(whole)))):
        again, subset = molecule_files.split(systems, documented.model_copy(update={"held_out": held_out}))
        assert again.names == train.names
        assert len(subset) == count and set(subset.names) < set(whole.names)
    with pytest.raises(ValueError, match=rf"data\.held_out: 700, but there are only {len(whole)} molecules"):
        molecule_files.split(systems, documented.model_copy(update={"held_out": 700}))


@pytest.mark.parametrize(("name", "total", "split"), [("small.csv", 45_229, ""), ("all.csv", 40_000, ""),
                                                      ("all.csv", 45_230, "test")])  # fmt: skip
def test_only_the_whole_of_mp20_is_cut_as_mp20(name: str, total: int, split: str) -> None:
    text = f'material_id,cif\nm-1,"{crystal_render.cif(salt())}"\n'
    record = next(crystal_files._rows(text, f"somewhere/{name}", Path(name).stem))
    assert crystal_files._split_of(record, 40_000, total) == split


def test_the_models_size_is_the_limit_of_crystals(tmp_path: Path) -> None:
    Systems.of([salt(4 + i / 10, atoms=(2, 6, 24)[i % 3]) for i in range(12)]).save(tmp_path / "c.npz")

    def largest(model_limit: int, data_limit: int | None = None) -> int:
        limit = min(model_limit, data_limit or model_limit)
        with pytest.warns(UserWarning, match="left out") if limit < 24 else nullcontext():
            splits = Crystal(CrystalConfig(max_atoms=model_limit)).splits(
                CrystalData(path=str(tmp_path / "c.npz"), held_out=1, max_atoms=data_limit)
            )
        return max(int(part.systems.sizes.max()) for part in (splits.train, splits.held_out))

    assert (largest(8), largest(24), largest(24, 8), largest(2, 20)) == (6, 24, 6, 2)


# ---- both kinds ----------------------------------------------------------------------------------------------------

WATER = "3\nwater\nO 0 0 0.12\nH 0 0.76 -0.48\nH 0 -0.76 -0.48\n"


@pytest.fixture
def both() -> Joint:
    return Joint(JointConfig.small().model_copy(update={"elements": (1, 8, 17, 55)}))


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_both_kinds_are_all_read(both: Joint, packed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    texts = {
        "a.cif": crystal_render.cif(salt(4.0)), "b.cif": crystal_render.cif(salt(5.0)), "c.xyz": WATER,
        "d.extxyz": crystal_render.frame(salt(6.0)), "e.xyz": crystal_render.frame(salt(7.0)), "readme.txt": "none",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    source = folder
    if packed:
        source = tmp_path / "mixed.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
    data, names = next(both.read(source, 16))
    assert names == ["a", "b", "c", "d", "e"]
    assert data["periodic"].tolist() == [True, True, False, True, True]
    assert data["lattice"][:, 0].round().tolist() == [4, 5, 0, 6, 7]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("d.cif", "nothing", "d.cif: no lattice"), ("d.xyz", WATER.replace("O 0", "Qq 0"), "'Qq', not an element")],
)
def test_a_fault_of_either_kind_is_raised(both: Joint, name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(crystal_render.cif(salt()))
    (tmp_path / "c.xyz").write_text(WATER)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        list(both.read(tmp_path, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds neither molecules nor crystals"):
        list(both.read(tmp_path / "empty", 4))


def test_what_both_kinds_wrote_before_is_cleared(both: Joint, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.cif").write_text(crystal_render.cif(salt(4.0 + i)))
    (tmp_path / "3.xyz").write_text(WATER)
    data, _ = next(both.read(tmp_path, 16))
    out = tmp_path / "out"
    with Outputs(out, "sample").writing() as new:
        written = both.write(data, new)
        assert {path.relative_to(new).parts[0] for path in written} == {"molecule", "crystal"}
    outputs = Outputs(out, "sample")
    outputs.begin()
    assert [path.name for path in out.rglob("*")] == [RECORD]
    again, _ = next(both.read(tmp_path, 16))
    with outputs.writing() as new:
        both.write(again, new)
    back, _ = next(both.read(out, 16))
    assert (back["types"] == data["types"]).all() and (back["periodic"] == data["periodic"]).all()


def test_reconstructing_twice_leaves_no_stale_files(
    both: Joint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.json names the folder of each file."""
    from unilatent.cli import main, reconstruct
    from unilatent.methods.unite import UNITE
    from unilatent.model_config import ModelConfig

    small = {"width": 32, "depth": 1, "heads": 2}
    parts = {"generative_encoder": {**small, "in_context_tokens": 0}, "decoder": {**small, "mlp_width": 32}}
    method = {"name": "unite", "latent_channels": 4, "reconstruction_noise": 0.1, **parts}
    model = UNITE(ModelConfig.parse({"modality": both.config.plain(), "method": method})).eval()
    monkeypatch.setattr(reconstruct, "load", lambda *_: model)
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.cif").write_text(crystal_render.cif(salt()))
    for name in "bcd":
        (source / f"{name}.xyz").write_text(WATER)
    out = tmp_path / "out"
    for num in (4, 2):
        with pytest.raises(SystemExit) as left:
            main(["reconstruct", "model", str(source), "--out", str(out), "--num", str(num)])
        assert not left.value.code
        files = [row["output"] for row in json.loads((out / "metrics.json").read_text())["files"]]
        assert files == ["crystal/000000.cif", *(f"molecule/{i:06d}.xyz" for i in range(1, num))]
        existing = {path.relative_to(out).as_posix() for path in out.glob("*/*") if path.suffix in (".cif", ".xyz")}
        assert existing == set(files)


# ---- generated molecules -------------------------------------------------------------------------------------------


def test_more_molecules_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [molecules(5)[i] for i in range(5)]
    monkeypatch.setattr(generator, "draws", lambda seed, piece: few)
    with pytest.raises(ValueError, match=r"num: 1,000,000 molecules, but the graphs gave only 5; ask for fewer"):
        generator.compose(1_000_000)
    assert len(generator.compose(5)) == 5


def test_generating_molecules_does_not_change_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        generator.draws(0, 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_sdf_files_have_no_aromatic_bonds(tmp_path: Path) -> None:
    turn = torch.arange(6) * torch.pi / 3
    ring = torch.stack([turn.cos(), turn.sin(), torch.zeros(6)], -1)
    benzene = torch.cat([1.395 * ring, 2.482 * ring])[None]
    data = {"types": torch.tensor([[6] * 6 + [1] * 6]), "positions": benzene}
    molecule_render.write(data, tmp_path)
    lines = (tmp_path / "000000.sdf").read_text().splitlines()
    bonds = [line for line in lines if len(line.split()) == 4 and line.split()[0].isdigit()]
    orders = [int(line[6:9]) for line in bonds]
    assert sorted(orders) == [1] * 9 + [2] * 3


# ---- crystals ------------------------------------------------------------------------------------------------------


def test_other_ways_to_lay_out_a_cif_are_read() -> None:
    text = crystal_render.cif(salt())
    plain = READERS["cif"](text)
    row = next(line for line in text.splitlines() if line.split()[:2] == ["Cl", "Cl1"])
    words = row.split()
    ways = {
        "a row over two lines": text.replace(row, f"  {' '.join(words[:3])}\n  {' '.join(words[3:])}"),
        "a comment in a row": text.replace(row, f"{row}  # the second"),
        "a value on the next line": text.replace("_cell_length_b   4", "_cell_length_b\n4"),
    }
    for way, changed in ways.items():
        assert changed != text, way
        one = READERS["cif"](changed)
        assert one.types.tolist() == plain.types.tolist(), way
        assert np.allclose(one.coordinates, plain.coordinates, atol=1e-6), way
        assert np.allclose(one.lattice, plain.lattice, atol=1e-4), way


def arrays(*systems: System) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    most = max(len(one.types) for one in systems)
    types, places = np.zeros((len(systems), most), np.int64), np.zeros((len(systems), most, 3))
    for i, one in enumerate(systems):
        types[i, : len(one.types)], places[i, : len(one.types)] = one.types, one.coordinates
    return types, places, np.array([one.lattice for one in systems], np.float64)


def test_only_crystals_with_rivals_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five valid crystals, four are distinct; one of these is known, so that three are novel."""
    other = replace(salt(4.2), types=np.array([11, 17]))
    third = replace(salt(4.2), types=np.array([37, 35]))
    fourth = replace(salt(4.2), types=np.array([3, 9]))
    made = arrays(salt(4.1), salt(4.1001), other, third, fourth, salt(4.0))
    known = matching.KnownCrystals(*arrays(other))
    reduced, count = matching.reduced, []
    monkeypatch.setattr(matching, "reduced", lambda *one: (count.append(1), reduced(*one))[1])
    valid = np.array([True] * 5 + [False])
    found = crystal_metrics.novelty(made, valid, known)
    assert found == pytest.approx({"unique": 80, "novel": 60, "valid_unique_novel": 50})
    assert len(count) == 4, "two of one composition, and the known one on both sides"


def test_the_name_of_novel_says_how_many_were_compared() -> None:
    rows = MemoryRows({"valid": torch.ones(200)})
    assert Evidence(train=rows, train_total=300).describe_train("crystals") == "200 of the 300 training crystals"
    assert Evidence(train=rows, train_total=200).describe_train("crystals") == "the 200 training crystals"
    assert Evidence(train=rows).describe_train("molecules") == "200 training molecules"


def test_slow_metrics_run_only_on_request(both: Joint) -> None:
    from unilatent.evaluation.evaluate import choose_metrics

    there = all(find_spec(name) is not None for name in ("openbabel", "pymatgen"))
    for modality, match in ((Molecule(Molecule.Config.small()), "match_rate"), (both, "molecule_match_rate")):
        chosen = {key for metric in choose_metrics(modality, ()) for key in metric.gives}
        assert not {"posebusters", "posebusters_energy"} & chosen
        assert (match in chosen) == there
        assert not any(space.needs_download for space in modality.spaces()), "records stay in the run's folder"


@pytest.mark.parametrize("kind", ["molecule", "crystal"])
def test_generating_a_set_reports_progress(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[int, int]] = []

    @contextmanager
    def bars(**_: bool) -> Iterator[Callable[[str, int, int], None]]:
        yield lambda what, more, total: reports.append((more, total))

    modality, data = {
        "molecule": (Molecule(Molecule.Config.small()), MoleculeData(path="qm9-like", num=20)),
        "crystal": (Crystal(Crystal.Config.small()), CrystalData(path="prototypes", num=20)),
    }[kind]
    monkeypatch.setattr(sys.modules[type(modality).__module__], "progress_of", bars)
    modality.splits(data)
    assert sum(more for more, _ in reports) == 20 and {total for _, total in reports} == {20}


def test_packed_files_of_molecules_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.xyz.gz").write_bytes(gzip.compress(WATER.encode()))
    (tmp_path / "b.xyz").write_text(WATER.replace("O ", "8 ").replace("H ", "D "))
    found = molecule_files.read(tmp_path)
    assert found.systems.names == ("a", "b") and not found.bad
    assert found.systems.types.tolist() == [8, 1, 1] * 2
    (tmp_path / "c.xyz.gz").write_bytes(b"no gzip")
    assert "c.xyz.gz: cannot be read (Not a gzipped file" in molecule_files.read(tmp_path).bad[0]
