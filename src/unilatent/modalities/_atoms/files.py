"""Source files of systems: finding them in folders and archives, reading them, and splitting .xyz text into frames."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""CPU cores available to this process."""
MEMBER_BYTES = 2**30
"""The largest unpacked size of one file in an archive."""
ProgressCallback = Callable[[str, int, int], None]
"""Called with a description, how many more items are done, and the total (0: unknown)."""

LATTICE = re.compile(rb"\bLattice\s*=", re.IGNORECASE)
PBC = re.compile(rb"\bpbc\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))", re.IGNORECASE)


@dataclass(frozen=True)
class SystemKind:
    """How the files of one kind of system are recognised, and how messages describe them.

    plural: the name in messages. offline: the value of `data.path` that requests the generated set. accepted: the
    accepted files, for messages. form_of: maps a file name without .gz to its form, or to None if it is no such file;
    the form "frame" is .xyz. redundant: forms (a, b); a file of form a is skipped if one of form b with the same stem
    exists, since both hold the same system. periodic: whether these systems have a lattice. max_atoms: larger systems
    are never read.
    """

    plural: str
    offline: str
    accepted: str
    form_of: Callable[[str], str | None]
    redundant: tuple[str, str]
    periodic: bool
    max_atoms: int


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
        return PurePosixPath(self.name).with_suffix("").as_posix()

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
        for name, where, content in _listed(path)
        if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        and (form := kind.form_of(bare := name[:-3] if name.lower().endswith(".gz") else name))
    ]
    if mixed:
        files = [file for file in files if file.form != "frame" or _may_be(file, kind)]
    skipped_form, preferred_form = kind.redundant
    stems = {file.stem for file in files if file.form == preferred_form}
    files = [file for file in files if file.form != skipped_form or file.stem not in stems]
    if not files and not mixed:
        raise ValueError(f"data.path: {path} holds no {kind.plural}; accepted are {kind.accepted}")
    return files


def _listed(path: Path) -> list[tuple[str, str, Callable[[], bytes]]]:
    """Name, location for messages, and reader of every file at a path."""
    if path.is_dir():
        inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        return [(name, str(file), file.read_bytes) for name, file in inside]
    if path.suffix.lower() != ".zip":
        return [(path.name, str(path), path.read_bytes)]
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data.path: {path} is not a whole zip archive ({error}); copy or create it again") from None

    def member(name: str) -> Callable[[], bytes]:
        def content() -> bytes:
            if archive.getinfo(name).file_size > MEMBER_BYTES:
                raise ValueError(f"it unpacks to more than {MEMBER_BYTES >> 20} MiB; unpack it yourself")
            return archive.read(name)

        return content

    names = sorted(name for name in set(archive.namelist()) if not name.endswith("/"))
    return [(name, f"{name} in {path}", member(name)) for name in names]


def _unpacking(content: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: gzip.decompress(content())


def _may_be(file: SourceFile, kind: SystemKind) -> bool:
    """Whether an .xyz file is of this kind. Unreadable files count, so that parsing reports them."""
    try:
        return is_periodic(file.read()) == kind.periodic
    except ValueError:
        return True


def is_periodic(frame: bytes) -> bool:
    """Whether the first frame of an .xyz is periodic: its second line has `Lattice=`, and no `pbc=` that is false for
    all three axes."""
    comment = [*frame.splitlines()[:2], b"", b""][1]
    if not LATTICE.search(comment):
        return False
    pbc = PBC.search(comment)
    return pbc is None or b"T" in (pbc[1] or pbc[2] or pbc[3] or b"").upper()


def frames(text: str) -> Iterator[list[str] | str]:
    """Yield the lines of each frame of an .xyz: the number of atoms, a comment, and one line per atom.

    At the first malformed frame it yields what is wrong, as a string, and stops.
    """
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        word = lines[at].strip()
        if not word:
            at += 1
            continue
        if not re.fullmatch(r"\d{1,9}", word):
            yield f"line {at + 1}: {word[:20]!r} is no number of atoms"
            return
        frame = lines[at : at + 2 + int(word)]
        if len(frame) < 2 + int(word):
            yield f"{int(word)} atoms announced, {max(len(frame) - 2, 0)} lines follow"
            return
        yield frame
        at += len(frame)
