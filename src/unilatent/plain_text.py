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
MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
"""Byte order mark -> encoding of what follows it. UTF-32 comes first: its little-endian mark begins with UTF-16's."""
SEEN = 4096
"""So many bytes tell whether a text without a byte order mark is UTF-16 or UTF-32."""

csv.field_size_limit(2**24)  # a CIF in a cell is longer than the module's default of 128 KiB


def decode(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one.

    ValueError names `where`, the line and the byte; for text whose meaning matters. See `decode_leniently`.
    """
    encoding, content = _split_mark(raw)
    if encoding is None and (wide := _without_mark(content)):
        name = wide[: len("utf-16")].upper()
        raise ValueError(f"{where}: looks like {name} without a byte order mark; save the file as UTF-8")
    encoding = encoding or "utf-8"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("latin-1" if encoding == "utf-8" else encoding, "replace")
        name = encoding.removesuffix("-le").removesuffix("-be").upper()
        raise ValueError(
            f"{where}, line {len(LINE_END.findall(before)) + 1}: byte 0x{content[error.start]:02x} is not {name}; "
            "save the file as UTF-8"
        ) from None


def decode_leniently(raw: bytes) -> str:
    """Decode any bytes: as `decode` does, but a line that is not UTF-8 is read as Latin-1, and UTF-16 and UTF-32 need
    no byte order mark.

    For formats whose numbers and names are ASCII, where a title in another encoding is no reason to lose a record.
    """
    encoding, content = _split_mark(raw)
    encoding = encoding or _without_mark(content) or "utf-8"
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


def _split_mark(raw: bytes) -> tuple[str | None, bytes]:
    """The encoding that a byte order mark names (None without one), and the bytes after it."""
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            return encoding, raw[len(mark) :]
    return None, raw


def _without_mark(raw: bytes) -> str | None:
    """Return UTF-16's or UTF-32's name if the NUL bytes of a text alternate as theirs do; None for other text.

    One NUL byte, as after a string of C, is no sign of it.
    """
    seen = raw[: min(SEEN, len(raw)) // 4 * 4] or raw
    if seen.count(0) < 2:
        return None
    places = [seen[start::4].count(0) * 4 for start in range(4)]  # of the 4 bytes of a UTF-32 character
    if min(places[2:]) >= len(seen) > places[0] * 2:
        return "utf-32-le"
    if min(places[:2]) >= len(seen) > places[3] * 2:
        return "utf-32-be"
    even, odd = seen[::2].count(0), seen[1::2].count(0)
    if min(even, odd) or max(even, odd) * 8 < len(seen):
        return None
    return "utf-16-le" if odd else "utf-16-be"


def _line(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
