"""Video files through PyAV, the only file that imports it: an index of frames, exact access to frames by number, checks
and encoding.

Frames are numbered from 0 in the order of their presentation times, never by time x rate. A file is demuxed once, which
is cheap, for the sorted times of its packets and its keyframes. To read frames, the reader seeks back to a keyframe,
decodes, and keeps those whose times are wanted. Without usable times it decodes from the start and counts. Files are
opened in the process that reads them, and closed when a function returns.
"""

from __future__ import annotations

import io
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .._media.pixels import on_white
from ..base import BadSample

Content = bytes | Path
"""A video file: its bytes, or where it lies on disk."""
HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
"""Transfer characteristics of high dynamic range (ITU-T H.273, table 3), which are not tone-mapped."""
LARGEST = 178_956_970
"""Pixels of a frame above which a file is refused, as Pillow refuses images."""
SEEKS = 4
"""Keyframes that are tried before a file is decoded from its start."""
SHOWN_LOGS = 3
"""Messages of the decoder that are quoted."""
WAY_OUT = "remove or replace the file; `unilatent data verify` lists all damaged ones"
_WARNED: set[str] = set()


@dataclass(frozen=True)
class FrameIndex:
    """What the packets of a file say about its frames.

    times: presentation times in the units of the stream, sorted, one a frame; () if a packet has none: then frames are
    counted from the start. keys: the time of each keyframe and the time to seek to, sorted. count: number of frames.
    """

    count: int
    times: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]

    def numbers(self, time: int) -> range:
        """Return the numbers of the frames at a time; more than one if times repeat, none if it is no frame's."""
        return range(bisect_left(self.times, time), bisect_right(self.times, time))

    def keys_before(self, time: int) -> list[tuple[int, int]]:
        """Return the keyframes at or before a time, the last one first; none whose time is that of several frames."""
        return [key for key in reversed(self.keys) if key[0] <= time and len(self.numbers(key[0])) == 1]


@dataclass(frozen=True)
class Checked:
    """What reading a whole file found: numbers of packets and decoded frames, its fault ("" if none), a remark."""

    packets: int
    frames: int
    fault: str
    remark: str


def library() -> Any:
    """Import PyAV; ValueError says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "data.path: video files need PyAV (the library `av`, 17 or newer), which is not installed; pip install "
            '"unilatent[video]"'
        ) from error
    return av


# ---- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(content: Content, where: str) -> Iterator[tuple[Any, Any]]:
    """Open a file: its container and video stream. BadSample names `where` if that or anything inside fails."""
    av = library()
    try:
        with av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)) as container:
            yield container, _stream(container, where)
    except BadSample:
        raise
    except (av.FFmpegError, OSError) as error:
        if isinstance(content, bytes):
            empty = not content
        else:
            empty = content.is_file() and not content.stat().st_size
        reason = "the file is empty" if empty else _said(av, content) or _reason(error)
        raise BadSample(f"video {where}: cannot be decoded ({reason}); {WAY_OUT}") from error


def _said(av: Any, content: Content) -> str:
    """Return what FFmpeg says of a file that it cannot open; "" of one that it can."""
    try:
        with _errors_logged(av), av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)):
            return ""
    except (av.FFmpegError, OSError) as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Return what FFmpeg says in one line, without the number of the error."""
    text = getattr(error, "strerror", None) or str(error)
    log = getattr(error, "log", None)
    said = f"{text}: {log[2]}" if log else text
    return " ".join(str(said).split()) or type(error).__name__


def _stream(container: Any, where: str) -> Any:
    """Return the stream of moving pictures, set to be decoded in this thread; BadSample if there is none."""
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        kinds = Counter(stream.type for stream in container.streams)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no stream"
        raise BadSample(f"video {where}: has no video stream ({found}); remove the file")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise BadSample(f"video {where}: its codec is unknown to FFmpeg; {WAY_OUT}")
    if context.width * context.height > LARGEST:
        raise BadSample(f"video {where}: {context.height} x {context.width} pixels, more than {LARGEST:,}; {WAY_OUT}")
    context.thread_type, context.thread_count = "SLICE", 1  # frame threads can deadlock when decoding stops early
    return stream


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a picture that belongs to a piece of music."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


# ---- the index -------------------------------------------------------------------------------------------------------


def index(content: Content, where: str) -> FrameIndex:
    """Demux a file without decoding it; BadSample if it has no frames."""
    with _opened(content, where) as (container, stream):
        found = _index(container, stream)
    if not found.count:
        raise BadSample(f"video {where}: has no frames; {WAY_OUT}")
    return found


def _index(container: Any, stream: Any) -> FrameIndex:
    times: list[int | None] = []
    keys: list[tuple[int, int]] = []
    for packet in container.demux(stream):
        if not _is_shown(packet, stream):
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
    known = [time for time in times if time is not None]
    complete = len(known) == len(times)
    return FrameIndex(len(times), tuple(sorted(known)) if complete else (), tuple(sorted(keys)) if complete else ())


def _is_shown(packet: Any, stream: Any) -> bool:
    """Whether a packet gives a frame: it is neither the end of the stream, nor before the start of an edit list, nor a
    hidden frame of VP8, which only serves to predict others (RFC 6386, section 9.1)."""
    if not packet.size or packet.is_discard:
        return False
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)


# ---- reading frames --------------------------------------------------------------------------------------------------


def frames_at(content: Content, found: FrameIndex, numbers: Iterable[int], where: str) -> dict[int, Image.Image]:
    """Return the frames with these numbers, upright, in RGB. BadSample if one does not exist or cannot be decoded.

    found: the index of the same file.
    """
    wanted = sorted(set(numbers))
    if wanted[-1] >= found.count:
        raise BadSample(f"video {where}: frame {wanted[-1]} is wanted, it has {found.count}; {WAY_OUT}")
    with _opened(content, where) as (container, stream):
        frames = _after_seek(container, stream, found, wanted, where) if found.times and wanted[0] else None
    if frames is None:
        with _opened(content, where) as (container, stream):
            frames = _from_start(container, stream, found, wanted, where)
    if missing := [number for number in wanted if number not in frames]:
        raise BadSample(
            f"video {where}: of frames {wanted[0]} to {wanted[-1]}, {len(missing)} cannot be decoded, although its "
            f"packets announce {found.count} frames; {WAY_OUT}"
        )
    return frames


def _after_seek(
    container: Any, stream: Any, found: FrameIndex, wanted: Sequence[int], where: str
) -> dict[int, Image.Image] | None:
    """Decode from the keyframe before the wanted frames; None if the file cannot be sought in so."""
    av = library()
    keys = found.keys_before(found.times[wanted[0]])
    for time, target in keys[:SEEKS]:  # files that seek by decoding time may land behind the keyframe
        if time == found.keys[0][0]:
            return None
        try:
            container.seek(target, stream=stream, backward=True)
        except (av.FFmpegError, OSError):
            return None
        packets = container.demux(stream)
        first = next(packets, None)
        if first is not None and first.pts is not None and first.pts <= time:
            break
    else:
        return None
    return _kept(_decoded(stream, first, packets), found, wanted, where)


def _from_start(
    container: Any, stream: Any, found: FrameIndex, wanted: Sequence[int], where: str
) -> dict[int, Image.Image]:
    packets = container.demux(stream)
    first = next(packets, None)
    decoded = () if first is None else _decoded(stream, first, packets)
    if found.times:
        return _kept(decoded, found, wanted, where) or {}
    kept: dict[int, Image.Image] = {}
    for number, frame in enumerate(decoded):
        if number in wanted:
            kept[number] = picture(frame, where)
        if number >= wanted[-1]:
            break
    return kept


def _decoded(stream: Any, first: Any, packets: Iterator[Any]) -> Iterator[Any]:
    yield from first.decode()
    for packet in packets:
        yield from packet.decode()


def _kept(
    decoded: Iterable[Any], found: FrameIndex, wanted: Collection[int], where: str
) -> dict[int, Image.Image] | None:
    """Return the wanted frames by number; None if a frame's time is unknown to the index."""
    last = max(wanted)
    seen: Counter[int] = Counter()
    kept: dict[int, Image.Image] = {}
    for frame in decoded:
        if frame.pts is None or not (numbers := found.numbers(frame.pts)):
            if frame.pts is not None and frame.pts < found.times[0]:
                continue
            return None
        number = numbers[min(seen[frame.pts], len(numbers) - 1)]
        seen[frame.pts] += 1
        if number in wanted:
            kept[number] = picture(frame, where)
        if number >= last:
            break
    return kept


def all_frames(content: Content, where: str) -> Iterator[Image.Image]:
    """Yield every frame that a file decodes to, in order, upright, in RGB; BadSample at the first that fails."""
    with _opened(content, where) as (container, stream):
        for frame in container.decode(stream):
            yield picture(frame, where)


def picture(frame: Any, where: str) -> Image.Image:
    """Convert a decoded frame to RGB as it is shown: by its colour matrix and range, on white, turned upright.

    A frame that does not name its matrix is read as BT.601.
    """
    if name := HDR.get(int(frame.color_trc or 0)):
        _warn_once(f"its colours are {name}, which is not tone-mapped: they are read as if they were not HDR", where)
    if any(component.is_alpha for component in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba"))).convert("RGB")
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = round((frame.rotation or 0) / 90) % 4  # counter-clockwise
    return image.transpose(TURNS[turns]) if turns else image


TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def _warn_once(what: str, where: str) -> None:
    if what not in _WARNED:
        _WARNED.add(what)
        warnings.warn(f"video {where}: {what}. `unilatent data verify` counts such videos", stacklevel=3)


# ---- checking --------------------------------------------------------------------------------------------------------


def check(content: Content, where: str) -> Checked:
    """Decode a whole file and compare its packets with its frames; BadSample if it cannot be opened.

    A decoder that hides damage still writes messages, so any message of an error is a fault.
    """
    av = library()
    announced, frames, failed, remark = 0, 0, "", ""
    with _errors_logged(av) as logs, _opened(content, where) as (container, stream):
        packets = container.demux(stream)
        while True:
            try:
                if (packet := next(packets, None)) is None:
                    break
                announced += _is_shown(packet, stream)
                for frame in packet.decode():
                    frames += 1
                    if name := HDR.get(int(frame.color_trc or 0)):
                        remark = f"colours in {name}, read without tone-mapping"
            except (av.FFmpegError, OSError) as error:
                failed = failed or _reason(error)
    messages = list(dict.fromkeys(" ".join(message.split()) for _, _, message in logs))
    faults = [] if frames == announced else [f"{announced} packets, {frames} frames"]
    faults += [failed] if failed else []
    faults += messages[:SHOWN_LOGS] if not failed else []
    return Checked(announced, frames, "; ".join(faults), remark)


@contextmanager
def _errors_logged(av: Any) -> Iterator[list[Any]]:
    """Collect what FFmpeg says about errors in this thread."""
    level, skipped = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as logs:
            yield logs
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skipped)


# ---- encoding --------------------------------------------------------------------------------------------------------


def rate(content: Content, where: str) -> Fraction:
    """Return the average number of frames a second; 25 if the file does not say."""
    with _opened(content, where) as (_, stream):
        found = stream.average_rate or stream.guessed_rate
    return Fraction(found) if found and 0 < found < 1000 else Fraction(25)


def encode(frames: Iterable[Image.Image], frame_rate: Fraction, qp: int, gop: int) -> bytes:
    """Encode frames of one size as H.264 in mp4: colours at full resolution and range, a keyframe every `gop` frames,
    no B-frames. ValueError if there is no frame, or no encoder of H.264.

    The quantiser is constant: x264's rate control sometimes gives other bytes for the same frames.
    """
    av = library()
    buffer = io.BytesIO()
    options = {"qp": str(qp), "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "bf": "0"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for number, image in enumerate(frames):
            if stream is None:
                try:
                    stream = container.add_stream("libx264", rate=frame_rate.limit_denominator(65535), options=options)
                except (av.FFmpegError, ValueError) as error:
                    raise ValueError(
                        f"--format: this build of PyAV cannot encode H.264 ({_reason(error)}); install the wheel of "
                        'the package index: pip install "unilatent[video]"'
                    ) from error
                stream.width, stream.height, stream.pix_fmt = image.width, image.height, "yuv444p"
                context = stream.codec_context
                context.thread_count = 1
                context.color_range, context.colorspace = FULL_RANGE, BT601
            raw = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
            frame = raw.reformat(format="yuv444p", dst_colorspace=BT601, dst_color_range=FULL_RANGE)
            frame.pts, frame.time_base = number, 1 / frame_rate.limit_denominator(65535)
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("has no frames")
        container.mux(stream.encode())
    return buffer.getvalue()


FULL_RANGE, BT601 = 2, 5
"""FFmpeg's numbers of full-range values and of the matrix of BT.601."""
