"""Captions of samples: from files next to them, from a table, or from class names in templates."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...maths.streams import seed_of
from ...plain_text import decode, read_table, split_lines
from ..base import BadSample
from .files import FileSource

ARGUMENT = "prompts"
"""The condition argument that captions are values of."""
COLUMNS = re.compile("text|captions?|prompt")
"""Default names of caption columns."""
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
"""File names of caption tables, in lower case."""
OTHER_TABLE = re.compile(
    r"[^/]*\.(csv|tsv|jsonl|parquet|xlsx?)|(captions?|prompts?|texts?|labels?|metadata|annotations?|train|index)\.(txt|json)"
)
"""Names, in lower case, of files that look like tables of captions or labels."""
SIDECARS = ("txt", "json")
"""Suffixes of caption files next to a sample, in order of precedence."""
FILE_NAME = "file_name"
"""Column of a caption table with the names of the files, in lower case."""
LARGEST = 2**20
"""Largest size of a caption file, in bytes."""
SHOWN = 8
"""Number of captions in the facts of a data set."""
WAY_OUT = "write one, remove the image, or leave captions out with data.captions=false"


class Captions(ABC):
    """The captions of the samples of a collection, by index."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[str, ...]:
        """Return one or more captions; BadSample if there is none or it cannot be read."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Return the captions' part of the data fingerprint."""


def chosen(captions: Sequence[str], *key: int | str) -> str:
    """Return one of the captions, a pure function of the key."""
    return captions[seed_of("caption", *key) % len(captions)]


def facts(captions: Captions, indices: Sequence[int]) -> dict[str, Any]:
    """Return the facts about captions for `Dataset.facts`: the captions of a few samples, as example prompts."""
    examples: list[str] = []
    for index in indices:
        try:
            examples.append(captions[index][0])
        except BadSample:
            continue
    return {"examples": tuple(dict.fromkeys(examples))}


# ---- one file ------------------------------------------------------------------------------------------------------


def of_file(raw: bytes, suffix: str, where: str) -> tuple[str, ...]:
    """Read captions from a .txt, one per line, or a .json with "caption" (a text) or "captions" (a list).

    BadSample names `where` if there are none.
    """
    if len(raw) > LARGEST:
        raise BadSample(f"caption {where}: {len(raw):,} bytes, more than {LARGEST:,}; make it shorter")
    text = _decoded(raw, f"caption {where}")
    captions = of_value(_json_value(text, where), where) if suffix == "json" else _cleaned(split_lines(text))
    if not captions:
        raise BadSample(f"caption {where}: empty; {WAY_OUT}")
    return captions


def of_value(value: object, where: str) -> tuple[str, ...]:
    """Read captions from a table cell, a text or a list of texts; none if it is empty. BadSample names `where`."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BadSample(f"caption {where}: {type(value).__name__}, not a text or a list of texts; {WAY_OUT}")
    return _cleaned(texts)


def has_captions(raw: bytes) -> bool:
    """Whether a .json has captions; many have other facts about a sample."""
    try:
        content = json.loads(decode(raw, ""))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and ("caption" in content or "captions" in content)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return decode(raw, where)
    except ValueError as error:
        raise BadSample(f"{error}, or remove it") from None


def _json_value(text: str, where: str) -> object:
    """Return the value of "captions" or "caption"; BadSample if it is not JSON or has neither."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption {where}: not valid JSON ({error}); {WAY_OUT}") from None
    if not isinstance(content, dict) or not ("caption" in content or "captions" in content):
        raise BadSample(f'caption {where}: needs {{"caption": ...}} or {{"captions": [...]}}; {WAY_OUT}')
    return content.get("captions", content.get("caption"))


def _cleaned(texts: Sequence[str]) -> tuple[str, ...]:
    """Strip texts and drop empty ones. Zero bytes become spaces, because they end a text that is stored as bytes."""
    return tuple(stripped for text in texts if (stripped := text.replace("\0", " ").strip()))


# ---- sources -------------------------------------------------------------------------------------------------------


class TemplateCaptions(Captions):
    """The name of a sample's class inserted in templates: "a photo of a {}"."""

    def __init__(
        self, templates: Sequence[str], class_names: Sequence[str], labels: Sequence[int] | None, named: bool = False
    ):  # fmt: skip
        """named: whether the class names come from a setting, not from the data; then the fingerprint includes them."""
        if labels is None:
            raise ValueError(
                "data.caption_template: needs classes, but the data has none; give class folders, or leave it out"
            )
        self.templates, self.labels = tuple(templates), labels
        self.class_names = tuple(name.replace("_", " ") for name in class_names)
        self.key = repr((self.templates, self.class_names) if named else self.templates)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        name = self.class_names[self.labels[index]]
        return tuple(template.replace("{}", name) for template in self.templates)

    def stamp(self, index: int) -> str:
        return self.key


def sidecars(files: FileSource, names: Sequence[str], present: set[str]) -> list[str | None] | None:
    """Return the caption file of each sample, None where there is none; None if no sample has one.

    names: paths of the samples in `files`; present: paths of all its files.
    """
    found: dict[tuple[str, str], str] = {}  # path without ending, ending in lower case -> path
    for path in sorted(present):
        stem, _, end = path.rpartition(".")
        if end.lower() in SIDECARS:
            found[stem, end.lower()] = path
    stems = [name.rpartition(".")[0] for name in names]
    beside = [next((found[stem, end] for end in SIDECARS if (stem, end) in found), None) for stem in stems]
    used = any(name is not None and (name.lower().endswith(".txt") or _may_have(files, name)) for name in beside)
    return beside if used else None


def _may_have(files: FileSource, name: str) -> bool:
    try:
        return has_captions(files.read(name))
    except BadSample:  # reported when this sample is read
        return True


class SidecarCaptions(Captions):
    """A file of the same name next to each sample: `cat/7.txt`, one caption per line, or `cat/7.json`."""

    def __init__(
        self, files: FileSource, names: Sequence[str], beside: Sequence[str | None],
        stamps: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """names: paths of the samples in `files`; beside: their caption files; stamps: of these, if known."""
        self.files, self.names, self.sidecars, self.stamps = files, names, beside, stamps

    def __getitem__(self, index: int) -> tuple[str, ...]:
        name = self.sidecars[index]
        if name is None:
            sample = self.names[index]
            stem = sample.rpartition("/")[2].rpartition(".")[0]
            noun = self.files.kind.noun
            raise BadSample(f"{noun} {self.files.where(sample)}: no caption file {stem}.txt; {WAY_OUT}")
        return of_file(self.files.read(name), name.rpartition(".")[2].lower(), self.files.where(name))

    def stamp(self, index: int) -> str:
        name = self.sidecars[index]
        if name is None:
            return ""
        return self.files.stamp(name) if self.stamps is None else self.stamps[name]


class TableCaptions(Captions):
    """Captions from a table: one cell per sample; None for samples without a row."""

    def __init__(self, cells: Sequence[object], where: Callable[[int], str]):
        self.cells, self.where = cells, where

    def __getitem__(self, index: int) -> tuple[str, ...]:
        captions = of_value(self.cells[index], self.where(index))
        if not captions:
            raise BadSample(f"image {self.where(index)}: no caption; {WAY_OUT}")
        return captions

    def stamp(self, index: int) -> str:
        return hashlib.sha256(repr(self.cells[index]).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def table(raw: bytes, name: str, where: str, column: str | None) -> dict[str, list[str]] | None:
    """Parse `metadata.csv`, `.tsv` or `.jsonl` as Hugging Face's imagefolder does: file -> captions.

    column: of the captions; None: the first one that matches COLUMNS. Returns None if no column matches. File names are
    relative to the table's folder, with forward slashes. ValueError if the table cannot be read, or a file name leads
    out of its folder.
    """
    rows = _table_rows(raw, name, where)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    file_column = next((key for key in columns if key.lower() == FILE_NAME), None)
    if not rows:
        raise ValueError(f"{where}: no rows; fill it, or remove it")
    if file_column is None:
        raise ValueError(
            f"{where}, line 1: no column {FILE_NAME}, only {_quoted(columns)}; give the column with the names of the "
            "files this name"
        )
    if column is not None and column not in columns:
        raise ValueError(f"data.caption_column: {column!r} is not in {where}; there are {', '.join(columns)}")
    column = column or next((key for key in columns if COLUMNS.fullmatch(key.lower())), None)
    if column is None:
        return None
    captions: dict[str, list[str]] = {}
    for line, row in rows:
        file = row.get(file_column)
        if not isinstance(file, str) or not file.strip():
            raise ValueError(f"{where}, line {line}: no {FILE_NAME}; name the file, or remove the line")
        file = file.strip().replace("\\", "/")
        if file.startswith("/") or re.match("[A-Za-z]:", file) or ".." in file.split("/") or "\0" in file:
            raise ValueError(
                f"{where}, line {line}: {FILE_NAME} {file!r} leads out of the folder; name a file inside it"
            )
        if any("\ud800" <= character <= "\udfff" for character in file):
            raise ValueError(f"{where}, line {line}: {FILE_NAME} {file!r} is no text; correct it")
        try:
            texts = of_value(row.get(column), f"{where}, line {line}")
        except BadSample as error:
            raise ValueError(str(error)) from None
        captions.setdefault("/".join(part for part in file.split("/") if part not in ("", ".")), []).extend(texts)
    return captions


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join(column if len(column) < 80 else f"{column[:80]}..." for column in columns) or "nothing"


def _table_rows(raw: bytes, name: str, where: str) -> list[tuple[int, dict[str, object]]]:
    """Return line number and cells of each row."""
    text = decode(raw, where)
    if name.lower().endswith(".jsonl"):
        return _jsonl(text, where)
    _, rows = read_table(text, where)
    return [(line, dict(row)) for line, row in rows]


def _jsonl(text: str, where: str) -> list[tuple[int, dict[str, object]]]:
    rows = []
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}, line {number}: not valid JSON ({error}); correct it") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}, line {number}: {type(row).__name__}, not an object; correct it")
        rows.append((number, row))
    return rows
