"""Systems that belong on one side of a split: the steps of a relaxation, and the frames of a trajectory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from .systems import System, Systems

WORDS = (
    "poscar", "initial", "init", "start", "before", "unrelaxed", "unoptimized", "unoptimised", "contcar", "final",
    "end", "after", "relaxed", "optimized", "optimised", "opt",
)  # fmt: skip
"""Words in names of files that say which step of a relaxation a file is; that of the first step first."""
STEP = re.compile(
    rf"(?<![a-z0-9])(poscar|contcar|(?:{'|'.join(word for word in WORDS if 'car' not in word)})(?![a-z0-9]))",
    re.IGNORECASE,
)
FRAME = re.compile(r"(.*/)?([^/]+?)[:#](\d+)(?: (.*))?", re.ASCII | re.DOTALL)
"""Name of a record of a file with several: file and number, then its title if it has one."""
Alike = Callable[[System, System], bool]
"""Whether two systems with the same elements in the same order are geometries of one molecule or crystal."""


def relaxations(systems: Systems) -> list[str]:
    """Return the titles of systems, or else their names, where all steps of one relaxation have that of the first.

    Steps are files of the same elements whose names differ in WORDS: POSCAR and CONTCAR, a_initial and a_relaxed, or a
    and a_relaxed.
    """
    names = [title_of(name) for name in systems.names]
    groups = list(names)
    found = {row: match for row, name in enumerate(names) if (match := STEP.search(name))}
    if not found:
        return groups
    keys = {_without_steps(names[row]) for row in found}
    steps: dict[tuple[str, bytes], list[tuple[int, int]]] = {}
    for row, name in enumerate(names):
        if (key := _without_steps(name)) in keys:
            rank = WORDS.index(found[row][1].lower()) if row in found else -1
            steps.setdefault((key, np.sort(systems[row].types).tobytes()), []).append((rank, row))
    for members in steps.values():
        if len({rank for rank, _ in members}) > 1:
            first = min(members)[1]
            for _, row in members:
                groups[row] = names[first]
    return groups


def _without_steps(name: str) -> str:
    parts = (re.sub(r"[._\-\s]+", "_", STEP.sub("_", part)).strip("_") for part in name.lower().split("/"))
    return "/".join(part for part in parts if part)


def trajectories(systems: Systems, alike: Alike) -> list[range]:
    """Return runs of successive records of one file that are geometries of one molecule or crystal.

    A file counts only if most of its records are in such runs. In others, two neighbours are alike by accident.
    """
    files = [file_of(name) for name in systems.names]
    starts = systems.starts

    def types(row: int) -> np.ndarray:
        return systems.types[starts[row] : starts[row + 1]]

    def follows(row: int, first: int) -> bool:
        """Whether a record is another geometry of the one before it, or of the first of its run."""
        if files[row] is None or files[row] != files[row - 1] or not np.array_equal(types(row), types(row - 1)):
            return False
        one = systems[row]
        return alike(systems[row - 1], one) or (first != row - 1 and alike(systems[first], one))

    cuts = [0]
    for row in range(1, len(systems)):
        if not follows(row, cuts[-1]):
            cuts.append(row)
    runs = [range(a, b) for a, b in pairwise([*cuts, len(systems)]) if b - a > 1]
    records, inside = Counter(files), Counter[str | None]()
    for run in runs:
        inside[files[run[0]]] += len(run)
    return [run for run in runs if 2 * inside[files[run[0]]] > records[files[run[0]]]]


def file_of(name: str) -> str | None:
    """Return the file of a record's name, without its suffix; None of a file with one record."""
    match = FRAME.fullmatch(name)
    return (match[1] or "") + match[2] if match else None


def title_of(name: str) -> str:
    """Return the title of a record's name without its place in a file; a name without a title as it is."""
    match = FRAME.fullmatch(name)
    return match[4] if match and match[4] else name


def changed(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean relative difference of two tables of distances; 0 if they are empty."""
    known = np.isfinite(a) & np.isfinite(b) & (np.maximum(a, b) > 0)
    return float((np.abs(a - b)[known] / np.maximum(a, b)[known]).mean()) if known.any() else 0.0
