"""Encoded images to pixels: decoding, orientation, bit depth, and ADM's centre crop."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..base import BadSample

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of supported image files."""


@dataclass(frozen=True)
class Frame:
    """The size that images are cropped to. Images with a side smaller than `patch` are bad samples."""

    height: int
    width: int
    channels: int
    patch: int

    @property
    def values(self) -> int:
        """Number of values per image."""
        return self.channels * self.height * self.width


def decode(raw: bytes, frame: Frame, where: str) -> Tensor:
    """Decode an image file to (C, H, W) uint8; BadSample names `where`."""
    image = open_image(raw, frame.channels, where)
    if min(image.size) < frame.patch:
        size = f"{image.height} x {image.width}"
        raise BadSample(f"image {where}: {size} (height x width) is smaller than a patch ({frame.patch}); remove it")
    return to_tensor(fit(image, frame.height, frame.width))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert to (C, H, W) uint8."""
    pixels = np.asarray(image).reshape(image.height, image.width, -1)  # (H, W, C)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def open_image(raw: bytes, channels: int, where: str) -> Image.Image:
    """Open an image upright, in 8 bits, composed on white if transparent, as grey (1 channel) or RGB (3).

    BadSample names `where`.
    """
    try:
        return _open(raw, channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        known = not isinstance(error, UnidentifiedImageError)
        reason = " ".join(str(error).split()) or type(error).__name__ if known else "unknown image format"
        raise BadSample(f"image {where}: cannot be decoded ({reason}); remove it or save it again") from error


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return ADM's centre crop (Dhariwal & Nichol 2021): halve by averaging, resize to just cover the target, crop."""
    while min(image.height / height, image.width / width) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((wide, high), Image.Resampling.BICUBIC)  # a copy if the size is already right
    left, top = (wide - width) // 2, (high - height) // 2
    return image.crop((left, top, left + width, top + height))


def _open(raw: bytes, channels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # such images are refused below, before decoding
        opened = Image.open(io.BytesIO(raw))
    with opened:
        if (Image.MAX_IMAGE_PIXELS or 0) < opened.width * opened.height:
            raise ValueError(
                f"{opened.height} x {opened.width} pixels, more than the allowed {Image.MAX_IMAGE_PIXELS:,}"
            )
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey, which Pillow may store in 32-bit integers, to 256 levels."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are neither 8 nor 16-bit integers")
    return Image.fromarray(np.rint(pixels.astype(np.float64) / 257).astype(np.uint8))
