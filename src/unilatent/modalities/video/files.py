"""Sources of videos: files, folders of frames, archives, arrays, tar shards and Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ...listings import ALONE, Listings
from .._media import hub, shards
from .._media.arrays import is_npz, stored_array
from .._media.collection import EncodedCollection, FileCollection, divide, with_names
from .._media.config import HUB, MediaData
from .._media.files import FileKind, FileSource, Folder, at_least_one, locate
from ..base import BadSample, CheckedRecords, Dataset, Skipped, Splits
from . import arrays, bouncing, decoding
from .annotations import annotate, source_of
from .arrays import VideoArrays, is_array
from .bouncing import BOUNCING, ORIGIN
from .clips import ClipDataset, Clips, ClipStream, HeldOutStream, ShardClips
from .reading import FRAMES, IMAGES, WEBP, FrameFolder, FrameFolders, Recording, clip, decode, open_video
from .windows import ClipFrame, Window, fixed

EXTENSIONS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm", WEBP)
KIND = FileKind("video", EXTENSIONS, (".mp4",), by_path=True, source_of=source_of)
FOLDERS = FileKind("folder of frame", (FRAMES,), (".jpg", ".png"), by_path=True, source_of=source_of)
COLUMN = hub.Column("video_column", "Video", decode)
"""The column of a Hugging Face data set, which is cast to Video(decode=False)."""


ORIGINS = {BOUNCING: ORIGIN}
"""Value of `path` -> where these samples come from."""


class VideoData(MediaData):
    """Settings of video data. `path` is one of:

    - "bouncing": generated clips of a handwritten digit that moves lawfully;
    - a folder or zip of class folders, or of videos without classes;
    - a folder or zip of folders of frames (`cat/clip/000001.jpg`), if it has no video files;
    - a .npz or .npy of uint8, never resized; `axes` names the order of its axes;
    - tar shards: a folder, a pattern such as `name-{000..099}.tar`, or the URL of either;
    - "hf:OWNER/NAME" or "hf:FOLDER": a data set for the library `datasets`; the fields from `split` to
      `shuffle_buffer` and `video_column` are for these.
    """

    hub_fields: ClassVar[tuple[str, ...]] = (*MediaData.hub_fields, COLUMN.field)
    generated: ClassVar[tuple[str, ...]] = (BOUNCING,)

    video_column: str | None = None
    """Video column of a Hugging Face data set; None: the only one."""
    clips: int | Literal["all"] = Field(default=1)
    """Clips of each video in an epoch; "all": as many as fit without overlap, so that long videos count for more."""
    annotations: str | None = None
    """A table that lists the videos to use with their classes: Kinetics' .csv, Something-Something's .json, or a .csv
    with the columns file_name and label. Videos that it does not list are not used."""
    axes: str | None = None
    """Order of the axes of a .npz or .npy: b video, t time, h row, w column, c channel; None: bthwc. Moving MNIST is
    tbhw."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=BOUNCING, num_samples=200)

    @field_validator("clips")
    @classmethod
    def _some(cls, clips: Clips) -> Clips:
        if clips != "all" and clips < 1:
            raise ValueError(f'clips: {clips}; give how many of each video, or "all"')
        return clips

    @field_validator("axes")
    @classmethod
    def _known(cls, axes: str | None) -> str | None:
        return None if axes is None else arrays.check_axes(axes)

    @model_validator(mode="after")
    def _fields_of_files(self) -> Self:
        path = self.path or ""
        if self.axes is not None and not is_array(path):
            raise ValueError(f"axes: for a .npz or .npy, not for data.path {self.path!r}; leave it out")
        if self.annotations is not None and (is_array(path) or path.startswith(HUB)):
            raise ValueError(f"annotations: for a folder or zip of videos, not for {self.path!r}; leave it out")
        if self.streaming and self.clips != 1:
            raise ValueError(f"clips: {self.clips}, but a stream takes one clip of each video; leave it out")
        return self


def splits(config: VideoData, frame: ClipFrame, listings: Listings = ALONE) -> Splits:
    """Open the training and held-out clips; ValueError names the path, the problem and the fix.

    Videos are held out whole, and those of one source (a group of UCF-101) together.
    """
    if config.path is None:
        raise ValueError(
            f"data.path: not set; give a folder or .zip of videos, or {BOUNCING!r} for the generated digits"
        )
    if config.path == BOUNCING:
        return bouncing.splits(frame, config.num_samples, config.held_out)
    if shards.is_shards(config.path, KIND, listings):
        if config.annotations is not None:
            raise ValueError(f"data.annotations: {config.path} are shards, which have their classes; leave it out")
        decoding.library()
        return shards.splits(config, KIND, decode, frame, partial(ShardClips, clips=config.clips), listings)
    make = partial(ClipDataset, clips=config.clips)
    if config.path.startswith(HUB):
        decoding.library()
        streams = (ClipStream, HeldOutStream)
        return hub.splits(config, COLUMN, config.video_column, frame, make, streams, listings)
    collection, used = _collection(config, config.path, frame, listings)
    return divide(with_names(collection, config), config.held_out, make, used)


def _collection(
    config: VideoData, path: str, frame: ClipFrame, listings: Listings
) -> tuple[EncodedCollection, list[int] | None]:
    """Open an array, or a folder or archive; with the numbers of the videos that annotations list."""
    if is_array(path):
        axes = config.axes or arrays.AXES
        return listings.share(lambda: VideoArrays(Path(path).expanduser(), frame, "data.path", axes)), None
    source = listings.share(lambda: open_source(Path(path), "data.path"))
    captions = config.captions and not config.templates
    collection = FileCollection(source, decode, frame, config.cache, captions, config.caption_column, listings)
    used = None if config.annotations is None else annotate(collection, config.annotations, captions)
    return collection, used


def open_source(path: Path, field: str) -> FileSource:
    """Open a folder or archive of video files, or of folders of frames; ValueError names `field`, or says that PyAV is
    missing."""
    source = locate(path, field, KIND)
    present = source.files()
    videos = [name for name in present if KIND.holds(name)]
    if any(not name.lower().endswith(WEBP) for name in videos):
        decoding.library()
    elif not (videos and _is_animated(source, min(videos))) and any(map(IMAGES.holds, present)):
        return FrameFolders(locate(path, field, IMAGES), FOLDERS)
    return source


def _is_animated(source: FileSource, name: str) -> bool:
    """Whether a WebP is a video and not one of the frames of one."""
    try:
        return open_video(source.content(name), source.where(name)).count > 1
    except BadSample:
        return False


# ---- reading in order ------------------------------------------------------------------------------------------------


def videos(
    path: Path, frame: ClipFrame, field: str = "input", axes: str = arrays.AXES
) -> list[tuple[str, Callable[[], Recording]]]:
    """Return the name of each video at a path, in order, and a function that opens it."""
    path = path.expanduser()
    if shards.is_shards(str(path), KIND):
        found = shards.open_shards(str(path), field, KIND)
        opened = shards.ShardCollection(found, KIND, decode, frame, False, False, ALONE)
        return [(opened.names[i], partial(_opened, opened, i)) for i in range(len(opened.names))]
    if is_array(path):
        stored = VideoArrays(path, frame, field, axes)
        return [(stored.names[i], partial(_opened, stored, i)) for i in range(len(stored.names))]
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return [(path.name, partial(_of_file, Folder(path.parent, KIND), path.name))]
    source = open_source(path, field)
    names = at_least_one(source.names(), source, field)
    return [(name.removesuffix(FRAMES), partial(_of_file, source, name)) for name in names]


def _opened(collection: EncodedCollection, index: int) -> Recording:
    return open_video(collection.content(index), collection.where(index))


def _of_file(source: FileSource, name: str) -> Recording:
    return open_video(source.content(name), source.where(name))


def read(
    path: Path, frame: ClipFrame, batch_size: int, skipped: Skipped | None = None
) -> Iterator[tuple[Tensor, list[str]]]:
    """Read all videos of a folder, zip, array, shards or a single file in clips without overlap.

    Batches (B, T, C, H, W) in [0, 1] and names, `NAME` or, of videos with several clips, `NAME@FIRST_FRAME`. Frames
    after the last whole clip are left out. ValueError immediately if there are no videos, and during iteration if one
    cannot be read or is shorter than a clip, unless `skipped` takes it.
    """
    assert batch_size >= 1, batch_size
    return _read(videos(path, frame), frame, batch_size, skipped)


def _read(
    found: list[tuple[str, Callable[[], Recording]]], frame: ClipFrame, batch_size: int, skipped: Skipped | None
) -> Iterator[tuple[Tensor, list[str]]]:
    clips: list[Tensor] = []
    names: list[str] = []
    for name, open_one in found:
        try:
            video = open_one()
            number = max(1, frame.fitting(video.count))
        except BadSample as error:
            if skipped is None:
                raise
            skipped(str(error))
            continue
        for place in range(number):
            start = place * frame.span()
            try:
                window = fixed(frame, video.count) and Window(start, frame.strides[0])
                clips.append(clip(video, frame, window))
            except BadSample as error:
                if skipped is None:
                    raise
                skipped(str(error))
                continue
            names.append(name if number == 1 else f"{name}@{start:06d}")
            if len(clips) == batch_size:
                yield torch.stack(clips).float() / 255, names
                clips, names = [], []
    if clips:
        yield torch.stack(clips).float() / 255, names


def first_frames(path: Path, frame: ClipFrame, count: int, most: int, field: str = "--given") -> Tensor:
    """Return the first `most` frames, or as many as there are, of a video file, folder of frames or picture, at the
    frame's smallest stride: (T, C, H, W) uint8.

    ValueError if there are fewer than `count`, or if the path holds more than one video.
    """
    path = path.expanduser()
    if path.is_file() and path.suffix.lower() in IMAGES.suffixes and path.suffix.lower() not in EXTENSIONS:
        video: Recording = FrameFolder(Folder(path.parent, IMAGES), (path.name,), str(path))
    else:
        found = videos(path, frame, field)
        if len(found) != 1:
            raise ValueError(f"{field}: {path} holds {len(found):,} videos; give one of them")
        video = found[0][1]()
    stride = frame.strides[0]
    there = -(-video.count // stride)
    if there < count:
        every = "" if stride == 1 else f" (every {stride} of {video.count})"
        raise ValueError(
            f"{field}: {path} has {there} frames{every}, {count} are asked for; give fewer or a longer video"
        )
    window = Window(0, stride)
    return video.pixels(window.numbers(min(most, there)), frame, window)


def notes(path: Path) -> list[str]:
    """Return what lies at a path and is not read by `read`, one line each."""
    path = path.expanduser()
    if shards.is_shards(str(path), KIND):
        return shards.notes(path, KIND)
    if is_array(path) or (path.is_file() and path.suffix.lower() in EXTENSIONS):
        return []
    return open_source(path, "input").notes()


SAMPLES = "samples.npz"
"""File that `unilatent sample` writes next to its clips: the same clips with their labels."""


def made(source: Path, frame: ClipFrame) -> Dataset:
    """Open externally generated clips, each exactly as stored: a .npz or .npy (B, T, H, W, C) uint8.

    ValueError for other files: video files are lossy, which changes all metrics.
    """
    source = source.expanduser()
    source = source / SAMPLES if (source / SAMPLES).is_file() else source
    if not is_array(source):
        raise ValueError(
            f"--samples {source}: not a .npz or .npy; video files are lossy, which changes pixels and therefore all "
            "metrics: save clips as .npz (arr_0, uint8 (B, T, H, W, C))"
        )
    collection = VideoArrays(source, frame, "--samples")
    if collection.length != frame.length:
        raise ValueError(f"--samples: {source} holds clips of {collection.length} frames, not {frame.length}")
    return ClipDataset(collection, range(len(collection.names)))


def resolution_of(source: Path) -> tuple[int, ...] | None:
    """Return (frames, height, width, channels) of the clips of an array; None if it is none."""
    source = source.expanduser()
    source = source / SAMPLES if (source / SAMPLES).is_file() else source
    size = arrays.sizes(source, "--samples") if is_array(source) else None
    return None if size is None else (size["t"], size["h"], size["w"], size["c"])


def verify_arrays(source: Path) -> CheckedRecords | None:
    """Read all videos of a .npz (five axes) or .npy (five, or four of grey videos); None for other files."""
    if not is_array(source):
        return None
    axes = arrays.AXES
    if not is_npz(source) and len(stored_array(source, "source").shape) == len(GREY):
        axes = GREY
    if (size := arrays.sizes(source, "source", axes)) is None:
        return None
    stored = VideoArrays(source, ClipFrame(size["h"], size["w"], size["c"], 1, 1), "source", axes)
    bad = []
    try:
        stored.content(0)
    except BadSample as error:  # the file is damaged as a whole
        bad.append(str(error))
    return CheckedRecords(len(stored.names), bad, (), frozenset())


GREY = "bthw"
"""Axes of grey videos; which comes first does not matter where they are only read."""
