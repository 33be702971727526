"""Frames by number: equal to decoding in order, whatever the container, and upright in the colours that are meant."""

from __future__ import annotations

import builtins
import io
import re

import numpy as np
import pytest
from PIL import Image
from video_files import KINDS, av, damaged, kind, moving, remuxed, sequential, sound, video

from unilatent.modalities.base import BadSample
from unilatent.modalities.video import decoding


def read(raw: bytes, numbers) -> np.ndarray:
    """Frames (T, H, W, 3) by number."""
    found = decoding.frames_at(raw, decoding.index(raw, "x"), numbers, "x")
    return np.stack([np.asarray(found[number]) for number in numbers])


def all_of(raw: bytes) -> np.ndarray:
    return np.stack([np.asarray(image) for image in decoding.all_frames(raw, "x")])


# ---- numbers of frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_start_equals_decoding_in_order(name: str):
    raw = kind(name)
    want = np.stack(sequential(raw))
    assert len(want) == 40 and len(np.unique(want.reshape(40, -1), axis=0)) > 30
    assert decoding.index(raw, "x").count == 40
    for start in range(40 - 4):
        assert (read(raw, range(start, start + 5)) == want[start : start + 5]).all(), start
    assert (read(raw, [39, 3, 20]) == want[[39, 3, 20]]).all()


@pytest.mark.parametrize("name", ["h264-b-frames", "hevc-open-gop", "vp9-variable-rate", "avi", "avi-b-frames"])
def test_a_late_frame_is_read_from_a_keyframe_near_it(name: str, monkeypatch: pytest.MonkeyPatch):
    """Counts the packets that are decoded."""
    raw = kind(name)
    found = decoding.index(raw, "x")
    decoded = []
    original = decoding._decoded

    def counting(stream, first, packets):
        for frame in original(stream, first, packets):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoding, "_decoded", counting)
    decoding.frames_at(raw, found, [38], "x")
    assert len(decoded) <= 24, "more than two groups of pictures were decoded for one frame"


def test_a_file_that_seeks_behind_the_keyframe_is_read_from_an_earlier_one():
    """The index here names places a group of pictures late, as an inexact container would be sought in."""
    raw = kind("avi-b-frames")
    found = decoding.index(raw, "x")
    late = decoding.FrameIndex(found.count, found.times, tuple((time, target + 12) for time, target in found.keys))
    want = sequential(raw)
    for start in range(40):
        assert (np.asarray(decoding.frames_at(raw, late, [start], "x")[start]) == want[start]).all(), start


def test_frames_of_the_same_time_keep_their_order():
    """Intra-coded packets, five of which have the time of their neighbour."""
    raw = remuxed(
        video(moving(12), form="matroska", codec="mjpeg", pixels="yuvj420p"), "matroska",
        lambda number, pts, dts: (40 * (number - number % 3 // 2), 40 * (number - number % 3 // 2)),
    )  # fmt: skip
    want = np.stack(sequential(raw))
    found = decoding.index(raw, "x")
    assert found.count == len(want) == 12 and len(set(found.times)) == 8
    for start in range(10):
        assert (read(raw, [start, start + 1, start + 2]) == want[start : start + 3]).all(), start


def test_frames_before_the_start_of_an_edit_list_do_not_count():
    raw = video(moving(30), options={"g": "10", "bf": "0"})
    cut = remuxed(raw, "mp4", lambda number, pts, dts: (pts - 5 * 512, dts - 5 * 512))
    want = np.stack(sequential(cut))
    assert len(want) == 25 == decoding.index(cut, "x").count
    assert (want == np.stack(sequential(raw))[5:]).all()
    assert (read(cut, range(25)) == want).all() and (read(cut, [7, 8]) == want[7:9]).all()
    assert decoding.check(cut, "x").fault == ""


def test_missing_counts_and_an_avi_that_starts_at_time_one():
    with av.open(io.BytesIO(kind("vp9-variable-rate"))) as container:
        assert container.streams.video[0].frames == 0
    assert decoding.index(kind("avi-b-frames"), "x").times[0] == 1
    assert decoding.index(kind("vp9-variable-rate"), "x").count == 40


# ---- pixels ----------------------------------------------------------------------------------------------------------


def corner(height: int = 32, width: int = 48) -> np.ndarray:
    """Three frames with a white corner at the top left."""
    frames = np.zeros((3, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2] = 255
    return frames


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3), (0, 0)])
def test_rotation_is_applied(rotation: int, turns: int):
    """`rotation` degrees counter-clockwise, which a telephone writes beside the frames."""
    frames = corner()
    made = read(video(frames, options={"crf": "0"}, rotation=rotation), [0, 1])
    want = np.rot90(frames[:2], turns, axes=(1, 2))
    assert made.shape == want.shape and np.abs(made.astype(int) - want).max() <= 12
    assert np.abs(made.astype(int) - want).mean() < 2


@pytest.mark.parametrize(("pixels", "color_range"), [("yuv420p", 1), ("yuvj420p", 2), ("yuv420p", 2)])
def test_greys_of_limited_and_full_range_are_the_same(pixels: str, color_range: int):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (2, 16, 256, 3))
    made = read(video(ramp, pixels=pixels, color_range=color_range, options={"crf": "0"}), [1])
    assert np.abs(made[0].astype(int) - ramp[0]).max() <= 2


@pytest.mark.parametrize("matrix", [1, 5])
def test_the_matrix_of_a_file_is_followed(matrix: int):
    """A green of BT.709 (1) and of BT.601 (5), written into the planes by the standards' own numbers."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[matrix]
    colour = np.array([40.0, 180, 90]) / 255
    luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
    y = 16 + 219 * luma
    cb = 128 + 224 * (colour[2] - luma) / (2 * (1 - blue))
    cr = 128 + 224 * (colour[0] - luma) / (2 * (1 - red))
    planes = np.concatenate([np.full(16 * 16, y), np.full(8 * 8, cb), np.full(8 * 8, cr)])
    frames = np.rint(planes).astype(np.uint8).reshape(1, 24, 16)
    made = read(_planes(frames, 16, 16, matrix), [0])
    assert np.abs(made[0].reshape(-1, 3).mean(0) - 255 * colour).max() <= 2


def _planes(frames: np.ndarray, height: int, width: int, matrix: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_transparency_shows_white():
    frames = np.zeros((2, 16, 16, 4), np.uint8)
    frames[..., :3] = (10, 200, 30)
    frames[:, :, :8, 3] = 255
    raw = video(frames, form="mov", codec="qtrle", pixels="argb", frame_format="rgba")
    made = read(raw, [0, 1])
    assert (made[:, :, :8] == (10, 200, 30)).all() and (made[:, :, 8:] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(33, 47), (32, 47), (33, 48)])
def test_odd_sizes(height: int, width: int):
    frames = moving(4, height, width)
    raw = video(frames, pixels="yuv444p", options={"crf": "0"})
    made = read(raw, [0, 3])
    assert made.shape == (2, height, width, 3) and np.abs(made.astype(int) - frames[[0, 3]]).max() <= 4


def test_high_dynamic_range_is_told_of_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "_WARNED", set())
    raw = video(moving(3), color_trc=16)
    with pytest.warns(UserWarning, match=r"video x: its colours are PQ .* not tone-mapped") as told:
        read(raw, [0, 1])
        read(raw, [2])
    assert len(told) == 1
    assert "PQ" in decoding.check(raw, "x").remark and decoding.check(raw, "x").fault == ""


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", r"cannot be decoded \(the file is empty\)"),
        (b"<html>not found</html>" * 40, r"cannot be decoded \(.+\)"),
        (lambda: kind("h264-b-frames")[:2000], r"cannot be decoded \(.*moov atom not found\)"),
        (sound, r"has no video stream \(1 audio\)"),
    ],
    ids=["empty", "page", "truncated-mp4", "sound"],
)
def test_files_that_cannot_be_opened_are_named(raw, words: str):
    raw = raw() if callable(raw) else raw
    for act in (decoding.index, decoding.check, lambda *a: list(decoding.all_frames(*a))):
        with pytest.raises(BadSample, match=rf"video a/b\.mp4: {words}") as error:
            act(raw, "a/b.mp4")
        assert "\n" not in str(error.value)


def test_a_truncated_webm_is_found_by_the_check_and_its_clips_end_where_it_does():
    raw = kind("vp9-variable-rate")
    cut = raw[: int(0.6 * len(raw))]
    checked = decoding.check(cut, "x")
    assert "ended prematurely" in checked.fault and 0 < checked.frames < 40
    assert decoding.index(cut, "x").count == checked.packets
    with pytest.raises(BadSample, match=rf"video x: frame 39 is wanted, it has {checked.packets}"):
        decoding.frames_at(cut, decoding.index(cut, "x"), [39], "x")


@pytest.mark.parametrize("name", ["h264-b-frames", "avi", "vp9-variable-rate"])
def test_damage_inside_is_found_by_the_check(name: str):
    raw = damaged(kind(name))
    checked = decoding.check(raw, "x")
    assert checked.fault and "\n" not in checked.fault
    assert decoding.check(kind(name), "x") == decoding.Checked(40, 40, "", "")


def test_a_clip_with_fewer_frames_than_packets_is_named_with_its_counts():
    raw = kind("avi")
    found = decoding.index(raw, "x")
    more = decoding.FrameIndex(44, (*found.times, 50, 51, 52, 53), found.keys)
    with pytest.raises(BadSample, match=r"video x: of frames 38 to 43, 4 cannot be decoded.* announce 44 frames"):
        decoding.frames_at(raw, more, range(38, 44), "x")


def test_messages_of_the_decoder_are_not_left_on(capfd: pytest.CaptureFixture):
    before = av.logging.get_level()
    decoding.check(damaged(kind("avi")), "x")
    assert av.logging.get_level() == before


def test_without_pyav_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def missing(name, *args, **more):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=re.escape('pip install "unilatent[video]"')) as error:
        decoding.index(b"x", "x")
    assert not isinstance(error.value, BadSample)


# ---- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_stored_frames_are_nearly_the_same_and_have_near_keyframes(height: int, width: int):
    frames = moving(30, height, width)
    images = [Image.fromarray(frame) for frame in frames]
    raw = decoding.encode(iter(images), decoding.Fraction(25), qp=17, gop=12)
    assert raw == decoding.encode(iter(images), decoding.Fraction(25), qp=17, gop=12)
    found = decoding.index(raw, "x")
    assert [found.numbers(time)[0] for time, _ in found.keys] == [0, 12, 24]
    assert np.square(all_of(raw).astype(float) - frames).mean() < 10  # PSNR above 38 dB
    lossless = decoding.encode(iter(images), decoding.Fraction(25), qp=0, gop=12)
    assert np.abs(all_of(lossless).astype(int) - frames).max() <= 3
