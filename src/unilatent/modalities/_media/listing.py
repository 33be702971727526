"""The contents of a folder or archive: samples with their classes and captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...listings import ALONE, Listings
from ...plain_text import composed
from . import captions as texts
from .captions import Captions
from .files import FileSource, at_least_one, class_folders, class_root, lone_class, one_line


class Listing:
    """The samples of a folder or archive, with their classes and captions.

    root: the folder that contains all samples. names: paths below it, sorted; they include missing files that a caption
    table lists, which are bad samples. labels: None without classes. captions: None without captions, or if not
    requested. notes: what was found and is not used, one line each. hints: as in `Dataset`. stamps: `FileSource.stamp`
    of each sample, None if they have not been asked for. listings: who looks, and where it is kept.
    """

    def __init__(
        self, source: FileSource, field: str, captions: bool = True, column: str | None = None,
        listings: Listings = ALONE,
    ):  # fmt: skip
        """field: the setting that names the source, for messages. column: caption column of tables."""
        key = ("files", str(source.path.absolute()), source.kind.suffixes, captions, column)
        found = listings.find(key, lambda: _look(source, field, captions, column, listings.kept))
        source.use(found["directory"])
        self.root: str = found["root"]
        self.names: list[str] = found["names"]
        self.labels: list[int] | None = found["labels"]
        self.class_names: tuple[str, ...] = tuple(found["class_names"])
        self.notes: list[str] = found["notes"]
        self.hints: dict[str, str] = found["hints"]
        self.stamps: list[str] | None = found["stamps"]
        self.captions: Captions | None = None
        if found["cells"] is not None:
            listed = ", ".join(source.where(table) for table in found["tables"])
            self.captions = texts.TableCaptions(
                found["cells"], lambda i: f"{source.where(self.root + self.names[i])} (by {listed})"
            )
        elif found["sidecars"] is not None:
            paths = [self.root + name for name in self.names]
            self.captions = texts.SidecarCaptions(source, paths, found["sidecars"], found["sidecar_stamps"])


def _look(
    source: FileSource, field: str, captions: bool, column: str | None, stamped: bool
) -> tuple[dict[str, Any], list[str]]:
    """List a source: the arguments of `Listing` as plain data, and the witnesses.

    stamped: ask for the size of each file too.
    """
    present = set(source.files())
    samples = {name for name in present if source.kind.holds(name)}
    tables = _caption_tables(source, present, column) if captions else {}
    cells = {name: row for rows in tables.values() for name, row in rows.items()}
    paths = at_least_one(sorted(samples | cells.keys()), source, field)
    notes = source.kind.note(source.kind.unread(present), source.path)
    if tables:
        notes += _differences(source, list(tables), samples, cells.keys())
    root, above = class_root(paths), class_root(sorted(samples))
    class_names = class_folders(
        [path.removeprefix(above) for path in sorted(samples)], source.path / above, field, source.kind.noun
    )
    numbers = {name: i for i, name in enumerate(class_names)}
    folders = [path.removeprefix(above).split("/", 1)[0] for path in paths]
    labels = [numbers.get(folder, 0) for folder in folders] if numbers else None
    if not numbers and (alone := lone_class(above)):
        class_names, labels = alone, [0] * len(paths)
    sidecars = texts.sidecars(source, paths, present) if captions and not tables else None
    beside = [name for name in sidecars or () if name is not None]
    directory = source.directory()
    found = {
        "root": root,
        "names": [path.removeprefix(root) for path in paths],
        "labels": labels,
        "class_names": list(class_names),
        "notes": notes,
        "hints": {} if tables else _hints(source, present, captions),
        "tables": list(tables),
        "cells": [cells.get(path) for path in paths] if tables else None,
        "sidecars": sidecars,
        "stamps": [source.stamp(path) for path in paths] if stamped else None,
        "sidecar_stamps": {name: source.stamp(name) for name in beside} if stamped else None,
        "directory": directory,
    }
    others = [str(source.path / name) for name in sorted(present) if name.rpartition("/")[2].lower() in texts.TABLES]
    is_folder = not directory
    return found, [*source.witnesses(sorted([*(samples & set(paths)), *beside])), *(others if is_folder else ())]


def _caption_tables(source: FileSource, present: set[str], column: str | None) -> dict[str, dict[str, list[str]]]:
    """Read all caption tables: table -> sample -> captions; sample names are paths in `source`."""
    tables = {}
    alike = {_key(name): name for name in sorted(present, reverse=True)}
    for name in sorted(present):
        folder, _, file = name.rpartition("/")
        if file.lower() in texts.TABLES:
            rows = texts.table(source.read(name), file, source.where(name), column)
            if rows is not None:
                above = [*source.path.resolve().parts, *folder.split("/")] if folder else source.path.resolve().parts
                tables[name] = {
                    _found(sample, folder, above, present, alike): cells for sample, cells in rows.items()
                }  # fmt: skip
    if column is not None and not tables:
        found = _hints(source, present, captions=True).get(texts.ARGUMENT)
        raise ValueError(
            f"data.caption_column: {column!r}, but {source.path} has no {' or '.join(texts.TABLES)}"
            + (f"; {found}" if found else "; add one, or leave data.caption_column out")
        )
    return tables


def _hints(source: FileSource, present: set[str], captions: bool) -> dict[str, str]:
    """Name a file that looks like a table of captions or labels and is not read as one, as `Dataset.hints`."""
    others = (
        name for name in sorted(present)
        if not source.kind.holds(name) and texts.OTHER_TABLE.fullmatch(name.rpartition("/")[2].lower())
    )  # fmt: skip
    name = next(others, None)
    if name is None:
        return {} if captions else {texts.ARGUMENT: "data.captions is false"}
    where = source.where(name)
    if not captions:
        hint = "data.captions is false"
    elif name.rpartition("/")[2].lower() in texts.TABLES:
        hint = f"{where} has no column of captions: call it text, or name it in data.caption_column"
    else:
        hint = f"{where} is not read: call it {', '.join(texts.TABLES[:-1])} or {texts.TABLES[-1]}, by what it holds"
    return {texts.ARGUMENT: hint, "labels": f"{where} is not read for classes"}


def _found(sample: str, folder: str, above: Sequence[str], present: set[str], alike: dict[str, str]) -> str:
    """Return the path of a file that a table in `folder` lists.

    That is the name below the folder. If there is no such file, names that differ in case or in how accents are
    written are tried, and names that begin with the table's own folder (train/1.png in train/metadata.csv). above: the
    parts of the path of the table's folder. alike: files by `_key`.
    """
    parts = sample.split("/")
    starts = [0, *(n for n in range(1, len(parts)) if tuple(parts[:n]) == tuple(above[-n:]))]
    paths = ["/".join([*([folder] if folder else []), *parts[start:]]) for start in starts]
    for path in paths:
        if path in present:
            return path
    return next((alike[_key(path)] for path in paths if _key(path) in alike), paths[0])


def _key(name: str) -> str:
    """Return what is equal for names that Windows and macOS take for the same."""
    return composed(name).casefold()


def _differences(source: FileSource, tables: list[str], samples: set[str], listed: Iterable[str]) -> list[str]:
    """Return how caption tables and samples differ, one line each; ValueError if they have nothing in common."""
    listed = set(listed)
    table, noun = source.where(tables[0]), source.kind.noun
    missing, without = sorted(listed - samples), sorted(samples - listed)
    if listed and len(missing) == len(listed):
        folder = tables[0].rpartition("/")[0]
        raise ValueError(
            f"{table}: not one of the {len(listed):,} files that it lists exists, the first is "
            f"{missing[0].removeprefix(f'{folder}/')}; file_name is relative to the folder of the table, with the "
            f"ending of the {noun}"
        )
    lines = []
    if missing:
        share = 100 * len(missing) / len(listed)
        lines.append(
            f"{table}: {len(missing):,} of the {len(listed):,} files that it lists ({share:.3g} %) do not exist or are "
            f"no {noun}s, the first is {missing[0]}"
        )
    if without:
        share = 100 * len(without) / len(samples)
        lines.append(
            f"{table}: {len(without):,} of {len(samples):,} {noun}s ({share:.3g} %) are not in it, the first is "
            f"{without[0]}; they have no caption and are not used"
        )
    return list(map(one_line, lines))
