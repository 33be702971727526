"""Makes video files with PyAV. Tests that import this module are skipped where PyAV is missing."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason='these tests make video files with PyAV: pip install "unilatent[video]"')


def moving(count: int = 40, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) that all differ: smooth colours that move, so that they compress well."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + t / 3 + seed), np.cos(y / 7 - t / 4), np.sin((x + y) / 11 + t / 2)]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def video(
    frames: np.ndarray, path: Path | None = None, form: str = "mp4", codec: str = "libx264", pixels: str = "yuv420p",
    options: dict[str, str] | None = None, times: list[int] | None = None, rotation: int | None = None,
    frame_format: str = "rgb24", **settings: Any,
) -> bytes:  # fmt: skip
    """Encode frames; with B-frames, a second call may give other bytes. times: milliseconds; None: 25 frames a second.
    settings: of the codec's context."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=frame_format)
            if "color_range" in settings:
                frame = frame.reformat(format=pixels, dst_color_range=settings["color_range"])
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def remuxed(raw: bytes, form: str, times: Any) -> bytes:
    """Copy the packets of a file with other times. times: (number of the packet, its pts, its dts) -> (pts, dts)."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(raw)) as source, av.open(buffer, "w", format=form) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.pts, packet.dts = times(number, packet.pts, packet.dts)
                packet.stream = stream
                target.mux(packet)
    return buffer.getvalue()


def sound() -> bytes:
    """An mp4 with sound and no pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def damaged(raw: bytes, count: int = 200) -> bytes:
    """A file with other bytes in its middle. Fewer may pass unseen: codecs have no check sums."""
    start = len(raw) // 2
    return raw[:start] + bytes((7 * byte + 91) % 256 for byte in raw[start : start + count]) + raw[start + count :]


def sequential(raw: bytes) -> list[np.ndarray]:
    """Decode a whole file in order, without this library."""
    with av.open(io.BytesIO(raw)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


TIMES = np.cumsum(np.random.default_rng(0).integers(4, 90, 40)).tolist()
"""Milliseconds of frames at a variable rate."""
KINDS: dict[str, dict[str, Any]] = {
    "h264-b-frames": {"options": {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}},
    "hevc-open-gop": {"form": "matroska", "codec": "libx265",
                      "options": {"x265-params": "log-level=none:pools=none:keyint=12:min-keyint=12:open-gop=1"}},
    "vp9-variable-rate": {"form": "webm", "codec": "libvpx-vp9", "times": TIMES,
                          "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "vp8": {"form": "webm", "codec": "libvpx",
            "options": {"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}},
    "avi": {"form": "avi", "codec": "mpeg4", "options": {"g": "12"}},
    "avi-b-frames": {"form": "avi", "codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "gif": {"form": "gif", "codec": "gif", "pixels": "rgb8"},
}  # fmt: skip


def kind(name: str) -> bytes:
    """A file of 40 frames of a kind. x265 writes past its memory at frames below 64 pixels."""
    size = (64, 64) if KINDS[name].get("codec") == "libx265" else (32, 48)
    return video(moving(40, *size), **KINDS[name])
