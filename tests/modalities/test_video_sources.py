"""Clips of videos: which frames they have, from every kind of source."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import kind, moving, video

from unilatent.batches import try_samples
from unilatent.config import ConfigError
from unilatent.modalities._media.collection import held_out_indices
from unilatent.modalities._media.pixels import fit
from unilatent.modalities.base import BadSample
from unilatent.modalities.video import clips, files, reading
from unilatent.modalities.video.annotations import source_of
from unilatent.modalities.video.files import VideoData
from unilatent.modalities.video.windows import ClipFrame, Window, drawn, fixed

LENGTH = 6


def opened(
    path: Path | str, length: int = LENGTH, size: int = 16, channels: int = 3, stride=(1, 1), crop="centre", **fields
):  # fmt: skip
    config = VideoData.parse({"path": str(path)} | fields)
    return files.splits(config, ClipFrame(size, size, channels, 1, length, stride, crop))


def tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2, count: int = 20) -> Path:
    """Class folders of different videos."""
    for c, name in enumerate(classes):
        for i in range(each):
            video(moving(count, seed=10 * c + i), root / name / f"{i}.mp4", options={"g": "8", "crf": "10"})
    return root


def decoded(path: Path, size: int = 16) -> np.ndarray:
    """All frames of a file (T, C, H, W), each fitted as a picture is."""
    frames = [fit(image, size, size) for image in reading.open_video(path, "x").all()]
    return np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in frames])


# ---- windows ---------------------------------------------------------------------------------------------------------

FRAME = ClipFrame(16, 16, 3, 1, 6, (1, 3))


def test_fixed_windows_are_spread_from_the_first_frame_to_the_last():
    assert fixed(FRAME, 5) is None and fixed(FRAME, 6) == Window(0, 1) and fixed(FRAME, 9) == Window(1, 1)
    assert [fixed(FRAME, 20, place, 3).start for place in range(3)] == [0, 7, 14]
    for count in range(6, 80):
        of = FRAME.fitting(count)
        starts = [fixed(FRAME, count, place, of).start for place in range(of)]
        assert all(b - a >= FRAME.span() for a, b in pairwise(starts)), count
        assert starts[-1] + FRAME.span() <= count
    two = ClipFrame(16, 16, 3, 1, 6, (2, 2))
    assert two.span() == 11 and list(fixed(two, 12).numbers(6)) == [0, 2, 4, 6, 8, 10]


def test_drawn_windows_are_a_function_of_their_key_and_reach_every_start_and_stride():
    assert drawn(FRAME, 5, 0, 0) is None
    windows = [drawn(FRAME, 20, 3, position) for position in range(2000)]
    assert windows == [drawn(FRAME, 20, 3, position) for position in range(2000)]
    assert windows != [drawn(FRAME, 20, 4, position) for position in range(2000)]
    assert all(window.start + FRAME.span(window.stride) <= 20 for window in windows)
    starts = {stride: [w.start for w in windows if w.stride == stride] for stride in (1, 2, 3)}
    assert all(set(found) == set(range(20 - FRAME.span(stride) + 1)) for stride, found in starts.items())
    assert all(abs(len(found) - 2000 / 3) < 130 for found in starts.values())  # six standard deviations
    assert abs(np.mean(starts[1]) - 7) < 6 * 4.3 / np.sqrt(len(starts[1]))
    assert {drawn(FRAME, 11, 0, position).stride for position in range(50)} == {1, 2}, "strides that do not fit"


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_clips_are_frames_of_their_videos_fitted_as_pictures(tmp_path):
    train = opened(tree(tmp_path / "set"), stride=(1, 3), cache=False).train
    assert len(train) == 4 and train.facts == {"labels": {"class_names": ("cat", "dog")}}
    paths = [tmp_path / "set" / name / f"{i}.mp4" for name in ("cat", "dog") for i in (0, 1)]
    for index, path in enumerate(paths):
        frames = decoded(path)
        clip, values = train[index]
        assert clip.dtype == torch.uint8 and clip.shape == (LENGTH, 3, 16, 16) and values == {"labels": index // 2}
        assert (clip.numpy() == frames[7:13]).all()
        for position in (0, 5, 1000):
            window = drawn(train.frame, 20, index, position)
            made, _ = train.view(index, position)
            assert (made.numpy() == frames[list(window.numbers(LENGTH))]).all()


def test_several_clips_a_video_are_one_index_each(tmp_path):
    folder = tree(tmp_path / "set", each=1)
    video(moving(5), folder / "dog" / "short.mp4")
    video(moving(13), folder / "dog" / "z.mp4")
    two, everything = opened(folder, clips=2).train, opened(folder, clips="all").train
    assert len(two) == 8 and [two.locate(i) for i in (0, 1, 2)] == [(0, 0, 2), (0, 1, 2), (1, 0, 2)]
    assert len(everything) == 3 + 3 + 2 and everything.locate(6) == (3, 0, 2)
    files = [folder / name for name in ("cat/0.mp4",) * 3 + ("dog/0.mp4",) * 3 + ("dog/z.mp4",) * 2]
    for index, (path, start) in enumerate(zip(files, [0, 7, 14, 0, 7, 14, 0, 7], strict=True)):
        assert (everything[index][0].numpy() == decoded(path)[start : start + LENGTH]).all()
    assert len(everything.notes) == 1 and "1 of 4 videos are too short" in everything.notes[0]
    assert "short.mp4: has 5 frames, a clip of 6 needs 6" in everything.notes[0]
    assert sorted(everything.index_at(0, position) for position in range(8)) == list(range(8))
    prints = {data.fingerprint for data in (two, everything, opened(folder).train)}
    assert len(prints) == 3 and two.fingerprint == opened(folder, clips=2).train.fingerprint == two.fingerprint
    with pytest.raises(ValueError, match=r"data\.path: no video is long enough for a clip, the first: .*needs 40"):
        opened(folder, length=40, clips="all")


def test_short_and_damaged_videos_are_bad_samples_with_their_counts(tmp_path):
    folder = tree(tmp_path / "set", each=1)
    video(moving(4), folder / "cat" / "short.mp4")
    (folder / "dog" / "empty.webm").write_bytes(b"")
    train = opened(folder).train
    assert len(train) == 4
    with pytest.raises(BadSample, match=r"short\.mp4: has 4 frames, a clip of 6 needs 6"):
        train[1]
    with pytest.raises(BadSample, match=r"empty\.webm: cannot be decoded \(the file is empty\)"):
        train.view(3, 0)
    assert len(try_samples(train, 0, 8)) == 8  # replaced, as pictures are
    with pytest.raises(ValueError, match=r"has 20 frames, a clip of 30 needs 30"):
        try_samples(opened(folder, length=30).train, 0, 2)


def test_memory_changes_no_clip_and_workers_get_a_copy_without_it(tmp_path, monkeypatch):
    folder = tree(tmp_path / "set")
    kept, read = opened(folder, stride=(1, 2)).train, opened(folder, stride=(1, 2), cache=False).train
    for round_ in range(2):
        for index in range(4):
            assert torch.equal(kept.view(index, round_)[0], read.view(index, round_)[0])
            assert torch.equal(kept[index][0], read[index][0])
    assert len(kept.memory.videos) == 4 and not read.memory.videos
    copy = pickle.loads(pickle.dumps(kept))
    assert not copy.memory.videos and torch.equal(copy.view(1, 7)[0], kept.view(1, 7)[0])
    kept[0][0].zero_()
    assert torch.equal(kept[0][0], read[0][0]) and kept[0][0].any()
    monkeypatch.setattr(clips, "CACHE_BYTES", 2 * 20 * 3 * 16 * 16)
    some = opened(folder).train
    assert all(torch.equal(some[i][0], read[i][0]) for i in (0, 1, 2, 3)) and len(some.memory.videos) == 2


def test_random_crops_are_of_the_whole_clip_and_evaluation_takes_the_centre(tmp_path):
    video(moving(12, 32, 64), tmp_path / "a.mp4")
    train = opened(tmp_path, crop="random").train
    assert (train[0][0].numpy() == decoded(tmp_path / "a.mp4")[3:9]).all()
    covered = [np.asarray(image.resize((32, 16), Image.Resampling.BOX)) for image in
               reading.open_video(tmp_path / "a.mp4", "x").all()]  # fmt: skip
    lefts = set()
    for position in range(40):
        clip, window = train.view(0, position)[0].numpy(), drawn(train.frame, 12, 0, position)
        left = int(16 * window.across)
        want = np.stack([covered[n][:, left : left + 16].transpose(2, 0, 1) for n in window.numbers(LENGTH)])
        assert (clip == want).all()
        lefts.add(left)
    assert len(lefts) > 10


def test_the_index_of_a_large_file_is_kept_on_disk_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "LARGE", 1)
    monkeypatch.setattr(reading, "_INDICES", type(reading._INDICES)())
    demuxed = []
    original = reading.decoding.index
    monkeypatch.setattr(reading.decoding, "index", lambda *a: demuxed.append(a) or original(*a))
    path = tmp_path / "a.mp4"
    video(moving(10), path)
    first = reading.FileVideo(path, "x").index
    reading._INDICES.clear()
    assert reading.FileVideo(path, "x").index == first and len(demuxed) == 1
    video(moving(12), path)
    assert reading.FileVideo(path, "x").count == 12 and len(demuxed) == 2
    reading._INDICES.clear()
    for cached in (tmp_path / "cache" / "videos").iterdir():
        cached.write_text('{"count": 3, "times": [1], "keys": []}')  # damaged
    assert reading.FileVideo(path, "x").count == 12 and len(demuxed) == 3


# ---- sources ---------------------------------------------------------------------------------------------------------


def everything(dataset) -> list:
    return [(clip.tolist(), values) for clip, values in (dataset[i] for i in range(len(dataset)))]


def test_a_folder_its_zip_and_webdataset_shards_are_the_same_clips(tmp_path):
    folder = tree(tmp_path / "set")
    (folder / "cat" / "0.txt").write_text("a grey cat\nit moves\n")
    for name in ("cat/1", "dog/0", "dog/1"):
        (folder / f"{name}.txt").write_text(f"{name} moves")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.rglob("*.*")):
            tar.add(path, path.relative_to(folder).as_posix())
            if path.suffix == ".mp4":
                (tmp_path / "x.cls").write_text(str(int(path.parent.name == "dog")))
                tar.add(tmp_path / "x.cls", path.relative_to(folder).with_suffix(".cls").as_posix())
    a, b, c = (opened(path).train for path in (folder, tmp_path / "set.zip", tmp_path / "a.tar"))
    assert everything(a) == everything(b) == everything(c)
    assert a[0][1] == {"labels": 0, "prompts": "a grey cat"}
    prompts = {a.view(0, position)[1]["prompts"] for position in range(20)}
    assert prompts == {"a grey cat", "it moves"} == {c.view(0, p)[1]["prompts"] for p in range(20)}
    assert torch.equal(a.view(2, 9)[0], c.view(2, 9)[0])
    assert opened(tmp_path / "a.tar", clips="all").train.order.size == 12
    copy = pickle.loads(pickle.dumps(b))
    assert torch.equal(copy[1][0], b[1][0])


def test_folders_of_frames_are_videos_in_the_order_of_their_numbers(tmp_path):
    for name, seed in (("cat/one", 0), ("cat/two", 1), ("dog/three", 2)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number, frame in enumerate(moving(12, 16, 16, seed=seed)):
            Image.fromarray(frame).save(tmp_path / "set" / name / f"{number + 1}.png")  # 1.png ... 10.png
    (tmp_path / "set/cat/one.txt").write_text("one")
    (tmp_path / "set/cat/two.txt").write_text("two")
    (tmp_path / "set/dog/three.txt").write_text("three")
    train = opened(tmp_path / "set").train
    assert train.facts["labels"] == {"class_names": ("cat", "dog")} and len(train) == 3
    for index in range(3):
        want = moving(12, 16, 16, seed=index)[3:9].transpose(0, 3, 1, 2)
        assert (train[index][0].numpy() == want).all()
    assert [values for _, values in map(train.__getitem__, range(3))][2] == {"labels": 1, "prompts": "three"}
    flat = opened(tmp_path / "set" / "cat").train
    assert len(flat) == 2 and "labels" not in flat.facts
    before = train.fingerprint
    Image.fromarray(moving(1, 16, 16, seed=9)[0]).resize((20, 20)).save(tmp_path / "set/cat/one/5.png")
    changed = opened(tmp_path / "set").train
    assert changed.fingerprint != before
    with pytest.raises(BadSample, match=r"cat/one: has frames of 16 x 16 and of 20 x 20 pixels"):
        changed[0]
    alone = opened(tmp_path / "set" / "dog" / "three", cache=False).train
    assert len(alone) == 1 and (alone[0][0].numpy() == moving(12, 16, 16, seed=2)[3:9].transpose(0, 3, 1, 2)).all()


def test_arrays_are_read_by_the_order_of_their_axes(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 16, 3), dtype=np.uint8)  # bthwc
    np.savez(tmp_path / "a.npz", arr_0=array, labels=np.arange(5) % 2)
    train = opened(tmp_path / "a.npz").train
    assert len(train) == 5 and train[3][1] == {"labels": 1}
    assert (train[3][0].numpy() == array[3, 3:9].transpose(0, 3, 1, 2)).all()
    grey = array[..., 0].transpose(1, 0, 2, 3)  # Moving MNIST: time first
    np.save(tmp_path / "mnist.npy", np.ascontiguousarray(grey))
    train = opened(tmp_path / "mnist.npy", channels=1, axes="tbhw").train
    assert len(train) == 5 and (train[2][0].numpy()[:, 0] == array[2, 3:9, :, :, 0]).all()
    assert train.view(2, 4)[0].shape == (LENGTH, 1, 16, 16)
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(copy[2][0], train[2][0]) and copy.fingerprint == train.fingerprint
    assert len(opened(tmp_path / "mnist.npy", channels=1, axes="tbhw", clips="all", held_out=2).train) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"axes": "tbhw", "size": 8}, "holds videos of 16 x 16 x 1, not 8 x 8 x 1"),
        ({}, "not uint8 of the axes 'bthwc'; name the order of its axes with data.axes, such as tbhw"),
        ({"axes": "thwb", "length": 20}, "a clip of 20 needs 20"),
        ({"axes": "tbh"}, "axes: 'tbh' is no order of axes"),
    ],
)
def test_arrays_of_other_shapes_are_refused(tmp_path, fields: dict, words: str):
    np.save(tmp_path / "a.npy", np.zeros((12, 16, 16, 16), np.uint8))
    with pytest.raises(ValueError) as error:
        opened(tmp_path / "a.npy", channels=1, **fields).train[0]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_kinetics_and_something_something_are_read_by_their_tables(tmp_path):
    names = ["abcdefghijk_000010_000020", "ABCDEFGHIJ-_000001_000011", "00000000000_000100_000110"]
    for seed, name in enumerate(names):
        video(moving(8, seed=seed), tmp_path / "k" / f"{name}.mp4")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nriding elephant,abcdefghijk,10,20,train\n"
        "abseiling,00000000000,100,110,train\nabseiling,gone_______,5,15,train\n"
    )
    train = opened(tmp_path / "k", annotations=str(tmp_path / "train.csv")).train
    assert train.facts["labels"] == {"class_names": ("abseiling", "riding elephant")} and len(train) == 2
    assert [train[i][1]["labels"] for i in range(2)] == [0, 1]  # in the order of the files' names
    assert "1 of 3 videos that it lists (33.3 %) do not exist, the first is gone________000005" in train.notes[0]
    assert "1 of 3 videos are not in it" in train.notes[1]
    for number in (1, 2):
        video(moving(8, seed=number), tmp_path / "s" / f"{number}.webm", "webm", "libvpx")
    row = {"id": "2", "label": "holding a cup next to a box", "template": "Holding [something] next to [something]"}
    (tmp_path / "s.json").write_text(json.dumps([row, {**row, "id": "1", "label": "holding a pen next to a pot"}]))
    train = opened(tmp_path / "s", annotations=str(tmp_path / "s.json")).train
    assert train.facts["labels"] == {"class_names": ("Holding something next to something",)}
    assert train[0][1] == {"labels": 0, "prompts": "holding a pen next to a pot"}
    (tmp_path / "s.json").write_text(json.dumps([{**row, "id": "9"}]))
    with pytest.raises(ValueError, match=r"data\.annotations: .*not one of the 1 videos that it lists .* is 9"):
        opened(tmp_path / "s", annotations=str(tmp_path / "s.json"))


def test_videos_of_one_name_are_told_apart_by_their_paths(tmp_path):
    root = tree(tmp_path / "set", each=1)
    first, second = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.mp4"))
    for path in (first, second):
        (root / path).rename(root / path.split("/")[0] / "1.mp4")
    table = tmp_path / "t.csv"
    table.write_text("file_name,label\ncat/1.mp4,meows\ndog/1,barks\n")
    train = opened(root, annotations=str(table)).train
    assert [train.values(i)["labels"] for i in range(2)] == [1, 0] and train.facts["labels"]["class_names"] == (
        "barks",
        "meows",
    )
    table.write_text("file_name,label\n1.mp4,meows\n")
    with pytest.raises(ValueError, match=r"1\.mp4 may be cat/1\.mp4 and dog/1\.mp4; list videos by their"):
        opened(root, annotations=str(table))
    table.write_text("file_name,label\ncat/1.mp4,meows\ncat/1,barks\n")
    with pytest.raises(ValueError, match=r"lists cat/1\.mp4 twice, differently"):
        opened(root, annotations=str(table))


def test_many_sources_are_held_out_quickly_and_as_each_number_asks():
    names = [f"s{i // 2}_{i % 2}" for i in range(40_000)]
    sources = [name.partition("_")[0] for name in names]
    few, more = (held_out_indices(names, [0] * len(names), count, sources) for count in (100, 4000))
    assert len(few) == 100 and set(few) < set(more) and len(more) == 4000


def test_clips_of_one_source_are_held_out_together(tmp_path):
    assert source_of("a/v_Surf_g08_c02.avi") == source_of("a/v_Surf_g08_c11.avi") != source_of("a/v_Surf_g09_c02.avi")
    assert source_of("k/abcdefghijk_000010_000020.mp4") == "abcdefghijk" and source_of("x/1.mp4") == "x/1.mp4"
    raw = kind("avi")
    for name in ("Surf", "Dive"):
        for group in range(1, 6):
            for clip in range(1, 4):
                path = tmp_path / "ucf" / name / f"v_{name}_g{group:02d}_c{clip:02d}.avi"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
    splits = opened(tmp_path / "ucf", held_out=5)
    names = splits.train.collection.names
    train, held_out = ({names[i][:-8] for i in part.indices} for part in (splits.train, splits.held_out))
    assert not train & held_out and len(held_out) == 2 and len(splits.held_out) == 6 and len(splits.train) == 24
    assert {name.split("/")[0] for name in held_out} == {"Surf", "Dive"}


def test_whole_sources_are_as_few_as_give_enough_and_one_stays_for_training():
    sources = ["a", "a", "b", "c", "c", "c"]
    chosen = [held_out_indices(list("012345"), [0] * 6, count, sources) for count in (0, 1, 3)]
    assert chosen[0] == [] and all(len(out) >= count for out, count in zip(chosen, (0, 1, 3), strict=True))
    for out in chosen:
        assert all((sources[i] in {sources[j] for j in out}) == (i in out) for i in range(6))
    with pytest.raises(ValueError, match=r"held_out: 1, but samples of one source .* all 2 samples come from 1 source"):
        held_out_indices(["0", "1"], [0, 0], 1, ["a", "a"])


# ---- Hugging Face data sets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    """Parquet files with a column of the feature type Video and one of labels, and the same eight videos as files."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face data sets: pip install 'unilatent[data]'")
    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features({"clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["a", "b"])})
    for part in range(2):
        rows = []
        for i in range(4):
            raw = video(moving(10, seed=4 * part + i), folder / "files" / f"{4 * part + i}.mp4")
            rows.append({"clip": {"bytes": raw, "path": None}, "label": i % 2})
        (folder / "rows").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "rows" / f"train-{part}.parquet")
    return folder


def test_a_data_set_of_the_hub_is_read_as_a_table(hub_folder):
    splits = opened(f"hf:{hub_folder / 'rows'}", held_out=2)
    assert len(splits.train) == 6 and len(splits.held_out) == 2
    assert splits.train.facts == {"labels": {"class_names": ("a", "b")}}
    whole = opened(f"hf:{hub_folder / 'rows'}").train
    for index in range(8):
        assert (whole[index][0].numpy() == decoded(hub_folder / "files" / f"{index}.mp4")[2:8]).all()
        assert whole[index][1] == {"labels": index % 2}


def test_a_data_set_of_the_hub_is_read_as_a_stream(hub_folder, tmp_path):
    (tmp_path / "both").mkdir()
    for name, part in (("train", 0), ("validation", 1)):
        shutil.copy(hub_folder / "rows" / f"train-{part}.parquet", tmp_path / "both" / f"{name}-00000-of-00001.parquet")
    splits = opened(
        f"hf:{tmp_path / 'both'}", streaming=True, held_out=3, held_out_split="validation", length=4, num_samples=4
    )
    samples = splits.train.read(0, 0, 0)
    epochs = [[load() for _, load in (next(samples) for _ in range(4))] for _ in range(2)]
    again = splits.train.read(0, 0, 5)
    assert torch.equal(next(again)[1]()[0], epochs[1][1][0])
    assert all(clip.dtype == torch.uint8 and clip.shape == (4, 3, 16, 16) for clip, _ in epochs[0])
    assert len({clip.numpy().tobytes() for epoch in epochs for clip, _ in epoch}) > 4, "the same clips in each epoch"
    held_out = [splits.held_out[i][0] for i in range(3)]
    frames = {decoded(hub_folder / "files" / f"{index}.mp4")[3:7].tobytes() for index in range(4, 8)}
    assert {clip.numpy().tobytes() for clip in held_out} <= frames and held_out[0].dtype == torch.uint8


# ---- reading in order, and settings ----------------------------------------------------------------------------------


def test_reading_in_order_gives_clips_without_overlap(tmp_path):
    folder = tree(tmp_path / "set", classes=("cat",))
    video(moving(3), folder / "cat" / "short.mp4")
    frame = ClipFrame(16, 16, 3, 1, LENGTH)
    skipped: list[str] = []
    batches = list(files.read(folder, frame, 4, skipped.append))
    names = [name for _, part in batches for name in part]
    assert names == [f"cat/{i}.mp4@{start:06d}" for i in (0, 1) for start in (0, 6, 12)]
    assert len(skipped) == 1 and "short.mp4: has 3 frames" in skipped[0]
    clips_read = torch.cat([part for part, _ in batches])
    assert torch.equal((clips_read * 255).round()[1].to(torch.uint8).float() / 255, clips_read[1])
    assert (clips_read[4].numpy() * 255 == decoded(folder / "cat/1.mp4")[6:12]).all()
    one = list(files.read(folder / "cat" / "0.mp4", frame, 8))
    assert one[0][1] == ["0.mp4@000000", "0.mp4@000006", "0.mp4@000012"]
    with pytest.raises(BadSample, match="short"):
        list(files.read(folder, frame, 4))


def test_first_frames_of_a_file_or_picture(tmp_path):
    video(moving(9), tmp_path / "a.mp4")
    frame = ClipFrame(16, 16, 3, 1, LENGTH)
    assert (files.first_frames(tmp_path / "a.mp4", frame, 5, 5).numpy() == decoded(tmp_path / "a.mp4")[:5]).all()
    Image.fromarray(moving(1, 16, 16)[0]).save(tmp_path / "p.png")
    assert (
        files.first_frames(tmp_path / "p.png", frame, 1, 16).numpy()[0] == moving(1, 16, 16)[0].transpose(2, 0, 1)
    ).all()
    with pytest.raises(ValueError, match=r"--given: .*a\.mp4 has 9 frames, 12 are asked for"):
        files.first_frames(tmp_path / "a.mp4", frame, 12, 16)


def test_made_clips_are_arrays_of_the_exact_length(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, LENGTH, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=array)
    frame = ClipFrame(16, 16, 3, 1, LENGTH)
    made = files.made(tmp_path, frame)
    assert len(made) == 3 and (made[1][0].numpy() == array[1].transpose(0, 3, 1, 2)).all()
    assert files.resolution_of(tmp_path) == (LENGTH, 16, 16, 3)
    with pytest.raises(ValueError, match=r"holds clips of 6 frames, not 8"):
        files.made(tmp_path, ClipFrame(16, 16, 3, 1, 8))
    video(moving(9), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"video files are lossy"):
        files.made(tmp_path / "a.mp4", frame)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clips": 0}, "clips: 0; give how many"),
        ({"path": "x", "axes": "tbhw"}, "axes: for a .npz or .npy"),
        ({"path": "x.npz", "annotations": "t.csv"}, "annotations: for a folder or zip"),
        ({"path": "hf:a/b", "streaming": True, "clips": 2}, "a stream takes one clip"),
        ({"path": "x", "video_column": "clip"}, "video_column: for a data.path that starts with"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict, words: str):
    with pytest.raises(ConfigError) as error:
        VideoData.parse(fields)
    assert words in str(error.value)
