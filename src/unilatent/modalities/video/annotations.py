"""Names of videos that mean something, and tables that list videos with their classes: UCF-101, Kinetics,
Something-Something."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...plain_text import count_of, decode, read_table
from .._media.captions import TableCaptions
from .._media.collection import FileCollection
from .._media.files import one_line

UCF = re.compile(r"(v_.+_g\d+)_c\d+")
"""A clip of UCF-101: v_CLASS_gGROUP_cCLIP; the clips of a group are cut from one video."""
KINETICS = re.compile(r"([\w-]{11})_\d{6}_\d{6}")
"""A clip of Kinetics: the YouTube id, first and last second."""
NAMES = ("file_name", "filename", "video_path", "path", "video", "id")
LABELS = ("label", "class", "class_name", "action")
FIELD = "data.annotations"


def source_of(name: str) -> str:
    """Return what a clip was cut from, by its name: a group of UCF-101, a video of Kinetics, or else itself."""
    folder, _, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    if match := UCF.fullmatch(stem):
        return f"{folder}/{match[1]}"
    match = KINETICS.fullmatch(stem)
    return match[1] if match else name


@dataclass(frozen=True)
class _Row:
    """A line of a table. names: stems of files, the first that exists is meant. label: the class. text: a caption."""

    names: tuple[str, ...]
    label: str | None
    text: str | None = None


def annotate(collection: FileCollection, path: str | Path, captions: bool) -> list[int]:
    """Give the videos of a collection the classes (and captions) of a table; return the numbers of those it lists.

    ValueError if the table cannot be read, or lists none of them.
    """
    path = Path(path).expanduser()
    rows = collection.listings.share(lambda: _rows(path))
    places = _places(collection.names)
    listed: dict[int, _Row] = {}
    missing: list[str] = []
    for row in rows:
        found = next((places[name] for name in row.names if name in places), None)
        if found is None:
            missing.append(row.names[0])
            continue
        if len(found) > 1:
            two = " and ".join(collection.names[number] for number in found[:2])
            raise ValueError(
                f"{FIELD}: {path}: {row.names[0]} may be {two}; list videos by their paths below the folder"
            )
        if (other := listed.get(found[0])) is not None and other != row:
            name = collection.names[found[0]]
            raise ValueError(f"{FIELD}: {path}: lists {name} twice, differently; remove one line")
        listed[found[0]] = row
    if not listed:
        raise ValueError(
            f"{FIELD}: {path}: not one of the {len(rows):,} videos that it lists is in {collection.source.path}; the "
            f"first is {missing[0]}"
        )
    known = [row.label for row in listed.values()]
    if all(label is not None for label in known):
        collection.class_names = tuple(sorted({label for label in known if label is not None}))
        numbers = {name: number for number, name in enumerate(collection.class_names)}
        labels = {number: numbers[row.label or ""] for number, row in listed.items()}
        collection.labels, collection.places = [labels.get(i, 0) for i in range(len(collection.names))], None
    if captions and any(row.text for row in listed.values()):
        cells = [listed[i].text if i in listed else None for i in range(len(collection.names))]
        collection.captions = TableCaptions(cells, lambda i: f"{collection.where(i)} (by {path})")
    collection.notes = [*collection.notes, *_differences(path, missing, len(rows), len(collection.names), len(listed))]
    return sorted(listed)


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Return what a table may call each video (path, path without suffix, file name, stem) -> the videos it may be.

    A path is one video, also where it is another one's file name.
    """
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        file = name.rpartition("/")[2]
        for key in dict.fromkeys((file, file.rpartition(".")[0])):
            found.setdefault(key, []).append(number)
    for number, name in enumerate(names):
        for key in (name, name.rpartition(".")[0]):
            if "/" in key:
                found[key] = [number]
    return found


def _differences(path: Path, missing: Sequence[str], rows: int, files: int, used: int) -> list[str]:
    lines = []
    if missing:
        lines.append(
            f"{path}: {len(missing):,} of {rows:,} videos that it lists ({100 * len(missing) / rows:.3g} %) do not "
            f"exist, the first is {missing[0]}"
        )
    if used < files:
        lines.append(f"{path}: {files - used:,} of {count_of(files, 'video')} are not in it and are not used")
    return list(map(one_line, lines))


def _rows(path: Path) -> list[_Row]:
    where = f"{FIELD}: {path}"
    try:
        text = decode(path.read_bytes(), where)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or 'cannot be read'}; give a .csv or .json") from None
    rows = _json_rows(text, where) if path.suffix.lower() == ".json" else _table_rows(text, where)
    if not rows:
        raise ValueError(f"{where}: lists no videos; give a table with a line for each")
    return rows


def _json_rows(text: str, where: str) -> list[_Row]:
    """Something-Something: a list of {"id", "label", "template"}."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON text ({error}); copy it again") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) and "id" in row for row in content):
        raise ValueError(f'{where}: not a list of {{"id", "label", "template"}}; give Something-Something\'s file')
    rows = []
    for row in content:
        template, label = _text(row.get("template")), _text(row.get("label"))
        name = template.replace("[", "").replace("]", "") if template else label
        rows.append(_Row((str(row["id"]),), name, label if template else None))
    return rows


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _table_rows(text: str, where: str) -> list[_Row]:
    """Kinetics' columns (label, youtube_id, time_start, time_end), or one of files and one of classes."""
    columns, lines = read_table(text, where)
    lower = {column.lower().strip(): column for column in columns}
    label = next((lower[name] for name in LABELS if name in lower), None)
    name = next((lower[name] for name in NAMES if name in lower), None)
    youtube = lower.get("youtube_id")
    if youtube is None and name is None:
        raise ValueError(
            f"{where}: no column of videos, only {', '.join(columns) or 'nothing'}; call it file_name, or youtube_id "
            "with time_start and time_end"
        )
    rows = []
    for number, line in lines:
        if youtube is not None:
            names = _kinetics_names(line[youtube], line.get(lower.get("time_start", "")),
                                    line.get(lower.get("time_end", "")), f"{where}, line {number}")  # fmt: skip
        else:
            assert name is not None
            said = line[name].strip().removeprefix("./")
            names = (said, Path(said).name, Path(said).stem)
        rows.append(_Row(names, line[label].strip() or None if label else None))
    return rows


def _kinetics_names(youtube: str, start: str | None, end: str | None, where: str) -> tuple[str, ...]:
    youtube = youtube.strip()
    if not start or not end:
        return (youtube,)
    try:
        return (f"{youtube}_{int(float(start)):06d}_{int(float(end)):06d}", youtube)
    except ValueError:
        raise ValueError(f"{where}: time_start {start!r} and time_end {end!r} are not seconds; correct them") from None
