"""Two thousand damaged files per reader: each is read, or refused in one line, within seconds, and counts are true."""

from __future__ import annotations

import io
import json
import random
import signal
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL
from test_image_data import encoded, make, noise, saved, splits
from test_media_files import rgb_profile, zip_of
from test_shards import image as png
from test_shards import sample, tar

from unilatent.config import ConfigError
from unilatent.modalities._media.pixels import Frame, decode
from unilatent.modalities.base import BadSample

FILES = 2000
LONGEST = 10
"""Seconds for one file."""
FRAME = Frame(8, 8, 3, 2)
REFUSALS = (ValueError, BadSample, ConfigError)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


def damaged(raw: bytes, draw: random.Random, words: tuple[bytes, ...]) -> bytes:
    """One to four changes: bits, runs of bytes, cuts, repetitions, exchanged parts, and words of the format."""
    content = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        size = len(content)
        at = draw.randrange(size + 1)
        length = min(size - at, draw.choice((1, 1, 2, 4, 16, 100)))
        kind = draw.randrange(8)
        if kind == 0 and size:
            content[min(at, size - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length] * draw.randint(1, 20)
        elif kind == 4:
            content[at : at + length] = draw.choice((b"\0", b"\xff", b"\x7f", b" ", b"\n")) * length
        elif kind == 5:
            content[at:at] = draw.choice(words)
        elif kind == 6 and draw.random() < 0.3:
            del content[at:]
        else:
            other = draw.randrange(size + 1)
            content[at : at + length] = content[other : other + length]
    return bytes(content)


@contextmanager
def limited() -> Iterator[None]:
    """Fail if the block takes longer than LONGEST seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(error: ValueError) -> str:
    """The message of a refusal: one line of one of our own errors, not of a library's."""
    assert type(error) in REFUSALS, repr(error)
    message = str(error)
    assert message and "\n" not in message, repr(message)
    return message


def outcomes(open_data: Callable[[], object]) -> tuple[int, int, int] | None:
    """Samples in all, usable and bad; None if the data are refused."""
    try:
        train = open_data().train
    except ValueError as error:
        refusal(error)
        return None
    usable = bad = 0
    for i in range(len(train)):
        try:
            pixels, _ = train[i]
            assert pixels.shape == (3, 8, 8) and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
            usable += 1
        except ValueError as error:
            refusal(error)
            bad += 1
    assert train.fingerprint and all("\n" not in note for note in train.notes)
    return len(train), usable, bad


def fuzz(name: str, raws: list[bytes], words: tuple[bytes, ...], check: Callable[[bytes], bool]) -> None:
    """check: reads a file and says whether anything in it was usable. Some files must be, and some must not."""
    draw = random.Random(name)
    used = 0
    for number in range(FILES):
        content = damaged(raws[number % len(raws)], draw, words)
        with limited():
            try:
                used += check(content)
            except (Exception, TimeoutError) as error:
                raise AssertionError(f"{name}, file {number}: {content[:200]!r}") from error
    assert FILES // 100 < used < FILES, used


def folder_of(root: Path) -> Path:
    root.mkdir()
    for i in range(4):
        (root / f"{i}.png").write_bytes(png(i))
    return root


def table_check(folder: Path, file: str) -> Callable[[bytes], bool]:
    def check(content: bytes) -> bool:
        (folder / file).write_bytes(content)
        counted = outcomes(lambda: splits(folder))
        if counted is None:
            return False
        total, usable, bad = counted
        assert usable + bad == total >= 4 and usable <= 4
        return usable > 0

    return check


@pytest.mark.slow
def test_tables_of_captions(tmp_path: Path):
    rows = [(f"{i}.png", f"a cat, {i}, größer") for i in range(4)]
    words = (b",", b";", b"\t", b'"', b"\r", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"file_name", b"../", b"C:\\", b"\0",
             b"\xe2\x80\xa8", b"0.png,x\n")  # fmt: skip
    texts = [f"file_name{mark}text{end}" + "".join(f'{f}{mark}"{t}"{end}' for f, t in rows)
             for mark in (",", ";", "\t") for end in ("\n", "\r\n")]  # fmt: skip
    raws = [text.encode() for text in texts] + [("\ufeff" + texts[0]).encode("utf-16-le")]
    fuzz("metadata.csv", raws, words, table_check(folder_of(tmp_path / "in"), "metadata.csv"))


@pytest.mark.slow
def test_tables_in_json(tmp_path: Path):
    words = (b"{", b"}", b"[" * 5000, b"]", b'"', b"\\u0000", b"\\ud800", b"\r", b"1e999", b"null", b"NaN", b"../",
             b'"text": 3,', b"9" * 5000)  # fmt: skip
    lines = [
        json.dumps({"file_name": f"{i}.png", "text": [f"ü{i}", "b"], "n": i}, ensure_ascii=i % 2 == 0) for i in range(4)
    ]
    raws = ["\n".join(lines).encode(), ("\r\n".join(lines) + "\r\n").encode("utf-8-sig")]
    fuzz("metadata.jsonl", raws, words, table_check(folder_of(tmp_path / "in"), "metadata.jsonl"))


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their contents, as far as it consists of chunks."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + size]
        parts += [content[at : at + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        at += 12 + size
    return b"".join(parts)


def picture_check(content: bytes) -> bool:
    try:
        pixels = decode(content, FRAME, "x")
    except ValueError as error:
        assert type(error) is BadSample and refusal(error).startswith("image x: ")
        return False
    assert pixels.shape == (3, 8, 8)
    return True


@pytest.mark.slow
def test_png():
    palette = saved(PIL.fromarray(noise(9, 9)).convert("P"), transparency=3)
    deep = encoded(noise(9, 9).astype(np.uint16) * 257)
    raws = [encoded(noise(9, 12, 3), icc_profile=rgb_profile("p3")), palette, deep, saved(PIL.new("RGBA", (9, 9)))]
    words = (b"IHDR", b"IDAT", b"iCCP", b"tRNS", b"eXIf", b"acTL", b"\0\0\xff\xff", b"\x7f\xff\xff\xff", b"IEND")
    fuzz("png", raws, words, lambda content: picture_check(content) | picture_check(with_checksums(content)))


@pytest.mark.slow
def test_jpg():
    exif = PIL.Exif()
    exif[0x0112] = 6
    picture = PIL.fromarray(noise(17, 24, 3))
    raws = [saved(picture, "JPEG", exif=exif, icc_profile=rgb_profile("p3")), saved(picture, "JPEG", progressive=True),
            saved(picture.convert("L"), "JPEG"), saved(picture.convert("CMYK"), "JPEG")]  # fmt: skip
    words = (
        b"\xff\xd8",
        b"\xff\xc0",
        b"\xff\xda",
        b"\xff\xe1\0\x10Exif\0\0",
        b"\xff\xe2",
        b"\xff\xd9",
        b"ICC_PROFILE\0",
    )
    fuzz("jpg", raws, words, picture_check)


@pytest.mark.slow
def test_npz(tmp_path: Path):
    arrays = {"arr_0": noise(4, 8, 8, 3), "labels": np.arange(4) % 2, "prompts": noise(4, 5)}
    raws = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        raws.append(buffer.getvalue())
    path = tmp_path / "x.npz"

    def check(content: bytes) -> bool:
        path.write_bytes(content)
        counted = outcomes(lambda: splits(path))
        if counted is None:
            return False
        total, usable, bad = counted
        assert usable + bad == total
        return usable > 0

    words = (b"PK\x03\x04", b"PK\x01\x02", b"\x93NUMPY", b"'|O'", b"(4, 8, 8, 3)", b"(0, 8, 8, 3)", b"True", b"<u1")
    fuzz("npz", raws, words, check)


@pytest.mark.slow
def test_tar(tmp_path: Path):
    members = [part for i in range(5) for part in (*sample(f"c/{i}", i % 2, i), (f"c/{i}.txt", b"a caption"))]
    raw = tar(tmp_path / "raw.tar", *members).read_bytes()
    path = tmp_path / "x.tar"

    def check(content: bytes) -> bool:
        path.write_bytes(content)
        counted = outcomes(lambda: splits(path))
        if counted is None:
            return False
        total, usable, bad = counted
        assert usable + bad == total
        return usable > 0

    words = (
        b"ustar",
        b"../",
        b"\0" * 512,
        b"7777777",
        b"-1",
        b"\x80\0\0\0\0\0\0\1",
        b"GNU.sparse.major=1\n",
        b"x",
        b"L",
    )
    fuzz("tar", [raw], words, check)


@pytest.mark.slow
def test_zip(tmp_path: Path):
    raws = []
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", kind) as archive:
            for name in ("cat", "dög"):
                for i in range(3):
                    archive.writestr(f"{name}/{i}.png", png(i))
                archive.writestr(f"{name}/metadata.csv", "file_name,text\n0.png,a\n1.png,b\n2.png,c\n")
        raws.append(buffer.getvalue())
    windows = [(f"{name}\\{i}.png".encode("cp932"), png(i)) for name in ("犬", "ネコ") for i in range(3)]
    raws.append(zip_of(tmp_path / "windows.zip", windows).read_bytes())
    path = tmp_path / "x.zip"
    modality = make()

    def check(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            modality.notes(path)
        except ValueError as error:
            refusal(error)
        counted = outcomes(lambda: splits(path))
        if counted is None:
            return False
        total, usable, bad = counted
        assert usable + bad == total and usable <= 6
        return usable > 0

    words = (
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"\x01\x00\x10\x00",
        b"\xff\xff\xff\xff",
        b"../",
    )
    fuzz("zip", raws, words, check)
