"""Encoded images to pixels: decoding, orientation, colour profile, bit depth, and ADM's centre crop."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..base import BadSample

EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Suffixes of supported image files, in lower case."""
SAME_COLOURS = 2
"""A profile that changes no colour by more than so many of 255 levels is sRGB, and its pixels stay as they are."""
GREYS = ("1", "L", "LA", "La")
"""Pillow's 8-bit modes without colour."""
GREY_LEVELS = np.arange(256, dtype=np.uint8)[None]
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""sRGB's white, red, green and blue as a PNG file gives them: x and y of each."""
SRGB_CODE = b"\x01\x0d\x00\x01"
"""sRGB in a PNG file's cICP chunk."""
CODED = {
    b"\x0c\x0d\x00\x01": (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    b"\x09\x0d\x00\x01": (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
}
"""Primaries of other colours with sRGB's curve: Display P3, and those of BT.2020."""
GAMMAS = (0.1, 10.0)
"""Smallest and largest gamma that is believed."""
ROWS = 64
"""Rows of an image that are converted at a time."""
_WARNED: set[str] = set()
"""Faults of colour profiles, and other descriptions of colours, that this process has warned of."""


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
        return _open(raw, channels, where)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        known = not isinstance(error, UnidentifiedImageError)
        reason = " ".join(str(error).split()) or type(error).__name__ if known else "unknown image format"
        raise BadSample(f"image {where}: cannot be decoded ({reason}); remove it or save it again") from error


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return ADM's centre crop (Dhariwal & Nichol 2021): halve by averaging, resize to just cover the target, crop."""
    image = cover(image, height, width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the image resized to just cover the target, as `fit` does before it crops."""
    while min(image.height / height, image.width / width) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image.resize((wide, high), Image.Resampling.BICUBIC)  # a copy if the size is already right


def _open(raw: bytes, channels: int, where: str) -> Image.Image:
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
    if profile := opened.info.get("icc_profile"):
        image = _in_srgb(image, bytes(profile), where)
    elif described := _described(opened, raw):
        if described.to_srgb is not None:
            image = _keeping_alpha(image, _profiled_mode(image), described.to_srgb)
        else:
            _warn_once(f"its colours are described by {described.words}", described.words, where)
    return on_white(image).convert("RGB" if channels == 3 else "L")


def on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency, composed on white where it has some."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def colour_fault(raw: bytes) -> str:
    """Return what a decodable image file says of its colours and is not used; "" if all is, or if there is nothing."""
    with Image.open(io.BytesIO(raw)) as opened:
        if profile := opened.info.get("icc_profile"):
            fault = _transform(bytes(profile), _profiled_mode(opened)).fault
            return f"a colour profile that {fault}" if fault else ""
        described = _described(opened, raw)
        return f"colours described by {described.words}" if described and described.to_srgb is None else ""


@dataclass(frozen=True)
class _Described:
    """Colours that are not sRGB, described without a profile. words: by what. to_srgb: converts an image without
    transparency; None if that is not supported."""

    words: str
    to_srgb: Callable[[Image.Image], Image.Image] | None = None


def _described(image: Image.Image, raw: bytes) -> _Described | None:
    """Return how an opened file without a colour profile says that its colours are not sRGB; None if it does not."""
    if image.format == "PNG":
        mode, code = _profiled_mode(image), _cicp(raw)
        if code is not None:
            to_srgb = _from_light(None, CODED[code], mode) if code in CODED else None
            return None if code == SRGB_CODE else _Described("a cICP chunk", to_srgb)
        if "srgb" in image.info:
            return None
        gamma, primaries = image.info.get("gamma") or None, tuple(image.info.get("chromaticity") or PRIMARIES)
        if mode == "L" or max(abs(a - b) for a, b in zip(primaries, PRIMARIES, strict=True)) <= 0.005:
            primaries = PRIMARIES
        usual = gamma is None or abs(gamma - 1 / 2.2) <= 0.01
        if not usual or primaries != PRIMARIES:
            return _Described("a cHRM chunk" if usual else "a gAMA chunk", _from_light(gamma, primaries, mode))
    try:
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        interop = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) if space == 0xFFFF else ""
    except Exception:  # damaged EXIF data describe nothing
        return None
    return _Described("EXIF as Adobe RGB") if space == 2 or str(interop).startswith("R03") else None


@lru_cache(maxsize=32)
def _from_light(
    gamma: float | None, primaries: tuple[float, ...], mode: str
) -> Callable[[Image.Image], Image.Image] | None:
    """Return how pixels (L or RGB) become sRGB that are the `gamma`-th power of light (None: sRGB's curve) in these
    primaries; None if the values make no sense, or white is not sRGB's, D65.

    PNG specification (third edition), 11.3.2 and 13.
    """
    if gamma is not None and not GAMMAS[0] <= gamma <= GAMMAS[1]:
        return None
    levels = np.arange(256) / 255
    curve = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    light = curve if gamma is None else levels ** (1 / gamma)
    if primaries == PRIMARIES or mode == "L":
        table = _encoded(light).tolist()
        return lambda image: image.convert(mode).point(table * len(mode))
    if max(abs(a - b) for a, b in zip(primaries[:2], PRIMARIES[:2], strict=True)) > 0.005 or min(primaries[1::2]) <= 0:
        return None
    to_xyz, srgb_to_xyz = _to_xyz(primaries), _to_xyz(PRIMARIES)
    if to_xyz is None or srgb_to_xyz is None:
        return None
    matrix = (np.linalg.inv(srgb_to_xyz) @ to_xyz).T  # (3, 3), for rows of colours

    def convert(image: Image.Image) -> Image.Image:
        pixels = np.array(image.convert("RGB"))  # (H, W, 3)
        for start in range(0, len(pixels), ROWS):
            pixels[start : start + ROWS] = _encoded(light[pixels[start : start + ROWS]] @ matrix)
        return Image.fromarray(pixels)

    return convert


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray | None:
    """Return the matrix (3, 3) from light in these primaries to XYZ, with white at Y = 1; None if there is none."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]).T
    if abs(np.linalg.det(columns[:, 1:])) < 1e-3:
        return None
    return columns[:, 1:] * np.linalg.solve(columns[:, 1:], columns[:, 0])


def _encoded(light: np.ndarray) -> np.ndarray:
    """Return light in [0, 1], clipped, as 8-bit sRGB values."""
    light = light.clip(0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * values).astype(np.uint8)


def _cicp(raw: bytes) -> bytes | None:
    """Return the content of a PNG file's cICP chunk, which Pillow does not read; None without one."""
    at = 8
    while at + 8 <= len(raw) and (kind := raw[at + 4 : at + 8]) != b"IDAT":
        length = int.from_bytes(raw[at : at + 4], "big")
        if kind == b"cICP":
            return raw[at + 8 : at + 8 + length]
        at += length + 12
    return None


def _warn_once(what: str, kind: str, where: str) -> None:
    """Warn of the first image of each kind."""
    if kind not in _WARNED:
        _WARNED.add(kind)
        warnings.warn(
            f"image {where}: {what}; its colours are read as sRGB. `unilatent data verify` counts such images",
            stacklevel=3,
        )


def is_srgb(image: Image.Image, raw: bytes) -> bool:
    """Whether the pixels of an opened file are read as sRGB: neither a profile nor another description changes them."""
    if profile := image.info.get("icc_profile"):
        return _transform(bytes(profile), _profiled_mode(image)).to_srgb is None
    described = _described(image, raw)
    return described is None or described.to_srgb is None


@dataclass(frozen=True)
class _Transform:
    """to_srgb: converts an image without transparency; None if pixels stay as they are. fault: why a profile is not
    used."""

    to_srgb: Callable[[Image.Image], Image.Image] | None
    fault: str = ""


def _profiled_mode(image: Image.Image) -> str:
    """Return the mode of the colours that a profile is about: L, RGB or CMYK."""
    if image.mode in GREYS or image.mode.startswith(("I", "F")):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _in_srgb(image: Image.Image, profile: bytes, where: str) -> Image.Image:
    """Convert an 8-bit image to sRGB; grey stays grey, and transparency stays.

    A profile that cannot be used leaves the image unchanged, with one warning per kind of fault.
    """
    mode = _profiled_mode(image)
    transform = _transform(profile, mode)
    if transform.fault:
        _warn_once(f"its colour profile {transform.fault}", transform.fault, where)
    if transform.to_srgb is None:
        return image
    return _keeping_alpha(image, mode, transform.to_srgb)


def _keeping_alpha(image: Image.Image, mode: str, to_srgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert the colours of an image; grey (mode L) stays grey, and transparency stays."""
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    converted = to_srgb(image)
    converted = converted.convert("L") if mode == "L" else converted
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> _Transform:
    """Return how pixels of a mode (L, RGB or CMYK) with this profile become sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        fits = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space, space)
        if fits != mode and (fits, mode) != ("RGB", "L"):  # grey pixels in an RGB profile are its neutral colours
            return _Transform(None, f"is for {space} pixels, the image has {mode}")
        if fits != "CMYK" and _changes_nothing(source, fits):
            return _Transform(None)
        if fits == "L":
            levels = _converted(Image.fromarray(GREY_LEVELS), _exact(source, "L", ImageCms.Intent.PERCEPTUAL))
            table = np.asarray(levels)[0, :, 1].tolist()
            return _Transform(lambda image: image.convert("L").point(table))
        transform = ImageCms.buildTransform(source, _srgb(), fits, "RGB", ImageCms.Intent.PERCEPTUAL)
        return _Transform(lambda image: _converted(image.convert(fits), transform))
    except ImportError:
        return _Transform(None, "cannot be read, this Pillow was built without littlecms")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return _Transform(None, f"is damaged ({' '.join(str(error).split()) or type(error).__name__})")


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _exact(source: ImageCms.ImageCmsProfile, mode: str, intent: ImageCms.Intent) -> ImageCms.ImageCmsTransform:
    """Return a slow transform to sRGB; the fast one is several levels off in dark greys."""
    return ImageCms.buildTransform(source, _srgb(), mode, "RGB", intent, flags=ImageCms.Flags.NOOPTIMIZE)


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only in place
    return converted


def _changes_nothing(source: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Whether a profile's colours are those of sRGB, up to rounding: tried on 256 greys and on 729 colours."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3)
    tried = GREY_LEVELS if mode == "L" else np.concatenate([colours, GREY_LEVELS[..., None].repeat(3, -1)], 1)
    transform = _exact(source, mode, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    converted = np.asarray(_converted(Image.fromarray(tried), transform)).astype(int)
    return bool(np.abs(converted - tried.reshape(*tried.shape[:2], -1)).max() <= SAME_COLOURS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey, which Pillow may store in 32-bit integers, to 256 levels."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are neither 8 nor 16-bit integers")
    return Image.fromarray(np.rint(pixels.astype(np.float64) / 257).astype(np.uint8))
