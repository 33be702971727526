"""Encoding of videos for tar shards (`unilatent data prepare`) and their check (`unilatent data verify`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image

from .._media.pixels import cover
from .._media.storing import FilesToStore
from . import decoding
from .files import open_source
from .reading import FileVideo, Recording, open_video

GOP = 12
"""Frames from one keyframe to the next: a clip in the middle of a long video is decoded from there."""
FORMAT = "mp4"


@dataclass(frozen=True)
class VideoEncoding:
    """How videos are stored. size: (height, width) that frames just cover, uncropped; None: unchanged. quality: 1 to
    100; H.264's quantiser is 112 - quality, at most 51, and 0 (the best) at 100."""

    size: tuple[int, int] | None
    quality: int

    @property
    def qp(self) -> int:
        return 0 if self.quality == 100 else min(51, 112 - self.quality)


class VideosToStore(FilesToStore):
    """The videos of a folder or zip, with the same classes and captions as in training."""

    def __init__(self, source: Path, encoding: VideoEncoding):
        self.encoding = encoding
        size = list(encoding.size) if encoding.size else None
        settings = {"cover": size, "format": FORMAT, "qp": encoding.qp, "gop": GOP}
        super().__init__(open_source(source, "source"), settings)

    def video(self, number: int) -> Recording:
        name = self.root + self.names[number]
        return open_video(self.files.content(name), self.files.where(name))

    def check(self, number: int) -> str:
        """Decode the whole video; ValueError if its packets and frames differ, or the decoder reports an error."""
        video = self.video(number)
        self.beside(number)
        if not isinstance(video, FileVideo):
            for _ in video.all():
                pass
            return ""
        found = decoding.check(video.content, video.where)
        if found.fault:
            raise ValueError(f"video {video.where}: damaged ({found.fault}); remove or replace it")
        return found.remark

    def encode(self, number: int) -> tuple[str, bytes]:
        """Decode the frames in order, resize them to just cover the size, and encode them; sound is dropped.

        Frames keep their number, not their time: a variable rate becomes the average one.
        """
        video = self.video(number)
        rate = decoding.rate(video.content, video.where) if isinstance(video, FileVideo) else Fraction(25)
        try:
            return FORMAT, decoding.encode(self._resized(video), rate, self.encoding.qp, GOP)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if video.where in text else f"video {video.where}: {text}") from error

    def _resized(self, video: Recording) -> Iterator[Image.Image]:
        """Yield all frames, resized if the frame is larger than the size; smaller videos are not enlarged."""
        size = self.encoding.size
        for image in video.all():
            larger = size is not None and image.height >= size[0] and image.width >= size[1]
            yield cover(image, *size) if size is not None and larger else image


def raw(source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> VideosToStore:
    """Open a folder or zip of videos with the options of `data prepare`; ValueError on another format than mp4."""
    opened = VideosToStore(source, VideoEncoding(size, quality))
    if format not in (None, FORMAT):
        raise ValueError(f"--format: {format!r} is no format that videos are stored in; use {FORMAT}")
    return opened
