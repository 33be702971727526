"""Encoding of the images of a folder or archive for tar shards (`unilatent data prepare`)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .._media.files import locate
from .._media.pixels import Frame, colour_fault, decode, fit, is_srgb, open_image
from .._media.storing import FilesToStore
from .data import KIND

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Encoding:
    """How images are stored. size: (height, width); None: unchanged."""

    size: tuple[int, int] | None
    format: str
    quality: int


class ImagesToStore(FilesToStore):
    """The images of a folder or zip, with the same classes and captions as in training."""

    def __init__(self, source: Path, encoding: Encoding):
        self.encoding = encoding
        size = list(encoding.size) if encoding.size else None
        quality = {} if encoding.format == "png" else {"quality": encoding.quality}
        super().__init__(locate(source, "source", KIND), {"size": size, "format": encoding.format, **quality})

    def check(self, number: int) -> str:
        name = self.root + self.names[number]
        raw = self.files.read(name)
        decode(raw, Frame(1, 1, 3, 1), self.files.where(name))
        self.beside(number)
        fault = colour_fault(raw)
        return f"{fault}, read as sRGB" if fault else ""

    def encode(self, number: int) -> tuple[str, bytes]:
        """Crop as in training and encode; a file that already has the size and format is copied unchanged."""
        name = self.root + self.names[number]
        raw, where = self.files.read(name), self.files.where(name)
        image = open_image(raw, 3, where)
        encoding = self.encoding
        if encoding.size and image.size != encoding.size[::-1]:
            image = fit(image, *encoding.size)
        elif _has_format(raw, encoding.format):
            return encoding.format, raw
        if _is_grey(raw):
            image = image.convert("L")
        return encoding.format, _saved(image, encoding)


def _has_format(raw: bytes, format: str) -> bool:
    """Whether an image file has this format and needs no conversion: grey or RGB, in sRGB, and upright."""
    with Image.open(io.BytesIO(raw)) as opened:
        upright = ImageOps.exif_transpose(opened).size == opened.size and opened.getexif().get(0x0112, 1) == 1
        return opened.format == FORMATS[format] and opened.mode in ("L", "RGB") and upright and is_srgb(opened, raw)


def _is_grey(raw: bytes) -> bool:
    with Image.open(io.BytesIO(raw)) as opened:
        return opened.mode in ("1", "L") or opened.mode.startswith(("I", "F"))


def _saved(image: Image.Image, encoding: Encoding) -> bytes:
    """Encode an image in sRGB, without a colour profile."""
    buffer = io.BytesIO()
    image.info.pop("icc_profile", None)
    options: dict[str, Any] = {} if encoding.format == "png" else {"quality": encoding.quality}
    if encoding.format == "jpg":
        options["subsampling"] = 0  # colour at full resolution, because the images are small
    image.save(buffer, FORMATS[encoding.format], **options)
    return buffer.getvalue()
