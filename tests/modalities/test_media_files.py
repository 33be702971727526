"""Files of other people's programs: colour profiles, endings, caption tables, class folders, zips made on Windows."""

from __future__ import annotations

import codecs
import io
import json
import struct
import unicodedata
import warnings
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL
from PIL import ImageCms
from safetensors.torch import load_file
from test_image_data import encoded, everything, make, noise, saved, splits, tree, zipped
from test_shards import image as png
from test_shards import tar

import unilatent
from unilatent.cli import main
from unilatent.cli.options import sampling_settings
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.modalities._media import listing, pixels
from unilatent.modalities._media.captions import of_file, table
from unilatent.modalities._media.class_names import read_class_names
from unilatent.modalities._media.files import class_folders
from unilatent.modalities._media.pixels import EXTENSIONS, Frame, decode
from unilatent.modalities.base import BadSample
from unilatent.modalities.image.storing import Encoding, ImagesToStore
from unilatent.presets import preset
from unilatent.shards.writing import write
from unilatent.training.trainer import Trainer

FRAME = Frame(8, 8, 3, 2)
D50 = (0.9642, 1.0, 0.8249)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


# ---- colour profiles -----------------------------------------------------------------------------------------------


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 profile of a display or grey device."""
    offset, table_, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table_ += name + struct.pack(">2I", offset + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(D50)[8:]
    return head.ljust(128, b"\0") + table_ + data


def curve(gamma: float | None) -> bytes:
    """A power, or the curve of sRGB (None) in 1,024 steps."""
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    levels = np.rint(65535 * linear(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + levels.tobytes()


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded_srgb(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


COLORANTS = {  # the columns of each matrix to XYZ at D50
    "srgb": ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
    "p3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "adobe": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
}
GAMMAS = {"srgb": None, "p3": None, "adobe": 2.19921875}


def rgb_profile(name: str) -> bytes:
    tags = {key: xyz(column) for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), COLORANTS[name], strict=True)}
    curves = {key: curve(GAMMAS[name]) for key in (b"rTRC", b"gTRC", b"bTRC")}
    return icc(b"RGB ", {b"wtpt": xyz(D50), **tags, **curves})


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": curve(gamma)})


def converted(array: np.ndarray, name: str) -> np.ndarray:
    """The closed form: to linear light, by the two matrices, to sRGB."""
    gamma = GAMMAS[name]
    light = linear(array / 255) if gamma is None else (array / 255) ** gamma
    to_xyz, srgb = (np.array(COLORANTS[key]).T for key in (name, "srgb"))
    return 255 * encoded_srgb(light @ (np.linalg.inv(srgb) @ to_xyz).T)


def colours() -> np.ndarray:
    """8 x 8 colours that are in sRGB's gamut in every profile."""
    return np.random.default_rng(3).integers(90, 150, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_wide_colours_become_those_of_srgb(name: str, format: str):
    array = np.broadcast_to(colours()[:1, :1], (8, 8, 3)).copy() if format in ("JPEG", "WEBP") else colours()
    plain = decode(encoded(array, format, quality=100), FRAME, "x").numpy().transpose(1, 2, 0)
    pixels_ = decode(encoded(array, format, quality=100, icc_profile=rgb_profile(name)), FRAME, "x").numpy()
    assert np.abs(pixels_.transpose(1, 2, 0) - converted(plain.astype(float), name)).max() < 1.6


def test_a_pure_green_of_display_p3_is_16_levels_off_without_its_profile():
    array = np.zeros((8, 8, 3), np.uint8) + np.array([120, 200, 120], np.uint8)
    pixels_ = decode(encoded(array, icc_profile=rgb_profile("p3")), FRAME, "x")[:, 0, 0].numpy().astype(int)
    assert np.abs(pixels_ - converted(array[0, 0].astype(float), "p3")).max() < 1.6
    assert np.abs(pixels_ - array[0, 0]).max() >= 16


@pytest.mark.parametrize("profile", ["built in", "by its curves", "without"])
def test_srgb_pixels_stay_bit_identical(profile: str):
    array = noise(8, 8, 3)
    known = {
        "built in": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "without": b"",
        "by its curves": rgb_profile("srgb"),
    }[profile]  # fmt: skip
    assert (decode(encoded(array, icc_profile=known), FRAME, "x").numpy() == array.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_grey_profiles_are_applied_and_grey_stays_grey(gamma: float):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    expected = 255 * encoded_srgb((levels / 255) ** gamma)
    for channels in (1, 3):
        raw = encoded(levels, icc_profile=grey_profile(gamma))
        pixels_ = decode(raw, Frame(8, 8, channels, 2), "x").numpy()
        assert np.abs(pixels_ - expected).max() < 1.6 and (pixels_ == pixels_[:1]).all()
    sixteen = encoded(levels.astype(np.uint16) * 257, icc_profile=grey_profile(gamma))
    assert np.abs(decode(sixteen, FRAME, "x").numpy() - expected).max() < 1.6


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_shows_white_in_any_profile(mode: str):
    picture = PIL.new("RGBA", (8, 8), (120, 200, 120, 255))
    picture.paste((120, 200, 120, 0), (4, 0, 8, 8))
    if mode == "P":
        palette = PIL.new("P", (8, 8), 0)
        palette.putpalette([120, 200, 120, 200, 0, 0])
        palette.paste(1, (4, 0, 8, 8))
        raw = saved(palette, transparency=1, icc_profile=rgb_profile("p3"))
    else:
        profile = grey_profile(1.8) if mode == "LA" else rgb_profile("p3")
        raw = saved(picture.convert(mode), icc_profile=profile)
    out = decode(raw, FRAME, "x").numpy()
    if mode == "LA":
        grey = np.asarray(picture.convert("LA"))[0, 0, 0]
        left = np.full(3, 255 * encoded_srgb(np.array((grey / 255) ** 1.8)))
    else:
        left = converted(np.array([120.0, 200, 120]), "p3")
    assert np.abs(out[:, 0, 0] - left).max() < 1.6 and (out[:, 0, -1] == 255).all()


@pytest.mark.parametrize(
    ("profile", "words"),
    [(b"no profile", "is damaged"), (rgb_profile("p3")[:200], "is damaged"), (grey_profile(1.8), "is for GRAY pixels")],
)
def test_profiles_that_cannot_be_used_cost_no_picture_and_are_told_of_once(
    profile: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pixels, "_WARNED", set())
    array = noise(8, 8, 3)
    raw = encoded(array, icc_profile=profile)
    with pytest.warns(UserWarning, match=rf"image x: its colour profile {words}") as told:
        for _ in range(3):
            assert (decode(raw, FRAME, "x").numpy() == array.transpose(2, 0, 1)).all()
    assert len(told) == 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(raw)
    (tmp_path / "in/b.png").write_bytes(encoded(array))
    stored = ImagesToStore(tmp_path / "in", Encoding((8, 8), "png", 95))
    assert words in stored.check(0) and stored.check(1) == ""


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def described(*chunks: bytes, **options) -> bytes:
    """A PNG file with these chunks before its pixels."""
    raw = encoded(colours(), **options)
    return raw[:33] + b"".join(chunks) + raw[33:]


def adobe_rgb(space: int, interop: str) -> bytes:
    """A JPEG file as cameras write it."""
    exif = PIL.Exif()
    exif.get_ifd(0x8769).update({0xA001: space, 0xA005: {1: interop}})
    return encoded(colours(), "JPEG", exif=exif.tobytes())


GAMMA, SRGB = chunk(b"gAMA", struct.pack(">I", 100000)), chunk(b"sRGB", b"\0")
USUAL = chunk(b"gAMA", struct.pack(">I", 45455))


def primaries(*places: int) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *places))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (described(chunk(b"gAMA", struct.pack(">I", 3))), "a gAMA chunk"),
        (described(USUAL, primaries(34567, 35850, 68000, 32000, 26500, 69000, 15000, 6000)), "a cHRM chunk"),
        (described(USUAL, primaries(31270, 32900, 68000, 32000, 68000, 32000, 15000, 6000)), "a cHRM chunk"),
        (described(USUAL, primaries(31270, 32900, 68000, 32000, 26500, 0, 15000, 6000)), "a cHRM chunk"),
        (described(chunk(b"cICP", b"\x0c\x10\0\x01")), "a cICP chunk"),
        (described(chunk(b"cICP", b"\x0c")), "a cICP chunk"),
        (described(SRGB, chunk(b"cICP", b"\x09\x10\0\x01")), "a cICP chunk"),
        (adobe_rgb(0xFFFF, "R03"), "EXIF as Adobe RGB"),
        (adobe_rgb(2, "R98"), "EXIF as Adobe RGB"),
    ],
)
def test_colours_described_without_a_profile_are_told_of_once(
    raw: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pixels, "_WARNED", set())
    with pytest.warns(UserWarning, match=rf"image x: its colours are described by {words}; its .* as sRGB") as told:
        for _ in range(3):
            decode(raw, FRAME, "x")
    assert len(told) == 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(raw)
    stored = ImagesToStore(tmp_path / "in", Encoding((8, 8), "png", 95))
    assert stored.check(0) == f"colours described by {words}, read as sRGB"


P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
ADOBE = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "name", "gamma"),
    [
        ((chunk(b"gAMA", struct.pack(">I", 100000)),), "srgb", 1.0),
        ((chunk(b"gAMA", struct.pack(">I", 55556)),), "srgb", 1.8),
        ((chunk(b"gAMA", struct.pack(">I", 200000)),), "srgb", 0.5),
        ((chunk(b"gAMA", struct.pack(">I", 45455)), primaries(*ADOBE)), "adobe", 2.2),
        ((chunk(b"gAMA", struct.pack(">I", 100000)), primaries(*P3)), "p3", 1.0),
        ((primaries(*P3),), "p3", None),
        ((chunk(b"cICP", b"\x0c\x0d\0\x01"),), "p3", None),
        ((SRGB, chunk(b"gAMA", struct.pack(">I", 100000)), chunk(b"cICP", b"\x0c\x0d\0\x01")), "p3", None),
    ],
)
def test_colours_that_a_png_file_describes_become_srgb(
    chunks: tuple[bytes, ...], name: str, gamma: float | None, tmp_path: Path
):
    values = colours() / 255
    light = linear(values) if gamma is None else values**gamma
    to_xyz, srgb = (np.array(COLORANTS[key]).T for key in (name, "srgb"))
    expected = 255 * encoded_srgb(light @ (np.linalg.inv(srgb) @ to_xyz).T)
    raw = described(*chunks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(raw, FRAME, "x").numpy().transpose(1, 2, 0)
    assert np.abs(found - expected).max() < 1.6 and np.abs(found - colours().astype(float)).max() > 5
    assert pixels.colour_fault(raw) == ""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(raw)
    stored = ImagesToStore(tmp_path / "in", Encoding(None, "png", 95)).encode(0)[1]
    with PIL.open(io.BytesIO(stored)) as image:
        assert not {"gamma", "chromaticity", "icc_profile"} & image.info.keys()
        assert (np.asarray(image) == found).all(), "prepared once, it is not converted again"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16"])
def test_a_gamma_keeps_grey_transparency_and_depth(mode: str):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture = PIL.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else PIL.fromarray(grey)
    picture = picture if mode in ("L", "I;16") else picture.convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(PIL.new("L", (8, 8), 255))
        picture.putpixel((0, 0), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    plain = saved(picture)
    raw = plain[:33] + GAMMA + plain[33:]
    expected = np.rint(255 * encoded_srgb(grey / 255))
    expected[0, 0] = 255 if mode in ("LA", "RGBA") else expected[0, 0]
    found = decode(raw, FRAME, "x").numpy()
    assert np.abs(found - expected).max() <= 0
    assert (decode(raw, Frame(8, 8, 1, 2), "x").numpy()[0] == expected).all()


@pytest.mark.parametrize(
    "raw",
    [
        described(USUAL), described(chunk(b"gAMA", struct.pack(">I", 45000))), described(GAMMA, SRGB),
        described(USUAL, primaries(31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)), described(SRGB),
        described(GAMMA, chunk(b"cICP", b"\x01\x0d\0\x01")), described(GAMMA, icc_profile=rgb_profile("srgb")),
        adobe_rgb(1, "R98"), adobe_rgb(0xFFFF, "R98"),
    ],
)  # fmt: skip
def test_descriptions_of_srgb_cost_no_warning(raw: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixels, "_WARNED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(raw, FRAME, "x")
    assert pixels.colour_fault(raw) == ""


def test_damaged_exif_data_describe_no_colours():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels.colour_fault(encoded(colours(), "JPEG", exif=b"Exif\0\0MM\0*damaged")) == ""


@pytest.mark.parametrize("size", [None, (8, 8), (4, 4)])
@pytest.mark.parametrize("name", ["p3", "srgb"])
def test_prepared_images_are_srgb_without_a_profile(name: str, size: tuple[int, int] | None, tmp_path: Path):
    (tmp_path / "in").mkdir()
    raw = encoded(colours(), icc_profile=rgb_profile(name))
    (tmp_path / "in/a.png").write_bytes(raw)
    suffix, out = ImagesToStore(tmp_path / "in", Encoding(size, "png", 95)).encode(0)
    assert suffix == "png"
    if name == "srgb" and size != (4, 4):
        assert out == raw  # as wanted already: copied
        return
    assert "icc_profile" not in PIL.open(io.BytesIO(out)).info
    height, width = size or (8, 8)
    frame = Frame(height, width, 3, 2)
    assert (decode(out, frame, "x") == decode(raw, frame, "x")).all()


# ---- endings -------------------------------------------------------------------------------------------------------

WRITTEN = {
    ".jfif": "JPEG", ".jpe": "JPEG", ".JIF": "JPEG", ".JFIF": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000",
    ".j2k": "JPEG2000", ".tga": "TGA", ".webp": "WEBP", ".dib": "DIB", ".pbm": "PPM", ".PNM": "PPM", ".pcx": "PCX",
    ".Tif": "TIFF", ".apng": "PNG", ".mpo": "MPO",
}  # fmt: skip


@pytest.mark.parametrize("ending", WRITTEN)
def test_endings_that_pillow_reads_are_read_in_any_case(ending: str, tmp_path: Path):
    if WRITTEN[ending] not in PIL.SAVE:
        pytest.skip(f"this Pillow writes no {WRITTEN[ending]}")
    (tmp_path / "in").mkdir()
    picture = PIL.new("RGB", (8, 8), (0, 0, 0))
    (tmp_path / "in" / f"a{ending}").write_bytes(saved(picture, WRITTEN[ending]))
    train = splits(tmp_path / "in").train
    assert len(train) == 1 and train[0][0].max() < 0.02 and train.notes == ()
    ((batch, names),) = make().read(tmp_path / "in" / f"a{ending}", 2)
    assert len(batch) == 1 and names == [f"a{ending}"]


def test_every_suffix_is_one_that_pillow_knows_or_a_jpeg():
    PIL.init()
    assert set(EXTENSIONS) - {".jif"} <= PIL.registered_extensions().keys()


@pytest.mark.parametrize("archived", [False, True])
def test_files_that_are_not_read_are_counted_by_ending(archived: bool, tmp_path: Path):
    folder = tree(tmp_path / "in", each=3)
    for i in range(3):
        (folder / "cat" / f"{i}.HEIC").write_bytes(b"x")
    (folder / "dog" / "film.mov").write_bytes(b"x")
    (folder / "dog" / "0001").write_bytes(b"x")
    for name in ("README", "LICENSE", "notes.md", "cat/0.txt", "cat/0.json", ".hidden.heic", "Thumbs.db",
                 "dog/desktop.ini", "dog/.DS_Store", "labels.csv", "classes.xml"):  # fmt: skip
        (folder / name).write_bytes(b"{}")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "x.heic").write_bytes(b"x")
    source = zipped(folder, tmp_path / "in.zip") if archived else folder
    line = f"{source}: 5 files were not read: 3 .heic, 1 .mov, 1 without an ending; convert images among them to .jpg"
    for notes in (splits(source, captions=False).train.notes, ImagesToStore(source, Encoding(None, "png", 95)).notes,
                  make().notes(source)):  # fmt: skip
        assert [note.startswith(line) for note in notes] == [True], notes


def test_a_folder_of_only_unread_files_says_what_it_holds(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"in holds no images, but 12 \.heic; accepted are \.apng, .*\.webp$"):
        splits(tmp_path / "in")


def test_members_of_shards_that_are_not_read_are_counted(tmp_path: Path):
    members = [("a.png", png(0)), ("a.cls", b"0"), ("a.seg.png", b"x"), ("b.heic", b"x"), ("b.cls", b"0"),
               ("c.heic", b"x"), ("d.mov", b"x"), ("e.json", b"{}"), ("README.md", b"x")]  # fmt: skip
    path = tar(tmp_path / "x.tar", *members)
    for _ in range(2):  # the second time from the cached index
        (note,) = splits(path).train.notes
        assert note == f"{path}: 3 files were not read: 2 .heic, 1 .mov; convert images among them to .jpg or .png"
    assert make().notes(path) == [note]


def test_damage_that_ends_a_shard_is_told_of(tmp_path: Path):
    path = tar(tmp_path / "x.tar", ("a.png", png(0)), ("b.png", png(1)))
    raw = bytearray(path.read_bytes())
    start = raw.index(b"b.png")
    raw[start : start + 100] = b"\xff" * 100
    path.write_bytes(raw)
    (note,) = splits(path).train.notes
    assert note.startswith(f"{path}: damaged") and note.endswith("; images after that may be missing: copy it again")


def test_the_fingerprint_of_shards_does_not_know_of_new_suffixes(tmp_path: Path):
    """Recorded before more suffixes were read: the fault of a class without data lists them."""
    path = tar(tmp_path / "x.tar", ("a.png", png(0)), ("a.cls", b"0"), ("b.heic", b"x"), ("b.cls", b"1"))
    assert splits(path).train.fingerprint == "a248f5ee49b2eb5101616fb267035efa6a13d306db45b1aa484579079bcd968c"


# ---- caption tables ------------------------------------------------------------------------------------------------

ROWS = [(f"{i}.png", f"caption, {i}") for i in range(4)]


def delimited(mark: str, names=("file_name", "text"), rows=ROWS, end: str = "\n") -> str:
    lines = [mark.join(names), *(mark.join(f'"{cell}"' if mark in cell else cell for cell in row) for row in rows)]
    return end.join(lines) + end


def in_json(prefix: str = "", end: str = "\n", text: str = "text") -> str:
    return "".join(json.dumps({"file_name": prefix + file, text: words}) + end for file, words in ROWS)


TABLES = {
    "commas": ("metadata.csv", delimited(",").encode()),
    "semicolons": ("metadata.csv", delimited(";").encode()),
    "Excel": ("metadata.csv", codecs.BOM_UTF8 + delimited(";", end="\r\n").encode()),
    "tabs": ("metadata.csv", delimited("\t").encode()),
    "tsv": ("metadata.tsv", delimited("\t").encode()),
    "old Mac": ("metadata.csv", delimited(",", end="\r").encode()),
    "UTF-16": ("metadata.csv", codecs.BOM_UTF16_LE + delimited("\t").encode("utf-16-le")),
    "capital name": ("METADATA.CSV", delimited(",").encode()),
    "capital json": ("Metadata.JSONL", in_json().encode()),
    "capital columns": ("metadata.csv", delimited(",", ("File_Name", "Caption")).encode()),
    "json of Notepad": ("metadata.jsonl", codecs.BOM_UTF8 + in_json(end="\r\n").encode()),
    "own folder": ("metadata.jsonl", in_json("train/").encode()),
    "own folder, from farther up": ("metadata.jsonl", in_json("data/train/").encode()),
    "backslashes": ("metadata.csv", delimited(",", rows=[(f".\\{file}", words) for file, words in ROWS]).encode()),
    "Windows": ("metadata.csv", delimited(";", rows=[(f"train\\{file}", words) for file, words in ROWS]).encode()),
    "other case": ("metadata.csv", delimited(",", rows=[(file.upper(), words) for file, words in ROWS]).encode()),
}


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_any_program(kind: str, archived: bool, tmp_path: Path):
    folder = tmp_path / "root" / "data" / "train"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    name, raw = TABLES[kind]
    (folder / name).write_bytes(raw)
    train = splits(zipped(tmp_path / "root", tmp_path / "x.zip") if archived else folder).train
    assert [train[i][1]["prompts"] for i in range(len(train))] == [words for _, words in ROWS]
    assert train.notes == ()


def test_only_line_ends_end_lines():
    text = "one\u2028still one\x85\x0b\x0cone\r\ntwo\rthree\n"
    assert of_file(text.encode(), "txt", "x") == ("one\u2028still one\x85\x0b\x0cone", "two", "three")
    row = json.dumps({"file_name": "a.png", "text": "a\u2028b"}, ensure_ascii=False)
    assert table(f"{row}\r{row}".encode(), "metadata.jsonl", "x", None) == {"a.png": ["a\u2028b"] * 2}
    assert of_file(codecs.BOM_UTF16_BE + "größe".encode("utf-16-be"), "txt", "x") == ("größe",)


def test_names_with_accents_in_two_forms_are_one(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / unicodedata.normalize("NFD", "é.png")).write_bytes(png())
    (folder / "metadata.csv").write_text("file_name,text\n" + unicodedata.normalize("NFC", "é.png") + ",x\n")
    assert splits(folder).train[0][1] == {"prompts": "x"}


def test_captions_beside_images_have_endings_in_any_case(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, ending in enumerate(("txt", "TXT", "JSON", "Txt")):
        (folder / f"{i}.PNG").write_bytes(png(i))
        (folder / f"{i}.{ending}").write_text(f'{{"caption": "{i}"}}' if ending == "JSON" else str(i))
    train = splits(folder).train
    assert [train[i][1]["prompts"] for i in range(4)] == ["0", "1", "2", "3"]


def test_missing_files_and_images_outside_the_table_are_counted(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\nx/8.png,d\n9.png,e\n")
    train = splits(folder).train
    assert train.notes == (
        f"{folder}/metadata.csv: 2 of the 5 files that it lists (40 %) do not exist or are no images, the first is "
        "9.png",
        f"{folder}/metadata.csv: 1 of 4 images (25 %) are not in it, the first is 3.png; they have no caption and are "
        "not used",
    )
    assert train.facts.keys() == {"prompts"}  # a folder that only the table names makes no class
    (folder / "metadata.csv").write_text("file_name,text\nother/1.png,a\nother/2.png,b\n")
    with pytest.raises(ValueError, match=r"not one of the 2 files that it lists exists, the first is other/1\.png; "):
        splits(folder)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"file,text\nx,y\n", r"here, line 1: no column file_name, only file, text; give the column"),
        (b"file_name;text\nC:\\data\\x.png;y\n", r"here, line 2: file_name 'C:/data/x\.png' leads out of the folder"),
        (b"file_name;text\n\\\\server\\x.png;y\n", r"here, line 2: file_name '//server/x\.png' leads out of"),
        (b"file_name;text\nx.png;a;b\n", r"here, line 2: more cells than the 2 columns .* ';' in double quotes"),
        (b"file_name,text\nx.png,a\n\xff.png,b\n", r"here, line 3: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"file_name,text\n", r"here: no rows; fill it, or remove it"),
        (b"", r"here: no rows; fill it, or remove it"),
    ],
)
def test_faults_of_tables_name_the_line_and_what_was_found(raw: bytes, words: str):
    with pytest.raises(ValueError, match=words):
        table(raw, "metadata.csv", "here", None)


def test_names_of_classes_from_any_program(tmp_path: Path):
    text = "n1 one, a number\r\nn2 größe\u2028x\r\n"
    for raw in (codecs.BOM_UTF8 + text.encode(), codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
                text.replace("\r\n", "\r").encode()):  # fmt: skip
        (tmp_path / "names.txt").write_bytes(raw)
        assert read_class_names(tmp_path / "names.txt", ("n1", "n2")) == ("one, a number", "größe\u2028x")
    (tmp_path / "names.txt").write_bytes(b"one\ngr\xf6\xdfe\n")
    with pytest.raises(ValueError, match=r"names\.txt, line 2: byte 0xf6 is not UTF-8"):
        read_class_names(tmp_path / "names.txt", ("n1", "n2"))


@pytest.mark.parametrize(
    "raw",
    [
        "a cat\u2028asleep\n\n größer \n".encode(), "a cat\u2028asleep\r\rgrößer".encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + "a cat\u2028asleep\r\n größer\r\n".encode("utf-16-le"),
    ],
)  # fmt: skip
def test_files_of_prompts_from_any_program(raw: bytes, tmp_path: Path):
    (tmp_path / "prompts.txt").write_bytes(raw)
    settings = sampling_settings(prompt=["first"], prompts=tmp_path / "prompts.txt")
    assert settings == {"prompts": ["first", "a cat\u2028asleep", "größer"]}


# ---- class folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["10", "9", "1", "2"], ("1", "2", "9", "10")),
        (["010", "9", "09"], ("09", "9", "010")),
        (["10", "9", "x"], ("9", "10", "x")),
        (["b", "B", "a10", "a9"], ("B", "a10", "a9", "b")),
        (["only"], ("only",)),
        (["wrapper/cat", "wrapper/dog"], ("cat", "dog")),
        (["a/b/only"], ("only",)),
        (["above/train/cat", "above/train/dog"], ("cat", "dog")),
        (["train"], ()),
        (["data/Validation"], ()),
        (["."], ()),
    ],
)
def test_classes_of_folders(folders: list[str], classes: tuple[str, ...], archived: bool, tmp_path: Path):
    root = tmp_path / "in"
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "0.png").write_bytes(png())
    train = splits(zipped(root, tmp_path / "x.zip") if archived else root).train
    assert train.facts == ({"labels": {"class_names": classes}} if classes else {})
    for i in range(len(train)):
        folder = train.collection.names[i].split("/")[0] if len(classes) > 1 else classes[0] if classes else ""
        assert train[i][1] == ({"labels": classes.index(folder)} if classes else {})


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        ("1 2 10 other", "1 2 10 other"),
        ("10 9 2d 2 a", "2 9 2d 10 a"),  # in the places of 10, 2 and 9 in the order of characters
        ("-x 100 20 3", "-x 3 20 100"),
        ("01 02 10 other", "01 02 10 other"),
        ("b a C", "C a b"),
        ("12 1 2", "1 2 12"),
    ],
)
def test_class_folders_called_by_numbers_are_in_their_order_next_to_others(folders: str, order: str):
    names = [f"{folder}/a.png" for folder in folders.split()]
    assert class_folders(names, Path("in"), "data.path", "image") == tuple(order.split())


def test_the_order_of_numbers_moves_no_sample_between_the_splits(tmp_path: Path):
    """Recorded when folders called by numbers were in the order of their characters."""
    root = tmp_path / "in"
    for c in range(1, 13):
        (root / str(c)).mkdir(parents=True)
        for i in range(3):
            (root / str(c) / f"{i}.png").write_bytes(encoded(np.full((8, 8), 10 * c + i, np.uint8)))
    both = splits(root, held_out=5)
    names = [both.held_out.collection.names[i] for i in both.held_out.indices]
    assert (names, both.train.fingerprint) == (
        ["1/2.png", "10/2.png", "11/2.png", "12/2.png", "2/2.png"],
        "462b92dbbd478b7700f09a471f6efcaa94a6a8a729d1902d88d660c31008b8c7",
    )
    assert both.train.facts["labels"]["class_names"] == tuple(map(str, range(1, 13)))


def test_numbers_next_to_other_folders_move_no_sample_and_take_over_a_stored_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, old = tmp_path / "in", ("1", "10", "2", "other")
    for c, folder in enumerate(old):
        (root / folder).mkdir(parents=True)
        for i in range(3):
            (root / folder / f"{i}.png").write_bytes(encoded(np.full((8, 8), 10 * c + i, np.uint8)))
    new = splits(root, held_out=5)
    assert new.train.facts["labels"]["class_names"] == ("1", "2", "10", "other")
    for part in (new.train, new.held_out):
        part.adopt("labels", {"class_names": list(old)})
    monkeypatch.setattr(listing, "class_folders", lambda names, *_: tuple(sorted({n.split("/")[0] for n in names})))
    before = splits(root, held_out=5)
    assert before.train.facts == new.train.facts == {"labels": {"class_names": old}}
    for was, part in ((before.train, new.train), (before.held_out, new.held_out)):
        assert list(was.indices) == list(part.indices) and was.fingerprint == part.fingerprint
        assert [was[i][1] for i in range(len(was))] == [part[i][1] for i in range(len(part))]


def test_data_take_over_the_order_of_classes_that_is_stored(tmp_path: Path):
    root = tmp_path / "in"
    for c in (1, 2, 10):
        (root / str(c)).mkdir(parents=True)
        for i in range(2):
            (root / str(c) / f"{i}.png").write_bytes(png(c))
    both = splits(root, held_out=3)
    before = both.train.fingerprint
    for part in (both.train, both.held_out):
        part.adopt("labels", {"class_names": ["1", "10", "2"]})
        assert part.facts == {"labels": {"class_names": ("1", "10", "2")}}
        for i, number in enumerate(part.indices):
            folder = part.collection.names[number].split("/")[0]
            assert part[i][1]["labels"] == ("1", "10", "2").index(folder)
    assert both.train.fingerprint == before
    both.train.adopt("labels", {"class_names": ["1", "10", "3"]})
    assert both.train.facts == {"labels": {"class_names": ("1", "10", "2")}}  # other classes: nothing to take over


def test_names_by_line_follow_the_order_of_numbers_and_are_other_data(tmp_path: Path):
    """Lines in the order of the classes meant other classes while that order was one of characters."""
    root, names = tmp_path / "in", tmp_path / "names.txt"
    for c in (1, 2, 10):
        (root / str(c)).mkdir(parents=True)
        (root / str(c) / "0.png").write_bytes(png(c))
    names.write_text("one\ntwo\nten\n")
    by_line = splits(root, class_names_file=str(names)).train
    named = [by_line.facts["labels"]["class_names"][by_line[i][1]["labels"]] for i in range(3)]
    assert dict(zip(by_line.collection.names, named, strict=True)) == {
        "1/0.png": "one", "2/0.png": "two", "10/0.png": "ten"
    }  # fmt: skip
    names.write_text("10 ten\n1 one\n2 two\n")
    by_name = splits(root, class_names_file=str(names)).train
    assert by_name.facts == by_line.facts
    assert by_name.fingerprint == splits(root).train.fingerprint != by_line.fingerprint


# ---- zips of Windows -----------------------------------------------------------------------------------------------


def zip_of(path: Path, members: list[tuple[bytes, bytes]], system: int = 0) -> Path:
    """A zip whose names are these bytes, without the flag that says UTF-8."""
    placeholders = {f"{i:04d}".ljust(len(name), "_"): name for i, (name, _) in enumerate(members)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for placeholder, (_, raw) in zip(placeholders, members, strict=True):
            info = zipfile.ZipInfo(placeholder)
            info.create_system = system
            archive.writestr(info, raw)
    raw = buffer.getvalue()
    for placeholder, name in placeholders.items():
        assert raw.count(placeholder.encode()) == 2 and len(placeholder) == len(name)
        raw = raw.replace(placeholder.encode(), name)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("system", [0, 3])
def test_backslashes_are_folders(system: int, tmp_path: Path):
    members = [(rb"pics\%s\%d.png" % (name, i), png(i)) for name in (b"cat", b"dog") for i in range(3)]
    members += [(b"pics\\", b""), (b"pics\\cat\\", b""), (b"pics\\Thumbs.db", b"x")]
    members += [(b"pics\\cat\\desktop.ini", b"x"), (b"__MACOSX\\pics\\._0.png", b"x")]
    train = splits(zip_of(tmp_path / "x.zip", members, system)).train
    plain = splits(tree_of(tmp_path / "plain")).train
    assert train.facts == plain.facts == {"labels": {"class_names": ("cat", "dog")}} and train.notes == ()
    assert (everything(train)[0] == everything(plain)[0]).all() and everything(train)[1] == everything(plain)[1]


def tree_of(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(png(i))
    return root


@pytest.mark.parametrize(
    ("encoding", "classes"),
    [
        ("cp437", ("Körper", "Tür", "été")), ("cp437", ("öl", "über")), ("cp932", ("犬", "猫の写真")),
        ("cp932", ("ネコ", "表示")), ("utf-8", ("Körper", "犬")), ("utf-8", ("ça", "кот")),
    ],
)  # fmt: skip
def test_names_have_the_encoding_that_they_were_written_in(encoding: str, classes: tuple[str, ...], tmp_path: Path):
    members = [(f"{name}/{i}.png".encode(encoding), png(i)) for name in classes for i in range(2)]
    members += [(f"{name}/metadata.csv".encode(encoding), b"file_name,text\n0.png,a\n1.png,b\n") for name in classes]
    train = splits(zip_of(tmp_path / "x.zip", members)).train
    assert set(train.facts["labels"]["class_names"]) == set(classes)
    assert {train[i][1]["prompts"] for i in range(len(train))} == {"a", "b"}
    marked = tmp_path / "marked.zip"
    with zipfile.ZipFile(marked, "w") as archive:  # Python sets the flag
        for name in classes:
            archive.writestr(f"{name}/0.png", png())
    assert set(splits(marked).train.facts.get("labels", {}).get("class_names", ())) == set(classes)


def test_a_member_that_the_zip_does_not_have_is_named(tmp_path: Path):
    members = [(b"a\\0.png", png()), (b"a\\metadata.csv", b"file_name,text\n0.png,x\n1.png,y\n")]
    train = splits(zip_of(tmp_path / "x.zip", members)).train
    with pytest.raises(BadSample, match=r"image a/1\.png in .*x\.zip: not in the archive"):
        train[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train[0][1] == {"labels": 0, "prompts": "x"}
    assert all(a <= b for a, b in pairwise(train.collection.names))


# ---- whole commands ------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code of a command and all that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out + err


@pytest.mark.parametrize("verb", ["train", "verify", "prepare"])
def test_commands_tell_what_they_do_not_read(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tree(tmp_path / "in", each=3)
    (folder / "cat" / "a.heic").write_bytes(b"x")
    (folder / "cat" / "2.png").write_bytes(encoded(noise(8, 8, 3), icc_profile=b"nothing"))
    arguments = {
        "train": ("train", "digits", f"data.path={folder}", "data.held_out=0", "--dry-run", "--out", tmp_path / "run"),
        "verify": ("data", "verify", folder, "--workers", 1),
        "prepare": ("data", "prepare", folder, "--out", tmp_path / "out", "--workers", 1),
    }[verb]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, printed = command(capsys, *arguments)
    assert code == 0 and printed.count(f"note: {folder}: 1 file was not read: 1 .heic; convert images") == 1, printed
    assert printed.count("note: 1 sample has a colour profile that is damaged") == (verb == "verify")


def test_training_tells_once_that_captions_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encoded(noise(16, 16, 3, seed=i)))
        (folder / f"{i}.txt").write_text("plain " * (30 if i < 3 else 4) + "\nshort")
    settings = ("modality.size=16", "modality.patch_size=4", "data.held_out=0", "conditions.text.max_length=16")
    code, printed = command(
        capsys, "train", "scenes-unite", f"data.path={folder}", *settings, "--dry-run", "--out", tmp_path / "run"
    )
    assert code == 0 and printed.count("max_length") == 1
    assert (
        "note: prompts: 3 of 12 captions looked at (25 %) have more than the 16 words and marks that the model reads, "
        "up to 30; their ends are cut. Raise conditions.text.max_length in a new run"
    ) in printed


def test_a_run_keeps_the_order_of_its_classes(tmp_path: Path):
    """A run whose classes were numbered by their characters is resumed bit for bit, and its samples are its own."""
    folder = tree(tmp_path / "in", classes=tuple(map(str, range(1, 13))), each=2)
    settings = (
        f"data.path={folder}", "data.held_out=4", "modality.channels=3", "training.steps=4", "training.batch_size=4",
        "training.evaluate_samples=0", "training.sample_every=0", "training.checkpoint_every=2",
    )  # fmt: skip
    order = tuple(sorted(map(str, range(1, 13))))
    stored = f"conditions.class_label.class_names={json.dumps(order)}"
    new, old = preset("digits").override(*settings), preset("digits").override(*settings, stored)
    Trainer(old, tmp_path / "whole").fit()
    parts = Trainer(old, tmp_path / "parts")
    parts.steps = 2
    parts.fit()
    resumed = Trainer(new, tmp_path / "parts", resume="auto")
    assert resumed.splits.train.facts["labels"]["class_names"] == order
    resumed.fit()
    ends = [load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys() and all((ends[0][key] == ends[1][key]).all() for key in ends[0])
    model = unilatent.load(tmp_path / "parts")
    assert model.config.conditions["class_label"].class_names == order
    fresh = Trainer(new, tmp_path / "fresh")
    assert fresh.config.conditions["class_label"].class_names == tuple(map(str, range(1, 13)))
    data = splits(folder, modality=model.modality)
    Evaluator(model, data, tmp_path / "eval", EvaluationRequest(num_samples=4))
    assert data.train.facts["labels"]["class_names"] == order


def test_shards_that_exist_keep_the_order_of_their_classes(tmp_path: Path):
    folder = tree(tmp_path / "in", classes=("1", "2", "10"), each=2)
    samples = ImagesToStore(folder, Encoding((8, 8), "png", 95))
    assert samples.class_names == ("1", "2", "10")
    samples.adopt(("1", "10", "2"))  # as an earlier version numbered them
    write(samples, tmp_path / "out", shard_size=3, seed=0, workers=1)
    again = ImagesToStore(folder, Encoding((8, 8), "png", 95))
    assert write(again, tmp_path / "out", shard_size=3, seed=0, workers=1).reused == 2
    train = splits(tmp_path / "out").train
    assert train.facts == {"labels": {"class_names": ("1", "10", "2")}}
    alone = ImagesToStore(tree(tmp_path / "lone", classes=("only",)), Encoding((8, 8), "png", 95))
    assert (alone.class_names, set(alone.labels)) == (("only",), {0})
    alone.adopt(())
    assert (alone.class_names, alone.labels) == ((), None)
