"""Videos in shards of our own: the same clips, near keyframes, byte for byte the same; damaged files are named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from video_files import KINDS, av, damaged, kind, moving, sound, video

from unilatent.cli import data as verbs
from unilatent.modalities.base import NothingFound
from unilatent.modalities.video import decoding, files, storing
from unilatent.modalities.video.files import VideoData
from unilatent.modalities.video.windows import ClipFrame
from unilatent.shards.writing import check_all, write


def tree(root: Path) -> Path:
    """A video of each kind in two class folders, one with a caption."""
    for number, name in enumerate(KINDS):
        suffix = {"matroska": "mkv"}.get(KINDS[name].get("form", "mp4"), KINDS[name].get("form", "mp4"))
        path = root / ("cat" if number % 2 else "dog") / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kind(name))
    return root


def stored(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                members[member.name] = tar.extractfile(member).read()
    return members


def test_stored_videos_are_the_same_clips_at_the_shorter_side(tmp_path):
    folder = tree(tmp_path / "set")
    raw = storing.raw(folder, (16, 16), None, 100)
    assert write(raw, tmp_path / "out", 3, 0, 1).total == len(KINDS)
    members = stored(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in members} == {"mp4", "cls"}
    for name, content in members.items():
        if name.endswith(".mp4"):
            found = decoding.index(content, "x")
            with av.open(io.BytesIO(content)) as container:
                stream = container.streams.video[0]
                assert min(stream.width, stream.height) == 16
            assert found.count == 40 and [found.numbers(time)[0] for time, _ in found.keys] == [0, 12, 24, 36]
    frame = ClipFrame(16, 16, 3, 1, 6)
    from_files = files.splits(VideoData.parse({"path": str(folder)}), frame).train
    from_shards = files.splits(VideoData.parse({"path": str(tmp_path / "out")}), frame).train
    assert from_shards.facts == from_files.facts == {"labels": {"class_names": ("cat", "dog")}}
    numbers = {name.rpartition(".")[0]: i for i, name in enumerate(from_files.collection.names)}
    for place in range(len(KINDS)):
        name = from_shards.collection.names[place]
        clip, values = from_shards[place]
        want, known = from_files[numbers[name]]
        assert values == known and (clip.int() - want.int()).abs().max() <= 3


def test_shards_are_the_same_bytes_for_any_number_of_workers_and_are_reused(tmp_path):
    folder = tree(tmp_path / "set")
    for out, workers in (("a", 1), ("b", 2)):
        write(storing.raw(folder, (16, 16), None, 95), tmp_path / out, 3, 0, workers)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    again = write(storing.raw(folder, (16, 16), None, 95), tmp_path / "a", 3, 0, 1)
    assert again.reused == again.shards == 3
    with pytest.raises(ValueError, match="other images or settings"):
        write(storing.raw(folder, (16, 16), None, 80), tmp_path / "a", 3, 0, 1)


def test_small_videos_keep_their_size_and_frames_of_folders_are_stored_too(tmp_path):
    for number, frame in enumerate(moving(5, 15, 21)):
        (tmp_path / "set" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "set" / "one" / f"{number}.png")
    (tmp_path / "set" / "one.txt").write_text("it moves")
    write(storing.raw(tmp_path / "set", (64, 64), None, 100), tmp_path / "out", 3, None, 1)
    members = stored(tmp_path / "out")
    assert members["one.txt"] == b"it moves"
    frames = np.stack([np.asarray(image) for image in decoding.all_frames(members["one.mp4"], "x")])
    assert frames.shape == (5, 15, 21, 3) and np.abs(frames.astype(int) - moving(5, 15, 21)).max() <= 3


def broken(root: Path) -> Path:
    """One whole video among damaged ones."""
    (root / "a").mkdir(parents=True)
    raw = kind("h264-b-frames")
    (root / "a" / "whole.mp4").write_bytes(raw)
    (root / "a" / "cut.mp4").write_bytes(raw[:2000])
    (root / "a" / "cut.webm").write_bytes(kind("vp9-variable-rate")[:2500])
    (root / "a" / "empty.avi").write_bytes(b"")
    (root / "a" / "sound.mp4").write_bytes(sound())
    (root / "a" / "bits.avi").write_bytes(damaged(kind("avi")))
    return root


REASONS = {
    "bits.avi": "damaged (", "cut.mp4": "moov atom not found", "cut.webm": "File ended prematurely",
    "empty.avi": "the file is empty", "sound.mp4": "no video stream (1 audio)",
}  # fmt: skip


def test_damaged_videos_are_named_and_the_others_pass(tmp_path):
    raw = storing.raw(broken(tmp_path / "set"), None, None, 95)
    faults = dict(zip(raw.names, check_all(raw, 1), strict=True))
    assert faults.pop("whole.mp4") == ("", "")
    assert faults.keys() == REASONS.keys()
    for name, (fault, _) in faults.items():
        assert name in fault and REASONS[name] in fault and "\n" not in fault


def test_what_cannot_be_opened_is_left_out_of_shards_and_listed(tmp_path):
    raw = storing.raw(broken(tmp_path / "set"), None, None, 95)
    write(raw, tmp_path / "out", 10, None, 1)
    stems = {name.rpartition(".")[0] for name in stored(tmp_path / "out")}
    assert {"whole"} <= stems and not stems & {"empty", "sound"}
    listed = (tmp_path / "out" / "bad_samples.jsonl").read_text()
    assert all(name in listed for name in ("cut.mp4", "empty.avi", "sound.mp4")) and "whole.mp4" not in listed
    frames = decoding.index(stored(tmp_path / "out")["cut~2.mp4" if "cut~2" in stems else "cut.mp4"], "x").count
    assert 0 < frames < 40, "the frames before a cut are kept"


def test_other_formats_and_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NothingFound, match=r"source: .* holds no videos; accepted are \.avi, \.gif"):
        storing.raw(tmp_path, None, None, 95)
    video(moving(3), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"--format: 'png' is no format that videos are stored in; use mp4"):
        storing.raw(tmp_path, None, "png", 95)


@pytest.mark.parametrize(("quality", "qp"), [(100, 0), (99, 13), (95, 17), (61, 51), (1, 51)])
def test_quality_is_a_quantiser(quality: int, qp: int):
    assert storing.VideoEncoding(None, quality).qp == qp


def test_arrays_are_verified(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 4, 8, 8, 3), np.uint8))
    np.save(tmp_path / "grey.npy", np.zeros((4, 5, 8, 8), np.uint8))
    np.savez_compressed(
        tmp_path / "b.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 40, 16, 16, 3), np.uint8)
    )
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert files.verify_arrays(tmp_path / "a.npz").total == 3 and files.verify_arrays(tmp_path / "grey.npy").total == 4
    assert files.verify_arrays(tmp_path / "images.npz") is None and files.verify_arrays(tmp_path) is None
    raw = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(raw[:60000] + bytes(200) + raw[60200:])
    assert "cannot be unpacked" in files.verify_arrays(tmp_path / "b.npz").bad[0]


# ---- the verbs -------------------------------------------------------------------------------------------------------


class Videos:
    """What `unilatent data` asks of a modality."""

    suffixes = ("avi", "gif", "m4v", "mkv", "mov", "mp4", "webm")
    raw = staticmethod(storing.raw)


class Pictures:
    """A modality that reads the text files of a folder as if they were pictures, and leaves videos unread."""

    suffixes = ("png",)

    @staticmethod
    def raw(source, size, format, quality):
        from unilatent.modalities.image.storing import Encoding, ImagesToStore

        return ImagesToStore(source, Encoding(size, "png", quality))


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"pictures": Pictures, "videos": Videos}
    monkeypatch.setattr("unilatent.registry.available", lambda kind: tuple(known))
    monkeypatch.setattr("unilatent.registry.find", lambda kind, name: known[name])


def test_the_verbs_prepare_and_verify_videos(tmp_path, two_kinds):
    run = CliRunner()
    made = run.invoke(verbs.app, ["prepare", str(broken(tmp_path / "set")), "--out", str(tmp_path / "out"), "--size",
                                  "16", "--workers", "1"])  # fmt: skip
    assert made.exit_code == 0 and "3 bad samples left out" in made.output.replace("\n", " "), made.output
    checked = run.invoke(verbs.app, ["verify", str(tmp_path / "set"), "--workers", "1"])
    assert checked.exit_code == 1 and "6 samples checked, 5 bad" in checked.output
    assert all(name in checked.output for name in REASONS)
    assert run.invoke(verbs.app, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_the_kind_that_reads_most_is_taken_or_the_named_one(tmp_path, two_kinds):
    (tmp_path / "set").mkdir()
    for i in range(3):
        video(moving(3), tmp_path / "set" / f"{i}.mp4")
    Image.fromarray(moving(1)[0]).save(tmp_path / "set" / "thumbnail.png")
    assert isinstance(verbs._raw(tmp_path / "set", None, None, 95), storing.VideosToStore)
    assert verbs._raw(tmp_path / "set", None, None, 95, "pictures").names == ["thumbnail.png"]
    with pytest.raises(ValueError, match="--modality: 'sounds' has no files of its own; use pictures or videos"):
        verbs._raw(tmp_path / "set", None, None, 95, "sounds")
    (tmp_path / "set" / "thumbnail.png").unlink()
    with pytest.raises(ValueError, match="--format: 'png' is no format that videos"):
        verbs._raw(tmp_path / "set", None, "png", 95)
    for name in ("one", "two"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(moving(3)[i]).save(tmp_path / "frames" / name / f"{i}.png")
    assert len(verbs._raw(tmp_path / "frames", None, None, 95).names) == 6, "class folders of pictures stay pictures"
    assert len(verbs._raw(tmp_path / "frames", None, None, 95, "videos").names) == 2
