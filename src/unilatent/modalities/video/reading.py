"""Videos of any source behind one interface: a number of frames, and frames by number."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...files import write_text
from ...shards.places import cache_folder
from .._media.files import FileKind, FileSource, natural_order
from .._media.pixels import EXTENSIONS, cover, on_white, open_image, to_tensor
from ..base import BadSample
from . import decoding
from .decoding import FrameIndex
from .windows import ClipFrame, Window, drawn, fixed

VERSION = 1
"""Of cached indices; raise it when `decoding.index` numbers frames otherwise."""
LARGE = 4 * 2**20
"""Files of so many bytes have their index cached on disk; smaller ones are demuxed as fast as it is read."""
REMEMBERED = 4096
"""Indices that a process keeps in memory."""


class Recording(ABC):
    """A video. where: its place, for messages."""

    where: str

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of frames; BadSample if the video cannot be opened."""

    @abstractmethod
    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Return frames by number, upright, in RGB; BadSample if one cannot be read."""

    @abstractmethod
    def all(self) -> Iterator[Image.Image]:
        """Yield all frames that can be read, in order; BadSample at the first that fails."""

    def pixels(self, numbers: Sequence[int], frame: ClipFrame, window: Window) -> Tensor:
        """Return frames (T, C, H, W) uint8, resized to just cover the frame's size and cropped."""
        decoded = dict(zip(sorted(set(numbers)), self.frames(sorted(set(numbers))), strict=True))
        sample = next(iter(decoded.values()))
        if min(sample.size) < frame.patch:
            size = f"{sample.height} x {sample.width}"
            raise BadSample(
                f"video {self.where}: {size} (height x width) is smaller than a patch ({frame.patch}); remove it"
            )
        shown = dict(zip(decoded, fitted(decoded.values(), frame, window), strict=True))
        return torch.stack([shown[number] for number in numbers])

    def whole(self, frame: ClipFrame, window: Window) -> Tensor:
        """Return all frames (T, C, H, W) uint8, resized and cropped one by one. BadSample if there are fewer than were
        counted."""
        frames = torch.stack(list(fitted(self.all(), frame, window)) or [torch.empty(0)])
        if len(frames) != self.count:
            raise BadSample(f"video {self.where}: {len(frames)} of its {self.count} frames can be decoded; remove it")
        return frames


def fitted(images: Iterable[Image.Image], frame: ClipFrame, window: Window) -> Iterator[Tensor]:
    """Yield frames (C, H, W) uint8, resized and cropped, of which one at a time is in memory at full size."""
    for image in images:
        yield to_tensor(_fit(image, frame, window))


def _fit(image: Image.Image, frame: ClipFrame, window: Window) -> Image.Image:
    """Resize and crop one frame, at its centre exactly as pictures are (`pixels.fit`)."""
    image = cover(image.convert("RGB" if frame.channels == 3 else "L"), frame.height, frame.width)
    left = int((image.width - frame.width) * window.across)
    top = int((image.height - frame.height) * window.down)
    return image.crop((left, top, left + frame.width, top + frame.height))


def open_video(content: Any, where: str) -> Recording:
    """Return the video in what a source has (`EncodedCollection.content`): bytes or the path of a file, the frames of a
    folder, or an array."""
    if isinstance(content, Recording):
        return content
    return AnimatedImage(content, where) if is_webp(content) else FileVideo(content, where)


# ---- files -----------------------------------------------------------------------------------------------------------

_INDICES: OrderedDict[str, FrameIndex] = OrderedDict()


class FileVideo(Recording):
    """A video file: its bytes, or its path on disk."""

    def __init__(self, content: decoding.Content, where: str):
        self.content, self.where = content, where

    @cached_property
    def index(self) -> FrameIndex:
        """The index of its frames, from memory or disk if it was made before; BadSample if it cannot be demuxed."""
        if isinstance(self.content, bytes):
            return decoding.index(self.content, self.where)
        try:
            stat = self.content.stat()
        except OSError as error:
            raise BadSample(f"video {self.where}: {error.strerror}; make it readable or remove it") from error
        key = repr((VERSION, str(self.content.resolve()), stat.st_size, stat.st_mtime_ns))
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        if name not in _INDICES:
            _INDICES[name] = self._cached(name) if stat.st_size >= LARGE else decoding.index(self.content, self.where)
            while len(_INDICES) > REMEMBERED:
                _INDICES.popitem(last=False)
        return _INDICES[name]

    def _cached(self, name: str) -> FrameIndex:
        path = cache_folder().parent / "videos" / f"{name}.json"
        with suppress(OSError, ValueError, TypeError, KeyError):
            return _parsed(json.loads(path.read_text(encoding="utf-8")))
        found = decoding.index(self.content, self.where)
        with suppress(OSError):  # without a cache the next process demuxes again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(found)))
        return found

    @property
    def count(self) -> int:
        return self.index.count

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        found = decoding.frames_at(self.content, self.index, numbers, self.where)
        return [found[number] for number in numbers]

    def all(self) -> Iterator[Image.Image]:
        return decoding.all_frames(self.content, self.where)


def _parsed(stored: dict[str, Any]) -> FrameIndex:
    keys = tuple((int(time), int(target)) for time, target in stored["keys"])
    found = FrameIndex(int(stored["count"]), tuple(map(int, stored["times"])), keys)
    if found.count < 1 or len(found.times) not in (0, found.count):
        raise ValueError("not an index")
    return found


# ---- animated WebP, which FFmpeg does not decode ---------------------------------------------------------------------

WEBP = ".webp"


def is_webp(content: decoding.Content) -> bool:
    """Whether a file, its bytes or its path, is a WebP."""
    if isinstance(content, bytes):
        return content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return content.suffix.lower() == WEBP


class AnimatedImage(Recording):
    """An animated WebP, as `unilatent sample` writes them; a still one has one frame."""

    def __init__(self, content: decoding.Content, where: str):
        self.content, self.where = content, where

    @property
    def count(self) -> int:
        with self._opened() as image:
            return int(getattr(image, "n_frames", 1))

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        with self._opened() as image:
            return [self._frame(image, number) for number in numbers]

    def all(self) -> Iterator[Image.Image]:
        with self._opened() as image:
            for number in range(getattr(image, "n_frames", 1)):
                yield self._frame(image, number)

    def _frame(self, image: Image.Image, number: int) -> Image.Image:
        try:
            image.seek(number)
            return on_white(image).convert("RGB")  # a copy, which the next seek leaves alone
        except (OSError, EOFError, ValueError, SyntaxError) as error:
            raise BadSample(f"video {self.where}: frame {number} cannot be decoded ({error}); remove it") from error

    def _opened(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadSample(f"video {self.where}: no image that can be opened ({error}); remove it") from error


# ---- folders of frames -----------------------------------------------------------------------------------------------

FRAMES = ".frames"
"""Suffix that stands for a folder of frames in the names of samples; no file has it."""


@dataclass(frozen=True)
class FrameFolder(Recording):
    """The images of one folder, in the order of the numbers in their names."""

    files: FileSource
    names: tuple[str, ...]
    where: str

    @property
    def count(self) -> int:
        return len(self.names)

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        return list(self._of_one_size(self.names[number] for number in numbers))

    def all(self) -> Iterator[Image.Image]:
        return self._of_one_size(self.names)

    def _of_one_size(self, names: Iterable[str]) -> Iterator[Image.Image]:
        size: tuple[int, int] | None = None
        for name in names:
            image = self._image(name)
            if size is not None and image.size != size:
                (w, h), (v, g) = sorted((image.size, size))
                raise BadSample(f"video {self.where}: has frames of {h} x {w} and of {g} x {v} pixels; remove it")
            size = image.size
            yield image

    def _image(self, name: str) -> Image.Image:
        return open_image(self.files.read(name), 3, self.files.where(name))


class FrameFolders(FileSource):
    """The folders of frames in a folder or archive, each as one sample `PATH.frames`."""

    def __init__(self, files: FileSource, kind: FileKind):
        self.inner, self.path, self.kind = files, files.path, kind
        self.folders: dict[str, list[str]] = {}
        for name in sorted(files.names(), key=natural_order):
            folder = name.rpartition("/")[0] or files.path.stem or "video"  # frames without a folder are one video
            self.folders.setdefault(folder + FRAMES, []).append(name)

    def files(self) -> list[str]:
        return [*self.folders, *(name for name in self.inner.files() if not self.inner.kind.holds(name))]

    def read(self, name: str) -> bytes:
        return self.inner.read(name)

    def content(self, name: str) -> Any:
        frames = self.folders.get(name)
        if frames is None:
            raise BadSample(f"video {self.where(name)}: no such folder of frames; remove it from the table")
        return FrameFolder(self.inner, tuple(frames), self.where(name))

    def stamp(self, name: str) -> str:
        frames = self.folders.get(name)
        if frames is None:
            return self.inner.stamp(name) if not name.endswith(FRAMES) else "missing"
        stamps = "\0".join(f"{frame}\0{self.inner.stamp(frame)}" for frame in frames)
        return hashlib.sha256(stamps.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def where(self, name: str) -> str:
        frames = self.folders.get(name)
        return self.inner.where(name if frames is None else frames[0].rpartition("/")[0]).strip()

    def witnesses(self, names: Sequence[str]) -> list[str]:
        return self.inner.witnesses([frame for name in names for frame in self.folders.get(name, [name])])

    def directory(self) -> dict[str, list[Any]] | None:
        return self.inner.directory()

    def use(self, directory: dict[str, list[Any]] | None) -> None:
        self.inner.use(directory)


IMAGES = FileKind("frame", EXTENSIONS, (".jpg", ".png"))


# ---- arrays ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayVideo(Recording):
    """Frames (T, H, W, C) uint8 in memory or in a mapped file, used as they are stored."""

    array: np.ndarray
    where: str

    @property
    def count(self) -> int:
        return len(self.array)

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        return [Image.fromarray(np.squeeze(self.array[number], -1) if self.array.shape[-1] == 1 else self.array[number])
                for number in numbers]  # fmt: skip

    def all(self) -> Iterator[Image.Image]:
        for number in range(self.count):
            yield self.frames([number])[0]

    def pixels(self, numbers: Sequence[int], frame: ClipFrame, window: Window) -> Tensor:
        return torch.from_numpy(np.stack([self.array[number].transpose(2, 0, 1) for number in numbers]))


# ---- clips -----------------------------------------------------------------------------------------------------------


def fixed_clip(content: Any, frame: ClipFrame, where: str, place: int = 0, of: int = 1) -> Tensor:
    """Return clip `place` of `of` fixed ones of a video, (T, C, H, W) uint8; BadSample if it cannot be read."""
    video = open_video(content, where)
    return clip(video, frame, fixed(frame, video.count, place, of))


def drawn_clip(content: Any, frame: ClipFrame, where: str, *key: int | str) -> Tensor:
    """Return a random clip of a video, a pure function of the key, (T, C, H, W) uint8; BadSample if it cannot be
    read."""
    video = open_video(content, where)
    return clip(video, frame, drawn(frame, video.count, *key))


def clip(video: Recording, frame: ClipFrame, window: Window | None) -> Tensor:
    """Return a clip of a video, (T, C, H, W) uint8. BadSample if the video is shorter (window None) or damaged."""
    if window is None:
        raise BadSample(too_short(video.where, video.count, frame))
    return video.pixels(window.numbers(frame.length), frame, window)


def too_short(where: str, count: int, frame: ClipFrame) -> str:
    """Return the message about a video that is shorter than a clip."""
    stride = f" at stride {frame.strides[0]}" if frame.strides[0] > 1 else ""
    return (
        f"video {where}: has {count} frames, a clip of {frame.length}{stride} needs {frame.span()}; remove it, or "
        "train on shorter clips: modality.frames, modality.stride"
    )


def decode(content: Any, frame: Any, where: str) -> Tensor:
    """Return the middle clip of a video, (T, C, H, W) uint8: the `FileDecoder` of videos."""
    return fixed_clip(content, frame, where)
