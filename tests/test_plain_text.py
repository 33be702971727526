"""Text of any program: encodings, line ends, delimiters."""

from __future__ import annotations

import codecs

import pytest

from unilatent.plain_text import decode, decode_leniently, read_table, split_lines


@pytest.mark.parametrize(
    "raw",
    [
        "größe".encode(), codecs.BOM_UTF8 + "größe".encode(), codecs.BOM_UTF16_LE + "größe".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "größe".encode("utf-16-be"),
    ],
)  # fmt: skip
def test_byte_order_marks_name_the_encoding_and_vanish(raw: bytes):
    assert decode(raw, "x") == decode_leniently(raw) == "größe"


def test_what_is_not_utf_8_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"t\.csv, line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"):
        decode(b"a\r\nb\rcaf\xe9\n", "t.csv")


def test_a_line_in_latin_1_costs_no_other_line():
    assert decode_leniently("µm\n".encode() + b"caf\xe9\n" + "Å".encode()) == "µm\ncafé\nÅ"


def test_only_three_line_ends_end_a_line():
    assert split_lines("a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    assert split_lines("a\u2028b\x85c\x0bd\x0ce\x1cf\n") == ["a\u2028b\x85c\x0bd\x0ce\x1cf"]
    assert split_lines("a\n\n") == ["a", ""] and split_lines("") == [] and split_lines("\n") == [""]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiters_are_told_apart_by_the_header(delimiter: str, end: str):
    text = end.join([f"file{delimiter} text", f'1.png{delimiter}"a, b; c{delimiter}{end}d"', f"2.png{delimiter}x", ""])
    columns, rows = read_table(text, "t.csv")
    assert columns == ["file", "text"]
    assert [row for _, row in rows] == [
        {"file": "1.png", "text": f"a, b; c{delimiter}{end}d"}, {"file": "2.png", "text": "x"}
    ]  # fmt: skip


def test_a_quoted_header_may_hold_other_delimiters():
    columns, _ = read_table('"a,b,c";d\n1;2\n', "t.csv")
    assert columns == ["a,b,c", "d"]


def test_missing_cells_are_empty_and_surplus_ones_are_named():
    _, rows = read_table("a,b\n1\n", "t.csv")
    assert list(rows) == [(2, {"a": "1", "b": ""})]
    _, rows = read_table("a;b\n1;2\n1;2;3\n", "t.csv")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: more cells than the 2 columns .* contain ';' in double"):
        list(rows)
    _, rows = read_table('a,b\n"1,2', "t.csv")
    with pytest.raises(ValueError, match=r"t\.csv, after line 1: unexpected end of data; repair it"):
        list(rows)


def test_an_empty_table_has_no_columns():
    columns, rows = read_table("", "t.csv")
    assert columns == [] and list(rows) == []


def test_a_cell_may_be_long():
    _, rows = read_table("a\n" + "x" * 2**18 + "\n", "t.csv")
    assert len(next(iter(rows))[1]["a"]) == 2**18


@pytest.mark.parametrize("start", ["", "\n\n", "sep=;\r\n", '"sep=;"\n', "\r\n \t\r\nSEP=;\r\r"])
def test_what_stands_before_the_header_is_skipped_and_lines_keep_their_numbers(start: str):
    first = start.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    columns, rows = read_table(f"{start}name;text\r\na;b, c\r\n", "t.csv")
    assert (columns, list(rows)) == (["name", "text"], [(first + 2, {"name": "a", "text": "b, c"})])
    with pytest.raises(ValueError, match=rf"t\.csv, line {first + 2}: more cells than the 2 columns"):
        list(read_table(f"{start}name;text\na;b;c\n", "t.csv")[1])
