"""Sources of images: folders and archives, arrays, tar shards, Hugging Face data sets, and built-in data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator
from torch import Tensor

from ...listings import ALONE, Listings
from .._media import hub, shards
from .._media.arrays import is_npz
from .._media.collection import Collection, FileCollection, divide, files_in_batches, in_batches, with_names
from .._media.config import HUB, MediaData
from .._media.files import FileKind, Folder, at_least_one, locate
from .._media.pixels import EXTENSIONS, Frame, decode
from ..base import BadSample, CheckedRecords, Skipped, Splits
from . import digits, scenes
from .arrays import ImageArrays, resolution_of
from .digits import DIGITS, Digits
from .scenes import SCENES

ORIGINS = {DIGITS: digits.ORIGIN, SCENES: scenes.ORIGIN}
"""Value of `path` -> where these samples come from."""
KIND = FileKind("image", EXTENSIONS, (".jpg", ".png"))
COLUMN = hub.Column("image_column", "Image", decode)


class ImageData(MediaData):
    """Settings of image data. `path` is one of:

    - a folder or zip of class folders, or of images without classes;
    - "digits": the built-in 8 x 8 digits; "scenes": drawn shapes with captions;
    - a .npz of ADM's layout (`arr_0`, uint8 (N, H, W, C)) whose images have the model's size;
    - tar shards: a folder, a pattern such as `name-{000..099}.tar`, or the URL of either;
    - "hf:OWNER/NAME" or "hf:FOLDER": a data set for the library `datasets`; the fields from `split` to
      `shuffle_buffer` and `image_column` are for these.
    """

    hub_fields: ClassVar[tuple[str, ...]] = (*MediaData.hub_fields, COLUMN.field)
    generated: ClassVar[tuple[str, ...]] = (SCENES,)

    image_column: str | None = None
    """Image column of a Hugging Face data set; None: the only one."""

    @classmethod
    def small(cls) -> Self:
        return cls(path=DIGITS)

    @model_validator(mode="after")
    def _scenes_have_no_classes(self) -> Self:
        if self.class_names_file is not None and self.path == SCENES:
            raise ValueError(f"class_names_file: {SCENES!r} has no classes; leave it out")
        return self


def splits(config: ImageData, frame: Frame, listings: Listings = ALONE) -> Splits:
    """Open the training and held-out images; ValueError names the path, the problem and the fix."""
    if config.path is None:
        raise ValueError(f"data.path: not set; give a folder or .zip of images, or {DIGITS!r} for the built-in digits")
    if shards.is_shards(config.path, KIND, listings):
        return shards.splits(config, KIND, decode, frame, listings=listings)
    if config.path.startswith(HUB):
        return hub.splits(config, COLUMN, config.image_column, frame, listings=listings)
    if config.path == SCENES:
        return scenes.splits(frame, config.num_samples, config.held_out)
    return divide(with_names(_collection(config, config.path, frame, listings), config), config.held_out)


def _collection(config: ImageData, path: str, frame: Frame, listings: Listings) -> Collection:
    """Open the digits, a .npz, or a folder or archive."""
    if path == DIGITS:
        return Digits(frame)
    if is_npz(path):
        return listings.share(lambda: ImageArrays(Path(path).expanduser(), frame, "data.path"))
    source = listings.share(lambda: locate(Path(path), "data.path", KIND))
    captions = config.captions and not config.templates
    return FileCollection(source, decode, frame, config.cache, captions, config.caption_column, listings)


def read(
    path: Path, frame: Frame, batch_size: int, skipped: Skipped | None = None
) -> Iterator[tuple[Tensor, list[str]]]:
    """Read all images of a folder, zip, .npz, shards or a single file: batches (B, C, H, W) in [0, 1] and their names.

    Files are sorted by name; shards are read in their order. ValueError immediately if there are no images, and during
    iteration if one cannot be read, unless `skipped` takes it.
    """
    assert batch_size >= 1, batch_size
    path = path.expanduser()
    if shards.is_shards(str(path), KIND):
        return shards.read(path, KIND, decode, frame, batch_size, skipped)
    if is_npz(path):
        images = ImageArrays(path, frame, "input")
        return in_batches(images.names, images.load, batch_size, skipped)
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return files_in_batches(Folder(path.parent, KIND), [path.name], decode, frame, batch_size, skipped)
    source = locate(path, "input", KIND)
    names = at_least_one(source.names(), source, "input")
    return files_in_batches(source, names, decode, frame, batch_size, skipped)


def verify_arrays(path: Path) -> CheckedRecords | None:
    """Read all images of a .npz; None for other files, and for a .npz without images."""
    if not is_npz(path) or (size := resolution_of(path, "source")) is None:
        return None
    images = ImageArrays(path, Frame(*size, 1), "source")
    bad = []
    try:
        images.load(0)
    except BadSample as error:
        bad.append(str(error))
    return CheckedRecords(len(images.names), bad, (), frozenset())


def notes(path: Path) -> list[str]:
    """Return what lies at a path and is not read by `read`, one line each."""
    path = path.expanduser()
    if shards.is_shards(str(path), KIND):
        return shards.notes(path, KIND)
    if is_npz(path) or (path.is_file() and path.suffix.lower() in EXTENSIONS):
        return []
    return locate(path, "input", KIND).notes()
