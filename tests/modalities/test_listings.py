"""What a data set consists of is found out once, kept while it is right, and given to other processes and workers."""

from __future__ import annotations

import json
import os
import pickle
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unilatent import listings
from unilatent.batches import loader
from unilatent.config import ConfigError
from unilatent.listings import Listings
from unilatent.modalities._media import hub
from unilatent.modalities.base import Splits
from unilatent.modalities.image import Image as Images
from unilatent.modalities.image import ImageConfig
from unilatent.modalities.image.data import ImageData
from unilatent.processes import Processes

MODALITY = Images(ImageConfig(size=8, patch_size=2, channels=1))


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a test are as old as they get; other tests set it back."""
    monkeypatch.setattr(listings, "SETTLED", 0)


def write(path: Path, grey: int = 100, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), grey).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    for i in range(8):
        write(data / "ab"[i % 2] / f"{i}.png", 10 * i)
        (data / "ab"[i % 2] / f"{i}.txt").write_text(f"number {i}")
    time.sleep(0.02)  # a tick of the file system's clock
    return data


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    time.sleep(0.02)
    return path


class First(Processes):
    """Rank 0 of two, whose answers are kept."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.answers: list[bytes] = []

    def from_main(self, find: Any) -> Any:
        self.answers.append(pickle.dumps(find()))
        return pickle.loads(self.answers[-1])


class Other(Processes):
    """Rank 1, which is given them."""

    def __init__(self, first: First) -> None:
        super().__init__("cpu")
        self.rank, self.is_main, self.given = 1, False, iter(first.answers)

    def from_main(self, find: Any) -> Any:
        return pickle.loads(next(self.given))


def opened(data: Path | str, listings: Listings, **settings: Any) -> Splits:
    return MODALITY.splits(ImageData(path=str(data), held_out=2, cache=False, **settings), listings)


def described(splits: Splits) -> Any:
    parts = (splits.train, splits.held_out)
    return [(p.fingerprint, p.facts, list(p.notes), [p[i][1] for i in range(len(p))]) for p in parts]


class Looked(AssertionError): ...


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        raise Looked

    for name in names:
        monkeypatch.setattr(name, fail)


LOOKS = (
    "os.walk", "os.scandir", "os.listdir", "zipfile.ZipFile._RealGetContents",
    "unilatent.modalities._media.files.Folder.stamp", "unilatent.shards.reading.index",
)  # fmt: skip


def sources(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The same images as a folder, a zip, a folder with a table, tar shards with and without a manifest."""
    from unilatent.cli import main

    table = tmp_path / "table"
    for i in range(8):
        write(table / f"{i}.png", 10 * i)
    (table / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(8)))
    shards, bare = tmp_path / "shards", tmp_path / "bare"
    for out in (shards, bare):
        with pytest.raises(SystemExit) as done:
            main(["data", "prepare", str(folder), "--out", str(out), "--size", "8"])
        assert done.value.code == 0
    (bare / "shards.json").unlink()
    time.sleep(0.02)
    return {"folder": folder, "zip": zipped(folder, tmp_path / "x.zip"), "table": table, "shards": shards, "bare": bare}


def test_all_sources_are_the_same_kept_and_given(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, found and kept, read again at resume, and in another process, which looks at nothing."""
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    for name, source in sources(folder, tmp_path).items():
        file = tmp_path / f"{name}.json"
        alone = described(opened(source, listings.ALONE))
        first = First()
        here = Listings(first, file)
        assert described(opened(source, here)) == alone, name
        here.write()
        with monkeypatch.context() as patch:
            refuse(patch, "os.walk", "os.scandir", "unilatent.modalities._media.files.Folder.stamp")
            refuse(
                patch, "unilatent.shards.reading.ShardSet._index_all", "unilatent.modalities._media.shards._held_out"
            )
            kept = opened(source, Listings(None, file))
            assert kept.train.fingerprint == alone[0][0], name
        with monkeypatch.context() as patch:
            refuse(patch, *LOOKS)
            other = opened(source, Listings(Other(first), file))
            assert other.train.facts == alone[0][1] and len(other.train) == 6
        assert [other.train[i][1] for i in range(6)] == alone[0][3], name


CHANGES = {
    "a new file": lambda d: write(d / "a" / "new.png"),
    "a removed file": lambda d: (d / "a" / "2.png").unlink(),
    "a renamed file": lambda d: (d / "a" / "2.png").rename(d / "a" / "x.png"),
    "a file moved to another class": lambda d: (d / "a" / "2.png").rename(d / "b" / "2.png"),
    "a file rewritten with another size": lambda d: write(d / "a" / "2.png", size=64),
    "a new class": lambda d: write(d / "c" / "0.png"),
    "a caption of another size": lambda d: (d / "a" / "2.txt").write_text("something else"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found(folder: Path, tmp_path: Path, change: str) -> None:
    file = tmp_path / "listing.json"
    first = Listings(None, file)
    before = opened(folder, first).train.fingerprint, opened(folder, first).held_out.fingerprint
    first.write()
    CHANGES[change](folder)
    now = opened(folder, Listings(None, file))
    assert (now.train.fingerprint, now.held_out.fingerprint) != before
    alone = opened(folder, listings.ALONE)
    assert (now.train.fingerprint, now.held_out.fingerprint) == (alone.train.fingerprint, alone.held_out.fingerprint)
    assert now.train.collection.names == alone.train.collection.names


def test_a_table_that_is_edited_in_place_is_read_again(tmp_path: Path) -> None:
    data, file = tmp_path / "data", tmp_path / "listing.json"
    for i in range(4):
        write(data / f"{i}.png", i)
    table = data / "metadata.csv"
    table.write_text("file_name,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(4)))
    time.sleep(0.02)
    first = Listings(None, file)
    opened(data, first)
    first.write()
    with table.open("r+") as opened_table:
        opened_table.write(table.read_text().replace("number", "NUMBER"))
    assert opened(data, Listings(None, file)).train[0][1]["prompts"].startswith("NUMBER")


def test_a_folder_that_changed_while_it_was_listed_is_not_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "SETTLED", 10**12)
    file = tmp_path / "listing.json"
    first = Listings(None, file)
    opened(folder, first)
    first.write()
    refuse(monkeypatch, "os.walk")
    with pytest.raises(Looked):
        opened(folder, Listings(None, file))


@pytest.mark.parametrize("harm", ["{", "[]", '{"version": 0}', '{"version": 1, "findings": {"KEY": {"begun": 1}}}'])
def test_a_damaged_file_is_as_none(folder: Path, tmp_path: Path, harm: str) -> None:
    file = tmp_path / "listing.json"
    first = Listings(None, file)
    right = described(opened(folder, first))
    first.write()
    (key, *_) = json.loads(file.read_text())["findings"]
    file.write_text(harm.replace("KEY", json.dumps(key)[1:-1]))
    assert described(opened(folder, Listings(None, file))) == right


def test_few_of_many_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "CHECKED", 10)
    monkeypatch.setattr(listings.spread, "__defaults__", (10,))
    data, file = tmp_path / "data", tmp_path / "listing.json"
    write(data / "a" / "0.png")
    for i in range(1, 200):
        os.link(data / "a" / "0.png", data / "a" / f"{i}.png")
    time.sleep(0.02)
    first = Listings(None, file)
    opened(data, first)
    first.write()
    seen: list[str] = []
    original = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: (seen.append(str(path)), original(path, *a, **k))[1])
    assert len(opened(data, Listings(None, file)).train) == 198
    assert sum(name.endswith(".png") for name in seen) == 10


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prepared_here", [True, False])
def test_hugging_face_data_are_opened_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, prepared_here: bool
) -> None:
    """Others map the arrow files of a table if they have them, else they open it; a stream is sent as it is."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()
    data = tmp_path / "data"
    data.mkdir()
    write(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    for part, count in {"train": 12, "test": 5}.items():
        cells = [{"bytes": content, "path": f"{i}.png"} for i in range(count)]
        rows = datasets.Dataset.from_dict({"img": cells, "kind": [i % 2 for i in range(count)]}, features=features)
        rows.to_parquet(data / f"{part}-00000-of-00001.parquet")
    settings = {"held_out_split": "test", "streaming": streaming}

    def parts(splits: Splits) -> Any:
        batches = [batch for batch, _ in loader(splits.train, MODALITY, [range(4), range(4, 12)], seed=0)]
        labels = [batch.values["labels"].tolist() for batch in batches]
        return splits.train.fingerprint, labels, splits.held_out.fingerprint

    first = First()
    alone = parts(opened(f"hf:{data}", Listings(first), **settings))
    opens: list[str] = []
    original = hub._HubSplit._open
    monkeypatch.setattr(hub._HubSplit, "_open", lambda split: (opens.append(split.split), original(split))[1])
    if not prepared_here and not streaming:
        monkeypatch.setattr("os.path.isfile", lambda path, isfile=os.path.isfile: ".arrow" not in path and isfile(path))
    assert parts(opened(f"hf:{data}", Listings(Other(first)), **settings)) == alone
    assert opens == ([] if prepared_here or streaming else ["train", "test"])


def test_systems_of_atoms_are_read_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the state of their files, by which they are cached, is asked for once."""
    pytest.importorskip("rdkit")
    from unilatent.modalities._atoms import reading
    from unilatent.modalities.molecule import Molecule, MoleculeConfig
    from unilatent.modalities.molecule import data as molecules

    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    data, file = tmp_path / "data", tmp_path / "listing.json"
    (data / "more").mkdir(parents=True)
    for i in range(6):
        water = f"3\n\nO 0 0 {0.1 * i:.2f}\nH 0.76 0.59 0\nH -0.76 0.59 0\n"
        (data / ("more" if i % 2 else "") / f"{i}.xyz").write_text(water)
    time.sleep(0.02)
    modality, config = Molecule(MoleculeConfig.small()), molecules.MoleculeData(path=str(data), held_out=1)
    alone = modality.splits(config)
    first = First()
    here = Listings(first, file)
    assert modality.splits(config, here).train.fingerprint == alone.train.fingerprint
    here.write()
    with monkeypatch.context() as patch:
        refuse(patch, "unilatent.modalities._atoms.reading._hash_of_files")
        assert modality.splits(config, Listings(None, file)).train.fingerprint == alone.train.fingerprint
        refuse(patch, "unilatent.modalities.molecule.data.load")
        other = modality.splits(config, Listings(Other(first), file))
    assert other.train.fingerprint == alone.train.fingerprint
    assert other.held_out.fingerprint == alone.held_out.fingerprint
    before = reading.cache_name(Listings(None, file), data, 1)
    (data / "more" / "1.xyz").write_text("1\n\nO 0 0 0\n")
    assert reading.cache_name(Listings(None, file), data, 1) != before


def test_data_workers_read_no_directory_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a zip open the file, and find its members as the first process read them."""
    train = opened(zipped(folder, tmp_path / "x.zip"), listings.ALONE).train
    looked = zipfile.ZipFile._RealGetContents

    def only_empty(archive: zipfile.ZipFile) -> None:
        if getattr(archive.fp, "name", None) is not None:
            raise Looked
        looked(archive)

    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", only_empty)
    batches = list(loader(train, MODALITY, [range(3), range(3, 6)], seed=0, workers=1))
    assert [skipped for _, skipped in batches] == [[], []]
    assert sorted(int(b.values["prompts"].shape[0]) for b, _ in batches) == [3, 3]
    assert pickle.loads(pickle.dumps(train.collection.source)).read("a/2.png")


def test_what_the_first_process_refuses_reaches_all(tmp_path: Path) -> None:
    """As `from_main` tells the others."""

    class Failing(Processes):
        def from_main(self, find: Any) -> Any:
            try:
                return find()
            except ValueError as error:
                raise ConfigError(str(error)) from error

    with pytest.raises(ConfigError, match="does not exist"):
        opened(tmp_path / "nothing", Listings(Failing("cpu")))
