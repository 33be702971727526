"""Text and tables from files that people made with any program: encodings, line ends, delimiters.

Only \\n, \\r\\n and \\r end a line. `str.splitlines` also splits at U+2028, U+0085, vertical tabs and form feeds, which
are content.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator

DELIMITERS = (",", ";", "\t")
LINE_END = re.compile("\r\n|\n|\r")
BLANK = r"(?:[ \t]*(?:\r\n|\n|\r))*"
BEFORE_HEADER = re.compile(rf'{BLANK}(?:"?sep=[^\r\n]"?(?:\r\n|\n|\r))?{BLANK}', re.IGNORECASE)
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Byte order mark -> encoding of what follows it."""

csv.field_size_limit(2**24)  # a CIF in a cell is longer than the module's default of 128 KiB


def decode(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one.

    ValueError names `where`, the line and the byte; for text whose meaning matters. See `decode_leniently`.
    """
    encoding, content = _split_mark(raw)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(LINE_END.findall(content[: error.start].decode("latin-1"))) + 1
        raise ValueError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def decode_leniently(raw: bytes) -> str:
    """Decode any bytes: as `decode` does, but a line that is not UTF-8 is read as Latin-1.

    For formats whose numbers and names are ASCII, where a title in another encoding is no reason to lose a record.
    """
    encoding, content = _split_mark(raw)
    if encoding != "utf-8":
        return content.decode(encoding, "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "\n".join(map(_line, content.split(b"\n")))


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends; none for an empty text, and none after a final line end."""
    lines = LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def read_table(text: str, where: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The columns of a table with a header, and its rows with the number of the line they end on.

    Cells are separated by commas, semicolons or tabs, whichever the header uses most; a cell in quotes may hold any of
    them, and line ends. Blank lines before the header, and the line `sep=;` that Excel understands, are skipped.
    ValueError names `where`, the line and what was found.
    """
    before = BEFORE_HEADER.match(text)
    assert before is not None  # it matches nothing too
    skipped = len(LINE_END.findall(before[0]))
    lines = io.StringIO(text[before.end() :], newline="")
    header = LINE_END.split(text[before.end() :], maxsplit=1)[0]
    unquoted = re.sub('"[^"]*"', "", header)
    delimiter = max(DELIMITERS, key=unquoted.count)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
    except csv.Error as error:
        raise ValueError(f"{where}, line {skipped + reader.line_num}: {error}; repair it") from None
    reader.fieldnames = columns

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{where}, line {skipped + reader.line_num}: more cells than the {len(columns)} columns of the "
                        f"header; put cells that contain {delimiter!r} in double quotes"
                    )
                yield skipped + reader.line_num, {key: value or "" for key, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{where}, after line {skipped + reader.line_num}: {error}; repair it") from None

    return columns, rows()


def _split_mark(raw: bytes) -> tuple[str, bytes]:
    """The encoding that a byte order mark names (UTF-8 without one), and the bytes after it."""
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            return encoding, raw[len(mark) :]
    return "utf-8", raw


def _line(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
