"""Class folders named by codes: captions of codes are refused, a file gives the class names."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from test_image_data import encoded, noise, splits
from test_shards import sample, tar

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.config import ConfigError
from unilatent.modalities._media.class_names import read_class_names
from unilatent.modalities.image import ImageData

CODES = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench, Tinca tinca", "goldfish", "great_white shark")
CAPTIONS = ["a photo of a tench, Tinca tinca", "a photo of a goldfish", "a photo of a great white shark"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


def imagenet(root: Path, classes: tuple[str, ...] = CODES) -> Path:
    """ImageNet's layout: one folder per code."""
    for i, code in enumerate(classes):
        (root / code).mkdir(parents=True)
        (root / code / f"{code}_1.png").write_bytes(encoded(noise(8, 8, 3, seed=i)))
    return root


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("classes", [CODES, ("0", "1", "10"), ("birds", "n01440764")])
def test_captions_of_codes_are_refused(tmp_path: Path, classes: tuple[str, ...]):
    folder = imagenet(tmp_path / "in", classes)
    with pytest.raises(ValueError, match=r"^data.caption_template: classes are called \w+,.*class_names_file") as error:
        splits(folder, caption_template="a photo of a {}")
    assert "\n" not in str(error.value)
    assert splits(folder).train.facts["labels"]["class_names"] == classes  # codes are valid classes


def test_numbers_among_names_and_the_digits_are_not_codes(tmp_path: Path):
    train = splits(imagenet(tmp_path / "in", ("707", "dc-3")), caption_template="a {}").train
    assert [train[i][1]["prompts"] for i in range(2)] == ["a 707", "a dc-3"]
    assert splits("digits", caption_template="the digit {}").train[3][1]["prompts"] == "the digit 3"


def test_a_file_gives_names_in_order_or_after_a_space_or_tab(tmp_path: Path):
    folder = imagenet(tmp_path / "in")
    in_order = written(tmp_path / "order.txt", list(NAMES))
    mapped = [f"{code} {name}" for code, name in zip(CODES, NAMES, strict=True)]
    files = [
        in_order,
        written(tmp_path / "blank.txt", ["n99999999 something else", *reversed(mapped), ""]),
        written(tmp_path / "tab.txt", [line.replace(" ", "\t", 1) for line in mapped]),
    ]
    for file in files:
        train = splits(folder, caption_template="a photo of a {}", class_names_file=str(file)).train
        assert [train[i][1]["prompts"] for i in range(3)] == CAPTIONS
        assert [train[i][1]["labels"] for i in range(3)] == [0, 1, 2]
        assert train.facts["labels"]["class_names"] == NAMES
    other = written(tmp_path / "other.txt", ["fish", "goldfish", "shark"])
    seen = {splits(folder, caption_template="a {}", class_names_file=str(f)).train.fingerprint for f in (*files, other)}
    assert len(seen) == 2, "the fingerprint depends on the captions"
    plain = splits(folder, class_names_file=str(in_order)).train
    assert plain.facts["labels"]["class_names"] == NAMES and plain.fingerprint == splits(folder).train.fingerprint


def test_class_names_of_shards(tmp_path: Path):
    path = tar(tmp_path / "shards.tar", *(part for i in range(3) for part in sample(str(i), label=i)))
    with pytest.raises(ValueError, match="classes are called 0"):
        splits(path, caption_template="a photo of a {}")
    file = written(tmp_path / "names.txt", list(NAMES))
    train = splits(path, caption_template="a photo of a {}", class_names_file=str(file)).train
    assert [train[i][1]["prompts"] for i in range(3)] == CAPTIONS


def test_errors_in_the_file_are_named(tmp_path: Path):
    for lines, message in (
        (["a", "b"], r"2 names, but the data has 3 classes, n01440764 the first"),
        (["n01440764 a", "n01443537 b"], "no name for 1 class, for example n01484850"),
        (["a", "", "b", "a"], "line 4: 'a', as in line 1; give the two classes"),
        (["n01440764 a", "n01440764 b"], "line 2: n01440764 has a name already, in line 1"),
        (["n01440764 a", "n01443537"], "line 2: n01443537 has no name"),
    ):
        path = written(tmp_path / "names.txt", lines)
        with pytest.raises(ValueError, match=rf"^data.class_names_file: .*{message}") as error:
            read_class_names(path, CODES)
        assert "\n" not in str(error.value)
    for content, message in ((b"a\nb\xe9", "line 2: byte 0xe9 is not UTF-8"), (b"\xff\xfe\x00", "is not UTF-16; save")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_class_names(path, CODES)
    with pytest.raises(ValueError, match="No such file"):
        read_class_names(tmp_path / "nowhere", CODES)
    with pytest.raises(ValueError, match="no classes to name"):
        read_class_names(path, ())
    with pytest.raises(ConfigError, match="has no classes"):
        ImageData.parse({"path": "scenes", "class_names_file": "x"})


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
@pytest.mark.parametrize("mark", [" ", "\t"])
def test_accents_are_the_same_in_the_file_and_on_the_disk(tmp_path: Path, on_disk: str, in_file: str, mark: str):
    classes = tuple(sorted(unicodedata.normalize(on_disk, name) for name in ("Café", "zoé", "über", "가방")))
    lines = {"Café": "coffee", "zoé": "a name", "über": "above", "가방": "bag"}
    path = written(tmp_path / "names.txt", [unicodedata.normalize(in_file, k) + mark + v for k, v in lines.items()])
    expected = tuple(lines[unicodedata.normalize("NFC", name)] for name in classes)
    assert read_class_names(path, classes) == expected


def test_two_folders_that_differ_only_in_accents_keep_their_own_lines(tmp_path: Path):
    classes = tuple(sorted(unicodedata.normalize(form, "é") for form in ("NFC", "NFD")))
    path = written(tmp_path / "names.txt", [f"{classes[1]} two", f"{classes[0]} one"])
    assert read_class_names(path, classes) == ("one", "two")


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_stored_order_holds_for_folders_with_accents_written_otherwise(tmp_path: Path, stored: str):
    other = "NFD" if stored == "NFC" else "NFC"
    names = tuple(unicodedata.normalize(stored, name) for name in ("zoé", "Café", "b"))
    found = splits(imagenet(tmp_path / "in", tuple(unicodedata.normalize(other, name) for name in names))).train
    before = {found.facts["labels"]["class_names"][int(found[i][1]["labels"])] for i in range(3)}
    config = ClassLabelConfig().with_data(class_names=found.facts["labels"]["class_names"])
    kept = config.keeping({"class_names": list(names)})
    assert kept.class_names == names
    found.adopt("labels", {"class_names": kept.class_names})
    after = [found.facts["labels"]["class_names"][int(found[i][1]["labels"])] for i in range(3)]
    assert {unicodedata.normalize(other, name) for name in after} == before and set(after) == set(names)
    assert kept.with_data(class_names=found.facts["labels"]["class_names"]).class_names == names
