"""The contents of a folder or archive: samples with their classes and captions."""

from __future__ import annotations

from collections.abc import Sequence

from . import captions as texts
from .captions import Captions
from .files import FileSource, at_least_one, class_folders, class_root


class Listing:
    """The samples of a folder or archive, with their classes and captions.

    root: the folder that contains all samples. names: paths below it, sorted; they include missing files that a caption
    table lists, which are bad samples. labels: None without classes. captions: None without captions, or if not
    requested.
    """

    def __init__(self, source: FileSource, field: str, captions: bool = True, column: str | None = None):
        """field: the setting that names the source, for messages. column: caption column of tables."""
        present = set(source.files())
        tables = _caption_tables(source, sorted(present), column) if captions else {}
        names = {name for name in present if source.kind.holds(name)} | {n for rows in tables.values() for n in rows}
        paths = at_least_one(sorted(names), source, field)
        self.root = class_root(paths)
        self.names = [path.removeprefix(self.root) for path in paths]
        self.class_names = class_folders(self.names, source.path / self.root, field, source.kind.noun)
        numbers = {name: i for i, name in enumerate(self.class_names)}
        self.labels = [numbers[name.split("/", 1)[0]] for name in self.names] if numbers else None
        self.captions: Captions | None = None
        if tables:
            cells = {name: row for rows in tables.values() for name, row in rows.items()}
            listed = ", ".join(source.where(table) for table in tables)
            self.captions = texts.TableCaptions(
                [cells.get(path) for path in paths], lambda i: f"{source.where(paths[i])} (by {listed})"
            )
        elif captions and (sidecars := texts.SidecarCaptions(source, paths, present)):
            self.captions = sidecars


def _caption_tables(source: FileSource, present: Sequence[str], column: str | None) -> dict[str, dict[str, list[str]]]:
    """Read all caption tables: table -> sample -> captions; sample names are paths in `source`."""
    tables = {}
    for name in present:
        folder, slash, file = name.rpartition("/")
        if file in texts.TABLES:
            rows = texts.table(source.read(name), file, source.where(name), column)
            if rows is not None:
                tables[name] = {f"{folder}{slash}{sample}": cells for sample, cells in rows.items()}
    if column is not None and not tables:
        raise ValueError(f"data.caption_column: {column!r}, but {source.path} has no {' or '.join(texts.TABLES)}")
    return tables
