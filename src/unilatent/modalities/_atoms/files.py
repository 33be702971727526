"""Source files of systems: finding them in folders and archives, reading them, and splitting .xyz text into frames."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...plain_text import decode_leniently, split_lines
from ...zip_names import OPENING_FAILS, members
from .elements import NUMBERS

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""CPU cores available to this process."""
MEMBER_BYTES = 2**30
"""The largest unpacked size of one file in an archive."""
SHOWN = 5
"""Files that a message lists."""
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

    plural: the name in messages. offline: the value of `data.path` that requests the generated set. accepted: the
    accepted files, for messages. form_of: maps a file name without .gz to its form, or to None if it is no such file;
    the form "frame" is .xyz. preferred: forms; of files with the same stem, which hold the same system, those of the
    first form are read, and those of the later forms are skipped. periodic: whether these systems have a lattice.
    max_atoms: larger systems are never read. groups: maps names of systems to those of groups that are held out as a
    whole.
    """

    plural: str
    offline: str
    accepted: str
    form_of: Callable[[str], str | None]
    preferred: tuple[str, ...]
    periodic: bool
    max_atoms: int
    groups: Callable[[Sequence[str]], Sequence[str]] = tuple


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
            f"data.path: {path} does not exist; give a file, folder or .zip of {kind.plural}, or {kind.offline!r} for "
            "generated ones"
        )
    return path


def source_files(path: Path, kind: SystemKind, mixed: bool = False) -> list[SourceFile]:
    """Return the files of this kind at a path, sorted by name; ValueError if there is none.

    Hidden files and the metadata that macOS adds to archives are skipped. mixed: the path may hold files of the other
    kind. Then .xyz files of the other kind are skipped as well, and an empty list is no error.
    """
    files = [
        SourceFile(bare, where, form, _unpacking(content) if bare != name else content)
        for name, where, content in _visible(path)
        if (form := kind.form_of(bare := _unpacked_name(name)))
    ]
    if mixed:
        files = [file for file in files if file.form != "frame" or _may_be(file, kind)]
    skipped = _skipped({file.name: file.form for file in files}, kind)
    files = [file for file in files if file.name not in skipped]
    if not files and not mixed:
        unread = unread_files(path, kind)
        raise ValueError(
            f"data.path: {path} holds no {kind.plural}; accepted are {kind.accepted}"
            + (f" ({unread})" if unread else "")
        )
    return files


def unread_files(path: Path, kind: SystemKind) -> str:
    """Describe the files at a path that may hold systems and are not read: "not read: 3 .pdb, 1 .mol2"; "" if none.

    Files that are skipped for one of the same name are listed too.
    """
    names = [PurePosixPath(_unpacked_name(name)).name for name, *_ in _visible(path)]
    suffixes = [name.lower().rpartition(".")[2] for name in names if "." in name and kind.form_of(name) is None]
    counts = Counter(suffix for suffix in suffixes if suffix not in NO_SYSTEMS)
    texts = ["not read: " + ", ".join(f"{n} .{suffix}" for suffix, n in counts.most_common())] if counts else []
    bare = [_unpacked_name(name) for name, *_ in _visible(path)]
    if skipped := sorted(_skipped({name: form for name in bare if (form := kind.form_of(name))}, kind)):
        others = f"{len(skipped)} file{'s' * (len(skipped) > 1)} next to another form of the same name"
        texts.append(f"not read: {others}: {', '.join(skipped[:SHOWN])}{', ...' * (len(skipped) > SHOWN)}")
    return "; ".join(texts)


def _skipped(forms: dict[str, str], kind: SystemKind) -> set[str]:
    """Return the files (name -> form) that are not read, because one of a preferred form has the same stem."""
    found = {(_stem(name), form) for name, form in forms.items()}
    return {
        name
        for name, form in forms.items()
        if form in kind.preferred
        and any((_stem(name), other) in found for other in kind.preferred[: kind.preferred.index(form)])
    }


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
            yield from (f"line {i + 1}: the frame of {int(lines[i])} atoms is damaged" for i in lost)
        at = _filled(lines, end)


def _frame_fault(lines: Sequence[str], at: int) -> str | None:
    """Return what is wrong with the frame that begins at a line, or None if it is whole."""
    atoms = _count(lines[at])
    if atoms is None:
        return f"line {at + 1}: {lines[at].strip()[:20]!r} is no number of atoms"
    end = at + 2 + atoms
    if len(lines) < end:
        return f"{atoms} atoms announced, {max(len(lines) - at - 2, 0)} lines follow"
    table, after = lines[at + 2 : end], _filled(lines, end)
    short = next((i for i, row in enumerate(table) if len(row.split()) < 4), None)
    if short is not None and any(_is_frame(lines, start) for start in range(at + 1, end)):
        return f"line {at + 3 + short}: {table[short].strip()[:20]!r} is no atom, one of {atoms} announced"
    if after == len(lines) or (short is None and _count(lines[after])) or _is_frame(lines, after):
        return None
    if after == end and _is_atom(lines[after]):
        return f"{atoms} atoms announced, and line {after + 1} is one more"
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
