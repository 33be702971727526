"""What a data set consists of, found out by one process for all, and kept in a file for the next start.

A *finding* is plain data about files: their names and sizes, their classes, where samples are in an archive. It has
*witnesses*, the files and folders that it was read from. It is used again while the system reports the same size and
time of last change (ctime) for each of them. Adding, removing or renaming a file changes its folder; so a folder with a
million files is checked by its folders, and by some of the files, spread evenly.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from .files import write_text
from .processes import Processes

T = TypeVar("T")

LISTING = "data_listing.json"
"""Name of the file in a run folder."""
VERSION = 1
"""Version of what findings contain."""
SETTLED = 2 * 10**9
"""Nanoseconds for which a witness must not have changed before it was read. Later changes have another time, whatever
the clock of the file system can tell apart."""
CHECKED = 4096
"""Files of a folder that are witnesses of their sizes; all of them if there are fewer."""


class Listings:
    """Findings of this start and of earlier ones.

    With processes, all of them call `find` and `share` in the same order: the first one looks, the others receive.
    """

    def __init__(self, processes: Processes | None = None, file: Path | None = None):
        """file: where an earlier start wrote its findings, and `write` will. None: nothing is kept."""
        self.processes, self.file = processes, file
        self.earlier: dict[str, Any] = {}
        self.found: dict[str, Any] = {}
        """Findings of this start, by key, with their witnesses."""
        if file is not None and (processes is None or processes.is_main):
            with suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(file.read_text(encoding="utf-8"))
                self.earlier = dict(content["findings"]) if content["version"] == VERSION else {}

    @property
    def kept(self) -> bool:
        """Whether findings are kept, so that it pays to find out at once what only some uses need."""
        return self.file is not None

    def find(self, key: Sequence[object], look: Callable[[], tuple[T, Iterable[str | Path] | None]]) -> T:
        """Return a finding: an earlier one whose witnesses have not changed, else that of `look`.

        look: returns plain data as JSON holds it (lists, not tuples), and the witnesses; None if nothing can witness
        it, then it is not kept. ValueError reaches all processes.
        key: what the finding depends on beside the content of its witnesses.
        """
        return self.share(lambda: self.keep(key, look))

    def keep(self, key: Sequence[object], look: Callable[[], tuple[T, Iterable[str | Path] | None]]) -> T:
        """`find` for this process alone: for a finding that only the first one needs."""
        name = repr(tuple(key))
        finding = self.earlier.get(name)
        if finding is None or not _holds(finding):
            begun = time.time_ns()
            value, witnesses = look()
            if witnesses is None or not self.kept:
                return value
            finding = {"begun": begun, "witnesses": {str(path): _state(path) for path in witnesses}, "value": value}
        self.found[name] = finding
        return cast(T, finding["value"])

    def share(self, look: Callable[[], T]) -> T:
        """Return the result of `look`, which only the first process calls. ValueError reaches all processes."""
        if self.processes is None:
            return look()
        return self.processes.from_main(look)

    def write(self) -> None:
        """Write the findings of this start, in the first process, if one of them is new."""
        if self.file is not None and self.found != self.earlier:
            write_text(self.file, json.dumps({"version": VERSION, "findings": self.found}))
            self.earlier = self.found

    def __reduce__(self) -> tuple[type[Listings], tuple[()]]:
        """A copy in another process, such as a data worker, looks for itself."""
        return Listings, ()


ALONE = Listings()
"""For those who look for themselves and keep nothing."""


def _state(path: str | Path) -> list[int] | None:
    """Return size and time of last change of a file or folder, None if there is none."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return [state.st_size, state.st_ctime_ns]


def _holds(finding: Any) -> bool:
    """Whether no witness of a finding has changed; False also for one that was edited into something else."""
    try:
        return all(
            state is not None and state[1] + SETTLED < finding["begun"] and state == _state(path)
            for path, state in finding["witnesses"].items()
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        return False


def spread(items: Sequence[T], count: int = CHECKED) -> list[T]:
    """Return at most `count` items, spread evenly."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]
