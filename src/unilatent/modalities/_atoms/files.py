"""Source files of systems: finding them in folders and archives, reading them, and splitting .xyz text into frames."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ...plain_text import count_of, decode_leniently, split_lines
from ...zip_names import OPENING_FAILS, members
from . import grouping
from .elements import NUMBERS
from .systems import System

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""CPU cores available to this process."""
MEMBER_BYTES = 2**30
"""The largest unpacked size of one file in an archive."""
SHOWN = 5
"""Files that a message lists."""
SAME = 1e-3
"""Largest difference between coordinates that two files give for the same atom."""
ProgressCallback = Callable[[str, int, int], None]
"""Called with a description, how many more items are done, and the total (0: unknown)."""

LATTICE = re.compile(r"\bLattice\s*=", re.IGNORECASE)
PBC = re.compile(r"\bpbc\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|\[([^\]]*)\]|(\S+))", re.IGNORECASE)
NUMBER = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:(?:[eEdD]|\*\^)[-+]?\d+)?|[-+]?(?:nan|inf|infinity)",
    re.ASCII | re.IGNORECASE,
)  # fmt: skip
"""A number as programs write it: also with Fortran's exponent (1D-3) and Mathematica's (1*^-3)."""
NO_SYSTEMS = frozenset(("cfg", "html", "ini", "ipynb", "jpg", "json", "jsonl", "lock", "md", "pdf", "png", "py",
                        "rst", "sh", "tex", "toml", "txt", "yaml", "yml"))  # fmt: skip
"""Suffixes of files that nobody takes for systems of atoms; all others that are not read are named in a warning."""


@dataclass(frozen=True)
class SystemKind:
    """How the files of one kind of system are recognised, and how messages describe them.

    plural: the name in messages. offline: the values of `data.path` that request a generated set. accepted: the
    accepted files, for messages. form_of: maps a file name without .gz to its form, or to None if it is no such file;
    the form "frame" is .xyz. preferred: forms; of files with the same stem, which hold the same system, those of the
    first form are read, and those of the later forms are skipped. periodic: whether these systems have a lattice.
    max_atoms: larger systems are never read. alike: whether two systems with the same elements in the same order are
    geometries of one molecule or crystal.
    """

    plural: str
    offline: tuple[str, ...]
    accepted: str
    form_of: Callable[[str], str | None]
    preferred: tuple[str, ...]
    periodic: bool
    max_atoms: int
    alike: grouping.Alike

    @property
    def generated(self) -> str:
        """The names of generated sets, in words."""
        return " or ".join(map(repr, self.offline))


@dataclass(frozen=True)
class SourceFile:
    """A file on its own, in a folder or in an archive.

    name: path inside the folder or archive, with forward slashes and without .gz. where: the location for messages.
    form: how the content is to be parsed. content: reads the bytes.
    """

    name: str
    where: str
    form: str
    content: Callable[[], bytes]

    @property
    def stem(self) -> str:
        return _stem(self.name)

    def read(self) -> bytes:
        """Return the content; ValueError says what is wrong, worded to follow `where`."""
        try:
            content = self.content()
        except Exception as error:  # OSError, BadZipFile, zlib.error, RuntimeError when encrypted, ...
            raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
        if not content.strip():
            raise ValueError("is empty")
        return content


def existing(path: Path, kind: SystemKind) -> Path:
    """Return the path with ~ expanded; ValueError if it does not exist."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(
            f"data.path: {path} does not exist; give a file, folder or .zip of {kind.plural}, or {kind.generated} for "
            "generated ones"
        )
    return path


def source_files(path: Path, kind: SystemKind, mixed: bool = False) -> list[SourceFile]:
    """Return the files of this kind at a path, sorted by name; ValueError if there is none.

    Hidden files and the metadata that macOS adds to archives are skipped. mixed: the path may hold files of the other
    kind. Then .xyz files of the other kind are skipped as well, and an empty list is no error.
    """
    files = _recognised(path, kind)
    if mixed:
        files = [file for file in files if file.form != "frame" or _may_be(file, kind)]
    skipped = _skipped(files, kind)
    files = [file for file in files if file.name not in skipped]
    if not files and not mixed:
        unread = unread_files(path, kind)
        raise ValueError(
            f"data.path: {path} holds no {kind.plural}; accepted are {kind.accepted}"
            + (f" ({unread})" if unread else "")
        )
    return files


def _recognised(path: Path, kind: SystemKind) -> list[SourceFile]:
    return [
        SourceFile(bare, where, form, _unpacking(content) if bare != name else content)
        for name, where, content in _visible(path)
        if (form := kind.form_of(bare := _unpacked_name(name)))
    ]


def unread_files(path: Path, kind: SystemKind, parse: Callable[[SourceFile], Sequence[System]] | None = None) -> str:
    """Describe the files at a path that may hold systems and are not read: "not read: 3 .pdb, 1 .cml"; "" if none.

    Files that are skipped for one of the same name are listed too, unless `parse` finds the same systems in both.
    """
    texts = [f"not read: {counted}"] if (counted := counted_files(unread_names(path, kind))) else []
    files = {file.name: file for file in _recognised(path, kind)}
    skipped = sorted(
        name
        for name, other in _skipped(list(files.values()), kind).items()
        if parse is None or not _equal(files[name], files[other], parse)
    )
    if skipped:
        others = f"{len(skipped)} file{'s' * (len(skipped) > 1)} next to another form of the same name"
        texts.append(f"not read: {others}: {', '.join(skipped[:SHOWN])}{', ...' * (len(skipped) > SHOWN)}")
    return "; ".join(texts)


def unread_names(path: Path, kind: SystemKind) -> list[str]:
    """Return the names of the files at a path that may hold systems of any kind, and none of this one."""
    return [name for name, *_ in _visible(path) if kind.form_of(bare := _unpacked_name(name)) is None and _ending(bare)]


def _ending(name: str) -> str:
    """Return what tells the format of a file: ".cif", or "POSCAR"; "" for files that nobody takes for systems."""
    base = PurePosixPath(name).name
    if "." in base:
        suffix = base.lower().rpartition(".")[2]
        return "" if suffix in NO_SYSTEMS else f".{suffix}"
    return next((word for word in ("POSCAR", "CONTCAR") if base.upper().startswith(word)), "")


def counted_files(names: Iterable[str]) -> str:
    """Return counts of files by ending, in words: "4 .pdb, 1 POSCAR"."""
    counts = Counter(_ending(_unpacked_name(name)) for name in names)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common())


def _skipped(files: Sequence[SourceFile], kind: SystemKind) -> dict[str, str]:
    """Return the names of files that are not read, each with that of the file of a preferred form and the same stem."""
    preferred: dict[str, SourceFile] = {}
    ranked = [file for file in files if file.form in kind.preferred]
    for file in sorted(ranked, key=lambda file: kind.preferred.index(file.form)):
        preferred.setdefault(file.stem, file)
    return {file.name: preferred[file.stem].name for file in ranked if file.form != preferred[file.stem].form}


def _equal(file: SourceFile, other: SourceFile, parse: Callable[[SourceFile], Sequence[System]]) -> bool:
    """Whether two files hold the same systems, but for the digits that they write."""
    try:
        pairs = list(zip(parse(file), parse(other), strict=True))
    except Exception:  # a damaged file, or one with more systems
        return False
    return all(np.array_equal(a.types, b.types) and _close(a, b) for a, b in pairs)


def _close(a: System, b: System) -> bool:
    apart = np.asarray(a.coordinates, np.float64) - b.coordinates
    if a.lattice is None or b.lattice is None:
        return a.lattice is b.lattice and bool((np.abs(apart) < SAME).all())
    same_cell = np.allclose(a.lattice, b.lattice, rtol=0, atol=10 * SAME)
    return same_cell and bool((np.abs(apart - np.round(apart)) < SAME).all())


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _unpacked_name(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _visible(path: Path) -> list[tuple[str, str, Callable[[], bytes]]]:
    """As `_listed`, without hidden files and macOS's metadata."""
    return [one for one in _listed(path) if not any(part.startswith((".", "__MACOSX")) for part in one[0].split("/"))]


def _listed(path: Path) -> list[tuple[str, str, Callable[[], bytes]]]:
    """Name, location for messages, and reader of every file at a path."""
    if path.is_dir():
        inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        return [(name, str(file), file.read_bytes) for name, file in inside]
    if path.suffix.lower() != ".zip":
        return [(path.name, str(path), path.read_bytes)]
    try:
        archive = zipfile.ZipFile(path)
    except OPENING_FAILS as error:
        raise ValueError(f"data.path: {path} is not a whole zip archive ({error}); copy or create it again") from None

    def reader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def content() -> bytes:
            if member.file_size > MEMBER_BYTES:
                raise ValueError(f"it unpacks to more than {MEMBER_BYTES >> 20} MiB; unpack it yourself")
            return archive.read(member)

        return content

    inside_zip = sorted((name, member) for name, member in members(archive).items() if not name.endswith("/"))
    return [(name, f"{name} in {path}", reader(member)) for name, member in inside_zip]


def _unpacking(content: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: gzip.decompress(content())


def _may_be(file: SourceFile, kind: SystemKind) -> bool:
    """Whether an .xyz file is of this kind. Unreadable files count, so that parsing reports them."""
    try:
        return is_periodic([*split_lines(decode_leniently(file.read()))[:2], "", ""][1]) == kind.periodic
    except ValueError:
        return True


def number(text: str) -> float | None:
    """Return a number (NUMBER), or None if the text is none."""
    if not NUMBER.fullmatch(text):
        return None
    return float(text.replace("*^", "e").replace("d", "e").replace("D", "e"))


# ---- .xyz ------------------------------------------------------------------------------------------------------------


def is_periodic(comment: str) -> bool:
    """Whether a frame of an .xyz is periodic, by its second line: `Lattice=`, and no `pbc=` that is false for all three
    axes."""
    return LATTICE.search(comment) is not None and any(periodic_axes(comment))


def periodic_axes(comment: str) -> list[bool]:
    """Return what `pbc=` in the second line of a frame says about each axis; all true if it is not there."""
    pbc = PBC.search(comment)
    words = re.findall(r"\w+", next(filter(None, pbc.groups()), "")) if pbc else []
    return [word.lower() in ("t", "true", "1") for word in words] or [True] * 3


def frames(text: str) -> Iterator[list[str] | str]:
    """Yield the lines of each frame of an .xyz: the number of atoms, a comment, and one line per atom.

    A damaged frame is yielded as a string that says what is wrong. The next frame after it begins where a number of
    atoms is followed by a comment and by so many lines of atoms.
    """
    lines = split_lines(text)
    at = _filled(lines, 0)
    while at < len(lines):
        fault = _frame_fault(lines, at)
        if fault is None:
            end = at + 2 + int(lines[at])
            yield lines[at:end]
        else:
            end = next((start for start in range(at + 1, len(lines)) if _is_frame(lines, start)), len(lines))
            yield fault
            # Other frames that are lost in between: a number of atoms, a comment, and at least one atom.
            begin = at + 1 if _count(lines[at]) is None else at + 2
            lost = [i for i in range(begin, end - 2) if _count(lines[i]) and _is_atom(lines[i + 2])]
            yield from (f"line {i + 1}: the frame of {count_of(int(lines[i]), 'atom')} is damaged" for i in lost)
        at = _filled(lines, end)


def _frame_fault(lines: Sequence[str], at: int) -> str | None:
    """Return what is wrong with the frame that begins at a line, or None if it is whole."""
    atoms = _count(lines[at])
    if atoms is None:
        return f"line {at + 1}: {lines[at].strip()[:20]!r} is no number of atoms"
    end = at + 2 + atoms
    if len(lines) < end:
        left = count_of(max(len(lines) - at - 2, 0), "line follows", "lines follow")
        return f"{count_of(atoms, 'atom')} announced, {left}"
    table, after = lines[at + 2 : end], _filled(lines, end)
    short = next((i for i, row in enumerate(table) if len(row.split()) < 4), None)
    if short is not None and any(_is_frame(lines, start) for start in range(at + 1, end)):
        return f"line {at + 3 + short}: {table[short].strip()[:20]!r} is no atom, one of {atoms} announced"
    if after == len(lines) or (short is None and _count(lines[after])) or _is_frame(lines, after):
        return None
    if after == end and _is_atom(lines[after]):
        return f"{count_of(atoms, 'atom')} announced, and line {after + 1} is one more"
    return None


def _is_frame(lines: Sequence[str], at: int) -> bool:
    """Whether a number of atoms is followed by a comment and so many lines of atoms."""
    atoms = _count(lines[at])
    return atoms is not None and 0 < atoms <= len(lines) - at - 2 and all(map(_is_atom, lines[at + 2 : at + 2 + atoms]))


def _count(line: str) -> int | None:
    word = line.strip()
    return int(word) if re.fullmatch(r"\d{1,9}", word, re.ASCII) else None


def _is_atom(line: str) -> bool:
    """Whether a line has a symbol or number of an element, and at least three numbers."""
    words = line.split()
    numbers = [number(word) is not None for word in words]
    named = any(word.capitalize() in NUMBERS or word.isdigit() for word in words)
    return len(words) > 3 and named and sum(numbers) >= 3


def _filled(lines: Sequence[str], at: int) -> int:
    """Return the index of the next line that is not blank, or the number of lines."""
    return next((i for i in range(at, len(lines)) if lines[i].strip()), len(lines))
