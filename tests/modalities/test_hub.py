"""Hugging Face data sets created by the tests: tables, streams, sample order, invalid input. No network."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from unilatent.batches import Plan, load_all, loader
from unilatent.config import ConfigError
from unilatent.modalities.base import BadSample, Splits
from unilatent.modalities.image import Image, ImageConfig, ImageData

datasets = pytest.importorskip("datasets")

NAMES = ["cat", "dog", "owl"]
FEATURES = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)})


def png(i: int) -> bytes:
    """A grey 8 x 8 image of level i."""
    buffer = io.BytesIO()
    PIL.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(numbers: range, bad: tuple[int, ...] = ()) -> datasets.Dataset:
    cells = [{"bytes": b"<html>" if i in bad else png(i), "path": f"{i}.png"} for i in numbers]
    return datasets.Dataset.from_dict({"img": cells, "kind": [i % 3 for i in numbers]}, features=FEATURES)


def parquet(folder: Path, files: int = 4, each: int = 10, bad: tuple[int, ...] = ()) -> Path:
    """Files of different lengths, with levels 0, 1, ...; and a test split with levels from 200."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for file in range(files):
        numbers = range(start, start + each + file)
        rows(numbers, bad).to_parquet(folder / f"train-{file:05d}-of-{files:05d}.parquet")
        start = numbers.stop
    rows(range(200, 212)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


MODALITY = Image(ImageConfig.parse({"size": 8, "patch_size": 2}))


def opened(path: Path | str, **fields: object) -> Splits:
    return MODALITY.splits(ImageData.parse({"path": f"hf:{path}"} | fields))


def levels(batch) -> list[int]:
    return (batch.data[:, 0, 0, 0] * 255).round().int().tolist()


def order(splits: Splits, positions: Plan | list[range], workers: int = 0, seed: int = 0) -> list[int]:
    """The levels of the samples in order."""
    return [i for batch, _ in loader(splits.train, MODALITY, positions, seed, workers) for i in levels(batch)]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_parquet_folder_is_a_table_with_classes(tmp_path):
    splits = opened(parquet(tmp_path / "set"), held_out=6)
    assert len(splits.train) == 40 and len(splits.held_out) == 6
    assert splits.train.facts == {"labels": {"class_names": tuple(NAMES)}}
    train, held_out = (load_all(part, MODALITY) for part in (splits.train, splits.held_out))
    assert sorted(levels(train) + levels(held_out)) == list(range(46))
    assert train.values["labels"].tolist() == [i % 3 for i in levels(train)]


def test_saved_to_disk_and_image_folders_are_tables_too(tmp_path):
    rows(range(9)).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows(range(9)), "test": rows(range(3))}).save_to_disk(tmp_path / "both")
    for i in range(9):
        (tmp_path / "tree" / NAMES[i % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / NAMES[i % 3] / f"{i}.png").write_bytes(png(i))
    for name in ("saved", "both", "tree"):
        train = opened(tmp_path / name).train
        batch = load_all(train, MODALITY)
        assert sorted(levels(batch)) == list(range(9)), name
        assert batch.values["labels"].tolist() == [i % 3 for i in levels(batch)]
        assert train.fingerprint == opened(tmp_path / name).train.fingerprint
    assert len(opened(tmp_path / "both", split="test").train) == 3


def test_held_out_samples_from_another_split(tmp_path):
    splits = opened(parquet(tmp_path / "set"), held_out_split="test", held_out=12)
    assert len(splits.train) == 46 and levels(load_all(splits.held_out, MODALITY)) == list(range(200, 212))
    assert len(opened(tmp_path / "set", held_out_split="test", held_out=0.25).held_out) == 3
    with pytest.raises(ValueError, match=r"data\.held_out: 0, but data\.held_out_split"):
        opened(tmp_path / "set", held_out_split="test")


def test_a_bad_row_is_named_and_replaced(tmp_path):
    splits = opened(parquet(tmp_path / "set", bad=(7,)))
    with pytest.raises(BadSample, match=r"image row 7 of train in hf:.*7\.png.*unknown image format"):
        splits.train[7]
    for workers in (0, 2):
        batches = list(loader(splits.train, MODALITY, [range(23), range(23, 46)], 0, workers))
        assert [bad.index for _, bad_samples in batches for bad in bad_samples] == [7]
        assert 7 not in [i for batch, _ in batches for i in levels(batch)]


def test_the_fingerprint_is_of_contents(tmp_path):
    first = opened(parquet(tmp_path / "a")).train.fingerprint
    assert opened(parquet(tmp_path / "b")).train.fingerprint == first
    assert opened(parquet(tmp_path / "c", bad=(3,))).train.fingerprint != first
    assert opened(parquet(tmp_path / "d", each=11)).train.fingerprint != first


# ---- streams -------------------------------------------------------------------------------------------------------

STREAM = {"streaming": True, "shuffle_buffer": 16}


def test_an_epoch_of_a_stream_is_every_sample_in_another_order(tmp_path):
    """With one lane an epoch is exactly the data; another epoch or seed has another order."""
    splits = opened(parquet(tmp_path / "set"), lanes=1, **STREAM)
    assert len(splits.train) == 46
    one, two = order(splits, [range(46)]), order(splits, [range(46, 92)])
    assert sorted(one) == sorted(two) == list(range(46))
    assert one != two and one != list(range(46)) and order(splits, [range(46)], seed=1) != one
    batch, _ = next(loader(splits.train, MODALITY, [range(46)], 0))
    assert batch.values["labels"].tolist() == [i % 3 for i in levels(batch)]


def test_lanes_together_visit_every_sample(tmp_path):
    splits = opened(parquet(tmp_path / "set"), **STREAM)
    assert splits.train.lanes == 4
    seen = [index for lane in range(4) for index in _epoch(splits, lane)]
    assert len(seen) == len(set(seen)) == 46


def _epoch(splits: Splits, lane: int) -> list[int]:
    indices: list[int] = []
    for index, _ in splits.train.read(0, lane, 0):
        if index in indices or len(indices) == _lane_length(splits, lane):
            return indices
        indices.append(index)
    raise AssertionError


def _lane_length(splits: Splits, lane: int) -> int:
    from unilatent.maths.streams import generator

    chunks = torch.randperm(4, generator=generator("pieces", 0, 0)).tolist()[lane::4]
    return sum(10 + chunk for chunk in chunks)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_of_a_stream_does_not_depend_on_workers(tmp_path, workers):
    splits = opened(parquet(tmp_path / "set"), **STREAM)
    plan = Plan(range(0, 9), 12, 5)
    assert order(splits, plan, workers) == order(splits, plan)


def test_the_order_of_a_stream_does_not_depend_on_processes(tmp_path):
    splits = opened(parquet(tmp_path / "set"), **STREAM)
    one = order(splits, Plan(range(0, 9), 12))
    for world in (2, 3):  # 3 does not divide the four lanes: a process skips the samples of others
        parts = [iter(order(splits, Plan(range(0, 9), 12, None, rank, world))) for rank in range(world)]
        assert [next(parts[position % 12 % world]) for position in range(108)] == one


@pytest.mark.parametrize("step", [1, 3, 5, 17])
def test_a_stream_resumes_anywhere(tmp_path, step):
    """A new stream continues within a block, within an epoch and epochs later, as if read from the start."""
    folder = parquet(tmp_path / "set")
    unbroken = order(opened(folder, **STREAM), Plan(range(0, 20), 12))
    assert order(opened(folder, **STREAM), Plan(range(step, 20), 12), workers=step % 3) == unbroken[12 * step :]


def test_skipping_decodes_nothing_and_reads_no_finished_epoch_again(tmp_path, monkeypatch):
    splits = opened(parquet(tmp_path / "set"), **STREAM)
    read: list[int] = []
    tables = type(splits.train)._tables
    monkeypatch.setattr(
        type(splits.train),
        "_tables",
        lambda self, chunk, start, n=16: read.append(chunk) or tables(self, chunk, start, n),
    )
    monkeypatch.setattr("unilatent.modalities._media.hub._HubSplit.decode", lambda *_: pytest.fail("decoded"))
    next(splits.train.read(0, 0, 10_000))
    assert len(read) == 1


def test_a_bad_row_of_a_stream_is_replaced_by_the_next_of_its_lane(tmp_path):
    folder = parquet(tmp_path / "set", bad=(7, 8, 30))
    splits, valid = opened(folder, **STREAM), opened(parquet(tmp_path / "valid"), **STREAM)
    plan = Plan(range(0, 6), 8)
    expected = order(valid, plan)
    for workers in (0, 2):
        batches = list(loader(splits.train, MODALITY, plan, 0, workers))
        got = [i for batch, _ in batches for i in levels(batch)]
        changed = [p for p in range(48) if got[p] != expected[p]]
        assert {expected[p] for p in changed} <= {7, 8, 30} and changed
        first = changed[0]
        lane = expected[first::4]
        assert got[first] == next(i for i in lane if i not in (7, 8, 30))
        assert {bad.index for _, bad_samples in batches for bad in bad_samples} == {
            _number(i) for i in (7, 8, 30) if i in expected
        }


def _number(level: int) -> int:
    """The index of a row; files have 10, 11, 12 and 13 rows."""
    for file in range(4):
        if level < 10 + file:
            return file << 32 | level
        level -= 10 + file
    raise AssertionError


def test_other_streams_agree_with_their_tables(tmp_path):
    """Arrow files saved to disk, and folders of images: each sample occurs once in an epoch of one lane."""
    rows(range(9)).save_to_disk(tmp_path / "saved", num_shards=3)
    for i in range(9):
        (tmp_path / "tree" / NAMES[i % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / NAMES[i % 3] / f"{i}.png").write_bytes(png(i))
    for name in ("saved", "tree"):
        splits = opened(tmp_path / name, lanes=1, num_samples=9, **STREAM)
        assert sorted(order(splits, [range(9)])) == sorted(order(splits, [range(9, 18)], 1)) == list(range(9)), name


def test_held_out_images_of_a_stream(tmp_path):
    folder = parquet(tmp_path / "set")
    splits = opened(folder, held_out_split="test", held_out=5, **STREAM)
    held_out = levels(load_all(splits.held_out, MODALITY))
    assert len(held_out) == len(set(held_out)) == 5 and min(held_out) >= 200
    assert (
        splits.held_out.fingerprint == opened(folder, held_out_split="test", held_out=5, **STREAM).held_out.fingerprint
    )
    with pytest.raises(ValueError, match=r"data\.held_out: 5, but a stream cannot leave .*data\.held_out_split"):
        opened(folder, held_out=5, **STREAM)
    with pytest.raises(ValueError, match=r"data\.held_out: 13, but .* only 12 usable"):
        opened(folder, held_out_split="test", held_out=13, **STREAM)


def test_a_stream_of_unknown_length_needs_it_only_for_epochs(tmp_path):
    for i in range(9):
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / "tree" / f"{i}.png").write_bytes(png(i))
    train = opened(tmp_path / "tree", **STREAM).train
    with pytest.raises(ValueError, match=r"data\.num_samples: not set"):
        len(train)
    assert len(opened(tmp_path / "tree", num_samples=9, **STREAM).train) == 9
    assert len(load_all(train, MODALITY, limit=5).data) == 5


# ---- invalid input -------------------------------------------------------------------------------------------------


def refused(path: Path | str, words: str, **fields: object) -> None:
    with pytest.raises(ValueError, match=words) as error:
        opened(path, **fields)
    assert "\n" not in str(error.value) and ";" in str(error.value), error.value


def test_errors_name_the_field_the_value_and_the_fix(tmp_path):
    folder = parquet(tmp_path / "set")
    refused(tmp_path / "nowhere", r"data\.path: .*nowhere is not a folder")
    refused("nobody/nothing", r"data\.path: hf:nobody/nothing cannot be opened .*network")
    refused(folder, r"data\.split: 'val' is not in hf:.*; it has .*train", split="val")
    refused(
        folder, r"data\.image_column: 'image' is not a column of type Image; .* img \(Image\)", image_column="image"
    )
    refused(folder, r"data\.label_column: 'img' is not a column of type ClassLabel", label_column="img")
    refused(folder, r"data\.lanes: 5, but .* has only 4 files; set fewer", lanes=5, **STREAM)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    refused(tmp_path / "text", r"is in the format csv; use parquet")


def test_one_of_two_image_columns_must_be_named(tmp_path):
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    cells = [{"bytes": png(i), "path": None} for i in range(4)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"a": cells, "b": cells[::-1]}, features=features).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    refused(tmp_path / "set", r"data\.image_column: not set, and there are a, b; name one")
    splits = opened(tmp_path / "set", image_column="b")
    assert levels(load_all(splits.train, MODALITY)) == [3, 2, 1, 0] and splits.train.facts == {}


def test_fields_of_the_hub_are_refused_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"streaming: for a data\.path that starts with 'hf:'"):
        ImageData.parse({"path": str(tmp_path), "streaming": True})
    plain = ImageData.parse({"path": str(tmp_path)})
    assert ImageData.parse(plain.plain()) == plain


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(folder, re.escape('pip install "unilatent[data]"'))
