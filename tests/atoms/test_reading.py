"""Shared steps of loading molecules and crystals: unusable records, the cache, source files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen.core")

from unilatent.modalities._atoms.files import frames, source_files
from unilatent.modalities._atoms.reading import AtomData
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.crystal import data as crystals
from unilatent.modalities.molecule import data as molecules

READERS = {"molecules": (molecules, molecules.MoleculeData), "crystals": (crystals, crystals.CrystalData)}
both = pytest.mark.parametrize("kind", READERS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frame(kind: str, atoms: int, more: str = "") -> str:
    lattice = f'Lattice="4 0 0 0 4 0 0 0 {3 * atoms}"' if kind == "crystals" else ""
    return f"{atoms}\n{lattice} {more}\n" + "".join(f"He 0 0 {3 * i}\n" for i in range(atoms))


def folder(kind: str, path: Path, good: int = 9, large: int = 0, bad: int = 0) -> Path:
    """Write files of 3 atoms, of 6 atoms, and with an unknown element."""
    path.mkdir(exist_ok=True)
    for i in range(good):
        (path / f"good{i}.xyz").write_text(frame(kind, 3))
    for i in range(large):
        (path / f"large{i}.xyz").write_text(frame(kind, 6))
    for i in range(bad):
        (path / f"bad{i}.xyz").write_text(frame(kind, 3).replace("He", "Qq"))
    return path


def load(kind: str, path: Path, max_atoms: int | None = None, **settings: object) -> list[str]:
    """Return the names of all usable systems."""
    reader, config = READERS[kind]
    train, held_out = reader.load(config(path=str(path), held_out=1, **settings), None, max_atoms)
    return sorted([*train.names, *held_out.names])


def warnings_of(kind: str, path: Path, max_atoms: int | None = None, **settings: object) -> list[str]:
    """Return the distinct warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(kind, path, max_atoms, **settings)
    return sorted({str(one.message) for one in caught if one.category is UserWarning})


@both
def test_too_large_systems_are_reported_and_are_no_bad_records(kind: str, tmp_path: Path) -> None:
    source = folder(kind, tmp_path / "some", large=5)
    [large] = warnings_of(kind, source, max_atoms=3)
    assert f"left out 5 {kind} of more than 3 atoms (modality.max_atoms)" in large and "6 atoms" in large
    assert "large0.xyz" in large and load(kind, source, max_atoms=6)[9:] == [f"large{i}" for i in range(5)]
    bad, large = warnings_of(kind, folder(kind, source, large=5, bad=1), max_atoms=3)
    assert "left out 1 of 10 records" in bad and "bad0.xyz" in bad and "left out 5" in large
    with pytest.raises(ValueError, match=r"2 of 11 records cannot be used, more than data\.bad_share=0\.01 allows"):
        load(kind, folder(kind, source, bad=2), max_atoms=3)


@both
def test_a_smaller_limit_of_the_data_is_the_one_that_is_named(kind: str, tmp_path: Path) -> None:
    reader, config = READERS[kind]
    data = config(path=str(folder(kind, tmp_path / "some", large=1)), max_atoms=3)
    with pytest.warns(UserWarning, match=r"left out 1 .* of more than 3 atoms \(data\.max_atoms\)"):
        reader.load(data, None, 6)


@both
def test_where_all_are_too_large_the_field_is_named(kind: str, tmp_path: Path) -> None:
    source = folder(kind, tmp_path / "some")
    with pytest.raises(ValueError, match=rf"all 9 {kind} have more than 2 atoms \(modality\.max_atoms\).*raise it"):
        load(kind, source, max_atoms=2)
    with pytest.raises(ValueError, match=r"no record can be used: .*bad0\.xyz"):
        load(kind, folder(kind, tmp_path / "bad", good=0, bad=1))


@both
@pytest.mark.parametrize(("records", "allowed"), [(9, 1), (40, 4)])
def test_bad_share_limits_the_bad_records(kind: str, records: int, allowed: int, tmp_path: Path) -> None:
    """max(1, 10 % of all records)."""
    source = folder(kind, tmp_path / "some", good=records - allowed, bad=allowed)
    assert f"left out {allowed} of {records}" in warnings_of(kind, source, bad_share=0.1)[0]
    with pytest.raises(ValueError, match=f"{allowed + 1} of {records + 1} records"):
        load(kind, folder(kind, source, good=0, bad=allowed + 1), bad_share=0.1)


@both
def test_systems_without_a_column_that_is_named_are_left_out(kind: str, tmp_path: Path) -> None:
    source = folder(kind, tmp_path / "some")
    for i in range(4):
        (source / f"good{i}.xyz").write_text(frame(kind, 3, f"energy={i}.5"))
    [text] = warnings_of(kind, source, columns=("energy",))
    assert f"left out 5 {kind} without energy" in text and len(load(kind, source, columns=("energy",))) == 4
    assert len(load(kind, source, property_column="energy")) == 9


# ---- the cache -------------------------------------------------------------------------------------------------------


@both
def test_what_was_read_is_read_no_more_until_a_file_changes(
    kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(kind, tmp_path / "some", bad=1)
    first, warned = load(kind, source), warnings_of(kind, source)
    assert {path.suffix for path in (cache / "systems").iterdir()} == {".json", ".npz"}
    with monkeypatch.context() as patch:
        patch.setattr(READERS[kind][0], "source_files", lambda *_: pytest.fail("read again"))
        assert load(kind, source) == first and warnings_of(kind, source) == warned
    changed = source / "good0.xyz"
    changed.write_text(frame(kind, 3).replace("He", "Ne"))  # as many bytes
    os.utime(changed, ns=(1, 1))
    reader, config = READERS[kind]
    with pytest.warns(UserWarning, match="left out 1 of 10"):
        train, held_out = reader.load(config(path=str(source), held_out=1))
    assert sorted({*train.types.tolist(), *held_out.types.tolist()}) == [2, 10]


@both
@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_a_damaged_cache_entry_is_replaced(
    kind: str, suffix: str, damage: bytes | None, tmp_path: Path, cache: Path
) -> None:
    source = folder(kind, tmp_path / "some")
    first = load(kind, source)
    [path] = (cache / "systems").glob(f"*{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert warnings_of(kind, source) == [] and load(kind, source) == first
    assert path.stat().st_size == len(whole)


@both
def test_a_cache_that_cannot_be_written_costs_one_warning(kind: str, tmp_path: Path, cache: Path) -> None:
    source = folder(kind, tmp_path / "some")
    cache.write_text("a file, where a folder should be")
    [text] = warnings_of(kind, source)
    assert str(cache / "systems") in text and "generated again each time" in text and len(load(kind, source)) == 9


@both
def test_a_full_disk_costs_one_warning_and_leaves_nothing(
    kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    [text] = warnings_of(kind, folder(kind, tmp_path / "some"))
    assert "No space left on device" in text and list((cache / "systems").iterdir()) == []


def test_generating_molecules_works_without_a_cache(cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, held_out = molecules.load(molecules.MoleculeData(path="qm9-like", num=4, held_out=1))
    assert len(train) + len(held_out) == 4 and len({str(one.message) for one in caught}) == 1


# ---- files -----------------------------------------------------------------------------------------------------------


@both
def test_other_files_and_the_other_kind_are_no_members(kind: str, tmp_path: Path) -> None:
    other = {"molecules": "crystals", "crystals": "molecules"}[kind]
    source = folder(kind, tmp_path / "some", good=2)
    (source / "other.xyz").write_text(frame(other, 3))
    (source / ".hidden.xyz").write_text(frame(kind, 3))
    (source / "notes.txt").write_text("none")
    data: AtomData = READERS[kind][1]()
    assert [one.stem for one in source_files(source, data.kind)] == ["good0", "good1", "other"]
    assert [one.stem for one in source_files(source, data.kind, mixed=True)] == ["good0", "good1"]


def test_frames_follow_each_other_until_one_is_none() -> None:
    one = ["1", "", "He 0 0 0"]
    assert list(frames("\n".join([*one, "", *one]))) == [one, one]
    assert list(frames("\n".join([*one, "x"]))) == [one, "line 4: 'x' is no number of atoms"]
    assert list(frames("\n".join(["2", *one[1:]]))) == ["2 atoms announced, 1 line follows"]


def test_systems_are_iterated_as_they_are_counted() -> None:
    systems = Systems.of([System(np.full(n, n), np.zeros((n, 3)), None, f"{n}") for n in (1, 3, 2)])
    assert [one.types.tolist() for one in systems] == [[1], [3] * 3, [2] * 2] and systems[-1].name == "2"
    with pytest.raises(IndexError):
        systems[3]
