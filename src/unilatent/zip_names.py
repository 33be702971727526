"""The names of the members of zip archives, as the programs that wrote them mean them."""

from __future__ import annotations

import re
import struct
import zipfile

OPENING_FAILS = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error,
)  # fmt: skip
"""What `zipfile.ZipFile` raises for a file that is no whole archive."""
JAPANESE = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff00-\uff60]")
"""Kana, kanji, and full-width punctuation, letters and digits."""
UTF8_NAME = 0x800
"""Flag bit 11 of a member: its name is UTF-8."""


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name.

    Names without flag bit 11 are in an encoding that the archive does not say: UTF-8 (macOS, 7-Zip), code page 932
    (Japanese Windows) or 437, which the format prescribes. Some programs of Windows write backslashes.
    """
    encoding = _encoding(b"\n".join(_bytes(member) for member in archive.infolist() if _is_unmarked(member)))
    members = {}
    for member in archive.infolist():
        name = _bytes(member).decode(encoding, "replace") if _is_unmarked(member) else member.filename
        members[_slashes(name).removeprefix("./")] = member
    return members


def _is_unmarked(member: zipfile.ZipInfo) -> bool:
    """Whether Python read a name as code page 437 because nothing says what it is."""
    marked = member.flag_bits & UTF8_NAME or _slashes(member.filename) != _slashes(member.orig_filename)
    return not marked and not member.filename.isascii()


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _bytes(member: zipfile.ZipInfo) -> bytes:
    """Return a name that was read as code page 437 as it is in the archive."""
    return member.filename.encode("cp437", "replace")


def _encoding(names: bytes) -> str:
    """Return the encoding of names that are not all ASCII.

    In code page 932, the second byte of a character is a letter as often as not. Western names that are read in it by
    mistake have a letter after each accent, so at least one other second byte is asked for.
    """
    for encoding in ("utf-8", "cp932"):
        try:
            text = names.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8":
            return encoding
        others = [character for character in text if not character.isascii()]
        seconds = [character.encode(encoding)[-1] for character in others]
        if all(JAPANESE.fullmatch(character) for character in others) and max(seconds, default=0) >= 0x80:
            return encoding
    return "cp437"
