"""Text of any program: encodings, line ends, delimiters."""

from __future__ import annotations

import codecs
import unicodedata

import pytest

from unilatent.plain_text import composed, decode, decode_leniently, read_table, same_names, split_lines


@pytest.mark.parametrize(
    "raw",
    [
        "größe".encode(), codecs.BOM_UTF8 + "größe".encode(), codecs.BOM_UTF16_LE + "größe".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "größe".encode("utf-16-be"), codecs.BOM_UTF32_LE + "größe".encode("utf-32-le"),
        codecs.BOM_UTF32_BE + "größe".encode("utf-32-be"),
    ],
)  # fmt: skip
def test_byte_order_marks_name_the_encoding_and_vanish(raw: bytes):
    assert decode(raw, "x") == decode_leniently(raw) == "größe"


def test_what_is_not_utf_8_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"t\.csv, line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"):
        decode(b"a\r\nb\rcaf\xe9\n", "t.csv")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["a\n", "name,text\r\n1,größe\r\n", "x" * 5001, "Кот, пёс и лиса\nдома\n"])
def test_wide_text_without_a_mark_is_refused_or_read(text: str, encoding: str):
    raw = text.encode(encoding)
    name = encoding[:6].upper()
    with pytest.raises(ValueError) as error:
        decode(raw, "t.csv")
    assert str(error.value) == f"t.csv: looks like {name} without a byte order mark; save the file as UTF-8"
    assert decode_leniently(raw) == text


SCRIPTS = {
    "chinese": "文件名,标题\n一只猫坐在一张红色的椅子上\n一条狗\n", "japanese": "赤い椅子の上に猫が座っています\n犬\n",
    "hiragana": "あいう\nえお\nかき\n", "korean": "빨간 의자 위에 앉은 고양이\n개\n", "thai": "แมวนั่งบนเก้าอี้สีแดง\nสุนัข\n",
    "arabic": "قطة على كرسي أحمر\nكلب\n", "hindi": "लाल कुर्सी पर एक बिल्ली\nकुत्ता\n", "greek": "γάτα\nσκύλος\n",
    "russian": "кошкаикотенок\nсобакаищенок\n",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_wide_text_with_little_ascii_is_refused_or_read(script: str, encoding: str):
    for text in (SCRIPTS[script], SCRIPTS[script] * 200):
        raw = text.encode(encoding)
        with pytest.raises(ValueError) as error:
            decode(raw, "t.csv")
        assert str(error.value) == "t.csv: looks like UTF-16 without a byte order mark; save the file as UTF-8"
        assert decode_leniently(raw) == text


@pytest.mark.parametrize(
    ("script", "encoding"),
    [("chinese", "gb18030"), ("japanese", "shift-jis"), ("japanese", "euc-jp"), ("korean", "euc-kr"),
     ("thai", "tis-620"), ("arabic", "cp1256"), ("greek", "cp1253"), ("russian", "cp1251"), ("russian", "koi8-r")],
)  # fmt: skip
def test_older_encodings_are_not_taken_for_wide_text(script: str, encoding: str):
    for end in (b"", b"\0", b"\n\0", b"\0\0"):
        raw = SCRIPTS[script].encode(encoding, "ignore") + end
        with pytest.raises(ValueError, match=r"t\.csv, line \d: byte 0x\w\w is not UTF-8; save the file as UTF-8"):
            decode(raw, "t.csv")


@pytest.mark.parametrize(
    "raw", [b"cats\n\0", b"cat\n\0dog\n\0", "größe\n\0".encode(), "猫\n\0".encode(), b"caf\xe9\n\0"]
)
def test_strings_of_c_are_not_wide_text(raw: bytes):
    assert decode_leniently(raw) in (raw.decode("latin-1"), raw.decode("utf-8", "replace"))


def test_one_line_of_ideographs_cannot_be_told_and_is_not_guessed():
    with pytest.raises(ValueError, match=r"line 1: byte 0x\w\w is not UTF-8; save the file as UTF-8"):
        decode("猫和狗".encode("utf-16-le"), "t.csv")


@pytest.mark.parametrize("apart", ["Café", "Zürich", "가방", "ỗ"])
def test_names_with_accents_apart_are_the_same_names(apart: str):
    apart, together = unicodedata.normalize("NFD", apart), unicodedata.normalize("NFC", apart)
    assert apart != together and composed(apart) == together
    assert same_names(("a", apart), (together, "a")) == {"a": "a", apart: together}
    assert same_names((apart,), (apart,)) == {apart: apart}
    assert same_names((apart, together), (together, apart)) == {apart: apart, together: together}
    assert same_names((apart, "a"), (together,)) is None and same_names(("b",), ("a",)) is None
    assert same_names((apart, together), ("a", together)) is None and same_names(("a", "a"), ("a", "a")) is None


@pytest.mark.parametrize("raw", [b"cat\0", b"cat\0\0\0\0\0", b"a" * 40 + b"\0b\0" + b"c" * 40])
def test_a_few_nul_bytes_are_no_wide_text(raw: bytes):
    assert decode(raw, "x") == decode_leniently(raw) == raw.decode()


def test_a_half_character_of_utf_16_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"t\.csv, line 2: byte 0x62 is not UTF-16; save the file as UTF-8"):
        decode(codecs.BOM_UTF16_LE + "a\n".encode("utf-16-le") + b"b", "t.csv")


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
