"""Text and tables from files that people made with any program: encodings, line ends, delimiters.

Only \\n, \\r\\n and \\r end a line. `str.splitlines` also splits at U+2028, U+0085, vertical tabs and form feeds, which
are content.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

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


def composed(text: str) -> str:
    """Return a text with its accents composed: systems store one name in different ways (macOS apart, others not)."""
    return unicodedata.normalize("NFC", text)


def same_names(names: Sequence[str], others: Sequence[str]) -> dict[str, str] | None:
    """Return which of `others` each name is, as it is or else with its accents composed.

    None unless both are the same names, each once, in any order.
    """
    if set(names) == set(others):
        return {name: name for name in names} if len(set(names)) == len(names) == len(others) else None
    by_composed = {composed(other): other for other in others}
    if len(by_composed) < len(others) or sorted(by_composed) != sorted(map(composed, names)):
        return None
    return {name: by_composed[composed(name)] for name in names}


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 shard", "1,200 shards", "2 classes". plural: of words that take no s."""
    return f"{number:,} {noun if number == 1 else plural or noun + ('es' if noun.endswith('ss') else 's')}"


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
    """Return UTF-16's or UTF-32's name if a text is that; None for other text.

    It is if its NUL bytes alternate as theirs do (one NUL byte, as after a string of C, is no sign of it), or if it has
    few letters of ASCII, but reads as another script with wide spaces or line ends. Without any of these, UTF-16 cannot
    be told from older encodings of the same scripts.
    """
    seen = raw[: min(SEEN, len(raw)) // 4 * 4] or raw
    if seen.count(0) >= 2:
        places = [seen[start::4].count(0) * 4 for start in range(4)]  # of the 4 bytes of a UTF-32 character
        if min(places[2:]) >= len(seen) > places[0] * 2:
            return "utf-32-le"
        if min(places[:2]) >= len(seen) > places[3] * 2:
            return "utf-32-be"
        even, odd = seen[::2].count(0), seen[1::2].count(0)
        if not min(even, odd) and max(even, odd) * 8 >= len(seen):
            return "utf-16-le" if odd else "utf-16-be"
    if 0 not in seen or len(raw) % 2:
        return None
    return next((encoding for encoding in ("utf-16-le", "utf-16-be") if _reads_as(raw[:SEEN], encoding)), None)


def _reads_as(raw: bytes, encoding: str) -> bool:
    """Whether bytes are a text in one script in this encoding of UTF-16, with wide line ends and spaces."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(raw)
    except UnicodeDecodeError:
        return False
    plain = sum(character < "\x7f" and (character.isprintable() or character in "\t\r\n") for character in text)
    scripts = Counter(map(_script, (c for c in text if c > "\x7f" and unicodedata.category(c)[0] in "LM")))
    other = sum(unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") for character in text) - sum(
        map(text.count, "\t\r\n")
    )
    ends = text.count("\n")
    if other or not plain or not scripts or scripts.most_common(1)[0][1] < 0.9 * scripts.total():
        return False
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(raw):  # not only a character that SEEN cuts
            return 2 * (ends + text.count(" ")) >= raw.count(b"\n") + raw.count(b" ")
    return ends >= 2 and ends == raw.count(b"\n")  # UTF-8 too: hiragana may be


def _script(character: str) -> str:
    """The script of a letter, by the first word of its name; the scripts of Japanese and Chinese count as one."""
    word = unicodedata.name(character, "?").partition(" ")[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "FULLWIDTH") else word


def _line(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
