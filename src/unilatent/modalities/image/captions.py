"""Captions of pictures: files beside them, a table of the folder, or class names put into templates."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ...maths.streams import seed_of
from ..base import BadSample

ARGUMENT = "prompts"
"""The condition argument that captions answer to."""
COLUMNS = re.compile("text|captions?|prompt")
"""Columns that hold captions where nobody names one."""
TABLES = ("metadata.csv", "metadata.jsonl")
BESIDE = ("txt", "json")
"""Suffixes of files beside a picture, in the order in which they are looked for."""
LARGEST = 2**20
"""Bytes of a file of captions."""
SHOWN = 8
WAY_OUT = "write one, remove the picture, or leave captions out with data.captions=false"


class Captions(ABC):
    """Of every picture of a collection, by its index."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[str, ...]:
        """One or more; BadSample if there is none, or it cannot be read."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Part of the fingerprint."""


def chosen(captions: Sequence[str], *key: int | str) -> str:
    """One of several, a pure function of the key."""
    return captions[seed_of("caption", *key) % len(captions)]


def facts(captions: Captions, indices: Sequence[int]) -> dict[str, Any]:
    """What the data knows about its captions: those of a few pictures, as examples of what can be asked for."""
    found: list[str] = []
    for index in indices:
        try:
            found.append(captions[index][0])
        except BadSample:
            continue
    return {"examples": tuple(dict.fromkeys(found))}


# ---- what one file says --------------------------------------------------------------------------------------------


def of_file(raw: bytes, suffix: str, where: str) -> tuple[str, ...]:
    """Captions of a .txt, one a line, or of a .json: "caption", a text, or "captions", a list; BadSample names it."""
    try:
        text = raw[: LARGEST + 1].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"caption {where}: not UTF-8 (byte {error.start}); save it as UTF-8, or remove it") from None
    if len(raw) > LARGEST:
        raise BadSample(f"caption {where}: {len(raw):,} bytes, more than {LARGEST:,}; make it shorter")
    found = of_value(_said(text, where), where) if suffix == "json" else _cleaned(text.splitlines())
    if not found:
        raise BadSample(f"caption {where}: empty; {WAY_OUT}")
    return found


def of_value(value: object, where: str) -> tuple[str, ...]:
    """Captions in a cell of a table: a text or a list of texts; none where it is empty. BadSample names `where`."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BadSample(f"caption {where}: {type(value).__name__}, not a text or a list of texts; {WAY_OUT}")
    return _cleaned(texts)


def has_captions(raw: bytes) -> bool:
    """Whether a .json speaks of captions at all: many say other things of a sample."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and ("caption" in content or "captions" in content)


def _said(text: str, where: str) -> object:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption {where}: no JSON ({error}); {WAY_OUT}") from None
    if not isinstance(content, dict) or not ("caption" in content or "captions" in content):
        raise BadSample(f'caption {where}: needs {{"caption": ...}} or {{"captions": [...]}}; {WAY_OUT}')
    return content.get("captions", content.get("caption"))


def _cleaned(texts: Sequence[str]) -> tuple[str, ...]:
    """Without blank ones and blanks around; a zero byte ends a text wherever texts are kept as bytes."""
    return tuple(stripped for text in texts if (stripped := text.replace("\0", " ").strip()))


# ---- where they come from ------------------------------------------------------------------------------------------


class Templates(Captions):
    """A class's name in each of some templates: "a photo of a {}"."""

    def __init__(
        self, templates: Sequence[str], class_names: Sequence[str], labels: Sequence[int] | None, named: bool = False
    ):  # fmt: skip
        """named: whether the names come from elsewhere than the data, and belong to the fingerprint."""
        if labels is None:
            raise ValueError(
                "data.caption_template: needs classes to name, and there are none; give class folders, or leave it out"
            )
        self.templates, self.labels = tuple(templates), labels
        self.class_names = tuple(name.replace("_", " ") for name in class_names)
        self.key = repr((self.templates, self.class_names) if named else self.templates)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        name = self.class_names[self.labels[index]]
        return tuple(template.replace("{}", name) for template in self.templates)

    def stamp(self, index: int) -> str:
        return self.key


class Beside(Captions):
    """A file of the same name beside each picture: `cat/7.txt`, one caption a line, or `cat/7.json`."""

    def __init__(self, files: Any, names: Sequence[str], present: set[str]):
        """files: with `read`, `stamp` and `where`; names: of the pictures in it; present: of everything in it."""
        self.files, self.names = files, names
        stems = [name.rpartition(".")[0] for name in names]
        self.found = [next((f"{stem}.{end}" for end in BESIDE if f"{stem}.{end}" in present), None) for stem in stems]

    def __bool__(self) -> bool:
        """Whether there is a caption at all."""
        return any(name is not None and (name.endswith(".txt") or self._speaks(name)) for name in self.found)

    def _speaks(self, name: str) -> bool:
        try:
            return has_captions(self.files.read(name))
        except BadSample:  # said at its turn
            return True

    def __getitem__(self, index: int) -> tuple[str, ...]:
        name = self.found[index]
        if name is None:
            picture = self.names[index]
            stem = picture.rpartition("/")[2].rpartition(".")[0]
            raise BadSample(f"picture {self.files.where(picture)}: no caption beside it ({stem}.txt); {WAY_OUT}")
        return of_file(self.files.read(name), name.rpartition(".")[2], self.files.where(name))

    def stamp(self, index: int) -> str:
        name = self.found[index]
        return "" if name is None else self.files.stamp(name)


class Listed(Captions):
    """A table's: for each picture a cell, or None where the table does not speak of it."""

    def __init__(self, cells: Sequence[object], where: Callable[[int], str]):
        self.cells, self.where = cells, where

    def __getitem__(self, index: int) -> tuple[str, ...]:
        found = of_value(self.cells[index], self.where(index))
        if not found:
            raise BadSample(f"picture {self.where(index)}: no caption; {WAY_OUT}")
        return found

    def stamp(self, index: int) -> str:
        return hashlib.sha256(repr(self.cells[index]).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def table(raw: bytes, name: str, where: str, column: str | None) -> dict[str, list[str]] | None:
    """`metadata.csv` or `metadata.jsonl`, as Hugging Face's imagefolder reads it: file -> captions.

    column: of the captions; None takes the first that COLUMNS knows, and gives None where there is none.
    Files are named from the table's folder. ValueError where the table cannot be read, or leads out of its folder.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}, line {line}: not UTF-8; save it as UTF-8") from None
    rows = _csv(text, where) if name.endswith(".csv") else _jsonl(text, where)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if "file_name" not in columns:
        raise ValueError(f"{where}: no column file_name, only {', '.join(columns) or 'nothing'}; add it")
    if column is not None and column not in columns:
        raise ValueError(f"data.caption_column: {column!r} is not in {where}; there are {', '.join(columns)}")
    column = column or next(filter(COLUMNS.fullmatch, columns), None)
    if column is None:
        return None
    found: dict[str, list[str]] = {}
    for line, row in rows:
        file = row.get("file_name")
        if not isinstance(file, str) or not file:
            raise ValueError(f"{where}, line {line}: no file_name; name the picture, or remove the line")
        if file.startswith(("/", "\\")) or ".." in file.replace("\\", "/").split("/") or "\0" in file:
            raise ValueError(f"{where}, line {line}: file_name {file!r} leads out of the folder; name a file inside it")
        try:
            texts = of_value(row.get(column), f"{where}, line {line}")
        except BadSample as error:
            raise ValueError(str(error)) from None
        found.setdefault(file.replace("\\", "/").removeprefix("./"), []).extend(texts)
    return found


def _csv(text: str, where: str) -> list[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows: list[tuple[int, dict[str, object]]] = [(reader.line_num, dict(row)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{where}, line {reader.line_num}: {error}; mend it") from None
    for line, row in rows:
        if None in row:
            raise ValueError(f"{where}, line {line}: more cells than columns; quote captions that hold commas")
    return rows


def _jsonl(text: str, where: str) -> list[tuple[int, dict[str, object]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}, line {number}: no JSON ({error}); mend it") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}, line {number}: {type(row).__name__}, not an object; mend it")
        rows.append((number, row))
    return rows
