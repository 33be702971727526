"""Captions of images: files next to them, tables, shards, Hugging Face columns, templates; invalid input."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_image_data import encoded, make, noise, splits, tree, zipped
from test_shards import PNG, tar
from test_shards import image as png

from unilatent.batches import Plan, collate, loader
from unilatent.config import ConfigError
from unilatent.modalities._media.captions import of_file, table
from unilatent.modalities.base import BadSample
from unilatent.modalities.image import ImageData
from unilatent.modalities.image.storing import ImagesToStore
from unilatent.shards.writing import BAD, write
from unilatent.types import decode_texts, encode_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


def loose(root: Path, count: int = 4) -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i}.png").write_bytes(encoded(noise(8, 8, 3, seed=i)))
    return root


def prompts(dataset) -> list[str]:
    """The caption of each sample."""
    return [dataset[i][1]["prompts"] for i in range(len(dataset))]


def alternatives(dataset, index: int = 0) -> set[str]:
    """The captions that training uses for one sample."""
    return {dataset.view(index, position)[1]["prompts"] for position in range(40)}


# ---- files next to images ------------------------------------------------------------------------------------------


def test_text_files_next_to_images_have_one_caption_per_line(tmp_path: Path):
    folder = loose(tmp_path / "in")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"image {i}\n\n  le {i}ème dessin \r\n", encoding="utf-8")
    (folder / "README.txt").write_text("no caption of anything")
    for source in (folder, zipped(folder, tmp_path / "in.zip")):
        train = splits(source).train
        assert prompts(train) == [f"image {i}" for i in range(4)]
        assert alternatives(train) == {"image 0", "le 0ème dessin"}
        assert train.facts == {"prompts": {"examples": ("image 0", "image 1", "image 2", "image 3")}}
    batch = collate([train[i] for i in range(4)], make())
    assert decode_texts(batch.values["prompts"]) == prompts(train) and batch.values["prompts"].shape == (4, 7)


def test_json_has_one_or_several_captions_and_classes_stay(tmp_path: Path):
    folder = tree(tmp_path / "in", each=2)
    for name in ("cat/0", "cat/1", "dog/0"):
        (folder / f"{name}.json").write_text(json.dumps({"captions": [name, name.upper()]}))
    (folder / "dog/1.json").write_text('{"caption": "a dog", "width": 7}')
    train = splits(folder).train
    assert prompts(train) == ["cat/0", "cat/1", "dog/0", "a dog"]
    assert [train[i][1]["labels"] for i in range(4)] == [0, 0, 1, 1] and set(train.facts) == {"labels", "prompts"}
    assert alternatives(train) == {"cat/0", "CAT/0"}


def test_json_without_captions_is_ignored(tmp_path: Path):
    folder = loose(tmp_path / "in")
    (folder / "0.json").write_text('{"width": 8}')
    train = splits(folder).train
    assert train[0][1] == {} and train.facts == {}


def test_an_image_without_a_caption_is_a_bad_sample_and_captions_can_be_left_out(tmp_path: Path):
    folder = loose(tmp_path / "in")
    for i in (0, 1, 3):
        (folder / f"{i}.txt").write_text(f"image {i}")
    train = splits(folder).train
    with pytest.raises(BadSample, match=r"2\.png: no caption file 2\.txt; .*data\.captions=false"):
        train[2]
    batches = list(loader(train, make(), Plan(range(4), 4), 0))
    assert {bad.index for _, bad_samples in batches for bad in bad_samples} == {2}
    assert "image 2" not in [text for batch, _ in batches for text in decode_texts(batch.values["prompts"])]
    assert splits(folder, captions=False).train[2][1] == {}


@pytest.mark.parametrize(
    ("suffix", "raw", "words"),
    [
        ("txt", b"caf\xe9", "line 1: byte 0xe9 is not UTF-8"),
        ("txt", b" \n\n", "empty"),
        ("txt", b"x" * (2**20 + 1), r"1,048,577 bytes, more than 1,048,576"),
        ("json", b"{", "not valid JSON"),
        ("json", b"[" * 100_000, "not valid JSON"),
        ("json", b'{"width": 1}', "needs"),
        ("json", b'{"caption": 3}', "int, not a text"),
        ("json", b'{"captions": ["a", 3]}', "list, not a text"),
        ("json", b'{"captions": []}', "empty"),
    ],
)
def test_invalid_captions_are_named(suffix: str, raw: bytes, words: str):
    with pytest.raises(BadSample, match=rf"caption here[:,] {words}"):
        of_file(raw, suffix, "here")


def test_a_byte_order_mark_and_zero_bytes_are_removed():
    assert of_file("\ufeffein Bild\0\n".encode(), "txt", "x") == ("ein Bild",)


def test_the_fingerprint_follows_captions(tmp_path: Path):
    folder = loose(tmp_path / "in")
    plain = splits(folder).train.fingerprint
    for i in range(4):
        (folder / f"{i}.txt").write_text("one")
    captioned = splits(folder).train.fingerprint
    (folder / "0.txt").write_text("another")
    assert len({plain, captioned, splits(folder).train.fingerprint}) == 3
    assert splits(folder, captions=False).train.fingerprint == plain


# ---- tables --------------------------------------------------------------------------------------------------------


def test_metadata_tables_of_hugging_face(tmp_path: Path):
    folder = loose(tmp_path / "in")
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"a cat, asleep"\n1.png,b\n2.png,c\n3.png,d\n1.png,B\n')
    for source in (folder, zipped(folder, tmp_path / "in.zip")):
        train = splits(source).train
        assert prompts(train) == ["a cat, asleep", "b", "c", "d"] and alternatives(train, 1) == {"b", "B"}
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": f"./{i}.png", "caption": [f"x{i}", f"y{i}"], "note": f"n{i}"} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert prompts(splits(folder).train) == ["x0", "x1", "x2", "x3"] and alternatives(splits(folder).train) == {
        "x0",
        "y0",
    }
    assert prompts(splits(folder, caption_column="note").train) == ["n0", "n1", "n2", "n3"]


def test_file_names_are_relative_to_the_folder_of_the_table(tmp_path: Path):
    folder = tree(tmp_path / "in", each=2)
    for name in ("cat", "dog"):
        rows = [{"file_name": f"{i}.png", "text": f"{name} {i}"} for i in range(2)]
        (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = splits(folder).train
    assert prompts(train) == ["cat 0", "cat 1", "dog 0", "dog 1"] and train[2][1]["labels"] == 1


@pytest.mark.parametrize("archived", [False, True])
def test_files_that_only_the_table_lists_are_bad_samples(tmp_path: Path, archived: bool):
    folder = loose(tmp_path / "in")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n3.png,\nnone.png,e\n")
    source = zipped(folder, tmp_path / "in.zip") if archived else folder
    train = splits(source).train
    assert len(train) == 5 and train.fingerprint == splits(source).train.fingerprint
    with pytest.raises(BadSample, match=r"image .*none\.png"):
        train[4]
    for index, name in ((2, "2.png"), (3, "3.png")):
        with pytest.raises(BadSample, match=rf"{name}.* \(by .*metadata\.csv.*\): no caption; write one"):
            train[index]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", b"name,text\nx,y\n", "no column file_name, only name, text"),
        ("metadata.csv", b"file_name,text\n../x.png,y\n", r"line 2: file_name '../x.png' leads out of the folder"),
        ("metadata.csv", b"file_name,text\n/etc/x.png,y\n", r"leads out of the folder"),
        ("metadata.csv", b"file_name,text\n,y\n", "line 2: no file_name"),
        ("metadata.csv", b"file_name,text\nx.png,a, b\n", "line 2: more cells than the 2 columns of the header"),
        ("metadata.csv", b"file_name,text\nx.png,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "x.png"}\n{"file_name', "line 2: not valid JSON"),
        ("metadata.jsonl", b'{"file_name": "x.png", "text": 7}\n', "line 1: int, not a text"),
        ("metadata.jsonl", b"[1]\n", "line 1: list, not an object"),
    ],
)
def test_a_broken_table_is_refused_at_once(name: str, text: bytes, words: str):
    with pytest.raises(ValueError, match=rf"here.*{words}"):
        table(text, name, "here", None)


def test_caption_columns_have_a_usual_or_a_configured_name(tmp_path: Path):
    folder = loose(tmp_path / "in")
    with pytest.raises(ValueError, match=r"data\.caption_column: 'text', but .* has no metadata\.csv or"):
        splits(folder, caption_column="text")
    (folder / "metadata.csv").write_text("file_name,box\n0.png,1 2 3\n")
    assert splits(folder).train.facts == {}
    with pytest.raises(ValueError, match=r"data\.caption_column: 'text' is not in .*; there are file_name, box"):
        splits(folder, caption_column="text")


# ---- shards --------------------------------------------------------------------------------------------------------


def test_prepare_includes_captions(tmp_path: Path):
    folder = tree(tmp_path / "in", each=3)
    for path in sorted(folder.rglob("*.png")):
        if path.stem != "2":
            path.with_suffix(".txt").write_text(f"{path.parent.name} {path.stem}\nagain")
    out = tmp_path / "out"
    summary = write(ImagesToStore(folder, PNG), out, shard_size=2, seed=0, workers=1)
    assert (summary.total, summary.bad) == (4, 2) and "no caption file 2.txt" in (out / BAD).read_text()
    train = splits(out).train
    keys = [train.collection.names[i] for i in range(4)]
    assert prompts(train) == [key.replace("/", " ") for key in keys] and alternatives(train) == {
        prompts(train)[0],
        "again",
    }
    assert [train[i][1]["labels"] for i in range(4)] == [int(key.startswith("dog")) for key in keys]
    assert set(splits(out, captions=False).train[0][1]) == {"labels"}
    with tarfile.open(out / "shard-000000.tar") as archive:
        assert [name.rpartition(".")[2] for name in archive.getnames()][:3] == ["cls", "png", "txt"]


def test_changed_captions_are_other_data(tmp_path: Path):
    folder = loose(tmp_path / "in")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"image {i}")
    write(ImagesToStore(folder, PNG), tmp_path / "out", shard_size=4, seed=0, workers=1)
    (folder / "0.txt").write_text("something longer")
    with pytest.raises(ValueError, match="contains shards of other images or settings"):
        write(ImagesToStore(folder, PNG), tmp_path / "out", shard_size=4, seed=0, workers=1)


def test_other_webdataset_shards_with_texts(tmp_path: Path):
    members = [("a.png", png(0)), ("a.txt", b"first"), ("a.json", b'{"caption": "other", "label": 1}'),
               ("b.json", b'{"caption": "second", "label": 0}'), ("b.png", png(1)),
               ("c.png", png(2)), ("c.json", b'{"label": 0}')]  # fmt: skip
    train = splits(tar(tmp_path / "x.tar", *members)).train
    assert [train[i][1] for i in (0, 1)] == [{"labels": 1, "prompts": "first"}, {"labels": 0, "prompts": "second"}]
    with pytest.raises(BadSample, match=r"sample c in .*x\.tar: no caption \("):
        train[2]
    again = splits(tmp_path / "x.tar").train  # from the cached index
    assert first_prompts(again, 2) == ["first", "second"] and again.fingerprint == train.fingerprint
    without = splits(tar(tmp_path / "y.tar", *[m for m in members if not m[0].endswith("txt")])).train
    assert first_prompts(without, 2) == ["other", "second"]


def first_prompts(dataset, count: int) -> list[str]:
    return [dataset[i][1]["prompts"] for i in range(count)]


# ---- templates, arrays, columns ------------------------------------------------------------------------------------


def test_class_names_through_templates(tmp_path: Path):
    folder = tree(tmp_path / "in", classes=("tabby_cat", "dog"), each=2)
    (folder / "dog/0.txt").write_text("not used")
    train = splits(folder, caption_template=["a photo of a {}", "{}, drawn"]).train
    assert prompts(train) == ["a photo of a dog"] * 2 + ["a photo of a tabby cat"] * 2
    assert alternatives(train) == {"a photo of a dog", "dog, drawn"} and train[3][1]["labels"] == 1
    other = splits(folder, caption_template="{}").train
    assert prompts(other)[0] == "dog" and other.fingerprint != train.fingerprint
    assert prompts(splits("digits", caption_template="the digit {}").train)[:2] == ["the digit 0", "the digit 1"]
    out = tmp_path / "out"
    write(ImagesToStore(tree(tmp_path / "plain"), PNG), out, shard_size=4, seed=None, workers=1)
    shards = splits(out, caption_template="a {}").train
    assert set(prompts(shards)) == {"a cat", "a dog"} and shards.fingerprint != splits(out).train.fingerprint


def test_templates_need_a_placeholder_and_classes(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"caption_template: 'a photo' has no \{\}"):
        ImageData.parse({"caption_template": "a photo"})
    with pytest.raises(ValueError, match=r"data\.caption_template: needs classes, but"):
        splits(loose(tmp_path / "in"), caption_template="a {}")


def test_generated_images_have_their_prompts(tmp_path: Path):
    arrays = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "prompts": encode_texts(["a dog", "größer"]).numpy()}
    np.savez(tmp_path / "samples.npz", **arrays)
    assert prompts(make().made(tmp_path)) == ["a dog", "größer"]
    np.savez(tmp_path / "samples.npz", **(arrays | {"prompts": np.zeros((3, 4), np.uint8)}))
    with pytest.raises(ValueError, match=r"--samples: .*prompts is uint8 \(3, 4\), not texts as bytes"):
        make().made(tmp_path)


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet folder with a text and a list of texts per row; the text of row 2 is missing."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    kinds = datasets.Features({
        "img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string"),
        "many": datasets.Sequence(datasets.Value("string")),
    })  # fmt: skip
    buffer = io.BytesIO(png(0))
    rows = {
        "img": [{"bytes": buffer.getvalue(), "path": None}] * 6, "kind": [0, 1] * 3,
        "text": [f"text {i}" if i != 2 else None for i in range(6)], "many": [[f"m{i}", f"n{i}"] for i in range(6)],
    }  # fmt: skip
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    return tmp_path / "set"


def test_a_hugging_face_column_of_texts(columns: Path):
    train = splits(f"hf:{columns}").train
    assert train[0][1] == {"labels": 0, "prompts": "text 0"}
    with pytest.raises(BadSample, match=r"row 2 of train in hf:.*: no caption"):
        train[2]
    assert alternatives(splits(f"hf:{columns}", caption_column="many").train, 1) == {"m1", "n1"}
    assert set(splits(f"hf:{columns}", captions=False).train[2][1]) == {"labels"}
    assert splits(f"hf:{columns}", caption_template="a {}").train[1][1]["prompts"] == "a dog"
    (names := columns.parent / "names.txt").write_text("dog Hund\ncat Katze\n")
    for streaming in (False, True):
        named = splits(f"hf:{columns}", caption_template="a {}", class_names_file=str(names), streaming=streaming).train
        assert named.facts["labels"]["class_names"] == ("Katze", "Hund")
        assert named.facts["prompts"]["examples"][:2] == ("a Katze", "a Hund")
    with pytest.raises(ValueError, match=r"data\.caption_column: 'kind' is not a column of texts"):
        splits(f"hf:{columns}", caption_column="kind")


def test_a_stream_of_texts(columns: Path):
    train = splits(f"hf:{columns}", streaming=True).train
    batches = list(loader(train, make(), Plan(range(2), 5), 0))
    texts = [text for batch, _ in batches for text in decode_texts(batch.values["prompts"])]
    assert {bad.message for _, bad_samples in batches for bad in bad_samples} and set(texts) == {
        f"text {i}" for i in (0, 1, 3, 4, 5)
    }
    assert train.facts["prompts"]["examples"][0] == "text 0"
    assert train.some_values("prompts", 2000) == [f"text {i}" for i in (0, 1, 3, 4, 5)]
    assert train.some_values("prompts", 2) == ["text 0", "text 1"] and train.some_values("labels", 9) == []
    named = splits(f"hf:{columns}", streaming=True, caption_template=["a {}", "one {}"]).train
    captions = [text for batch, _ in loader(named, make(), Plan(range(8), 6), 0) for text in
            decode_texts(batch.values["prompts"])]  # fmt: skip
    assert set(captions) == {"a cat", "one cat", "a dog", "one dog"}
    again = [text for batch, _ in loader(named, make(), Plan(range(4, 8), 6), 0) for text in
             decode_texts(batch.values["prompts"])]  # fmt: skip
    assert again == captions[24:] and torch.is_tensor(batches[0][0].data)
