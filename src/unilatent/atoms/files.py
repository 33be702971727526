"""Files of molecules and of crystals: which ones lie at a path, what is in them, and frames of .xyz."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEMBER_BYTES = 2**30
"""What one file of an archive may unpack to."""
Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many more are done, and how many there will be."""

LATTICE = re.compile(rb"\bLattice\s*=", re.IGNORECASE)
PBC = re.compile(rb"\bpbc\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """What sets molecules and crystals apart when they are read.

    what: how messages call them. offline: the path that means those made here. accepted: files, for messages.
    form: how a file is read, by its name without .gz, or None: it is not; "frame" means .xyz. spare: the form of files
    that are passed over beside one of another form and the same stem: both hold the same. periodic: whether they have a
    lattice. most: atoms of the largest that are read.
    """

    what: str
    offline: str
    accepted: str
    form: Callable[[str], str | None]
    spare: tuple[str, str]
    periodic: bool
    most: int


@dataclass(frozen=True)
class Member:
    """A file, alone or in a folder or archive. name: inside it, with forward slashes, without .gz; where: for messages;
    form: how it is read."""

    name: str
    where: str
    form: str
    content: Callable[[], bytes]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).with_suffix("").as_posix()

    def read(self) -> bytes:
        """What it holds; ValueError says what is wrong with it, as words that follow `where`."""
        try:
            content = self.content()
        except Exception as error:  # OSError, BadZipFile, zlib.error, RuntimeError when encrypted, ...
            raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
        if not content.strip():
            raise ValueError("is empty")
        return content


def existing(path: Path, kind: Kind) -> Path:
    """With ~ expanded; ValueError where there is nothing."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(
            f"data.path: {path} does not exist; give a file, folder or .zip of {kind.what}, or {kind.offline!r} for "
            "those made here"
        )
    return path


def members(path: Path, kind: Kind, own: bool = False) -> list[Member]:
    """Files of that kind at a path, by name; hidden ones and what macOS adds to archives are none. ValueError if there
    is none. own: without frames of the other kind, and there may be none."""
    found = [
        Member(bare, where, form, _unpacking(content) if bare != name else content)
        for name, where, content in _listed(path)
        if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        and (form := kind.form(bare := name[:-3] if name.lower().endswith(".gz") else name))
    ]
    if own:
        found = [one for one in found if one.form != "frame" or _may_be(one, kind)]
    spare, better = kind.spare
    stems = {one.stem for one in found if one.form == better}
    found = [one for one in found if one.form != spare or one.stem not in stems]
    if not found and not own:
        raise ValueError(f"data.path: {path} holds no {kind.what}; accepted are {kind.accepted}")
    return found


def _listed(path: Path) -> list[tuple[str, str, Callable[[], bytes]]]:
    """Name, place for messages, and content."""
    if path.is_dir():
        inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        return [(name, str(file), file.read_bytes) for name, file in inside]
    if path.suffix.lower() != ".zip":
        return [(path.name, str(path), path.read_bytes)]
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data.path: {path} is not a whole zip archive ({error}); copy or make it again") from None

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


def _may_be(member: Member, kind: Kind) -> bool:
    try:
        return is_periodic(member.read()) == kind.periodic
    except ValueError:  # named when it is read
        return True


def is_periodic(frame: bytes) -> bool:
    """Whether the first frame of an .xyz has a lattice that it repeats in: `Lattice=` on its second line, and no `pbc=`
    that denies all three axes."""
    comment = [*frame.splitlines()[:2], b"", b""][1]
    if not LATTICE.search(comment):
        return False
    denied = PBC.search(comment)
    return denied is None or b"T" in (denied[1] or denied[2] or denied[3] or b"").upper()


def frames(text: str) -> Iterator[list[str] | str]:
    """Of an .xyz, the lines of each frame: its number of atoms, a comment, and one for each atom. Or what is wrong,
    after which nothing follows."""
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
