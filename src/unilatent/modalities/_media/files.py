"""Files of samples in folders and zip archives, and classes from folder names."""

from __future__ import annotations

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from ...listings import spread
from ...zip_names import OPENING_FAILS, members
from ..base import BadSample, NothingFound

MEMBER_BYTES = 256 * 2**20
"""Largest unpacked size of one file of an archive, against archives that unpack to terabytes."""
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
"""Folder names that mean splits, not classes."""
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
"""Files, in lower case, that Windows and macOS put into folders."""
BESIDE = (
    ".bib", ".cfg", ".cls", ".csv", ".db", ".html", ".htm", ".ini", ".ipynb", ".json", ".jsonl", ".lnk", ".log", ".m",
    ".md", ".md5", ".py", ".rst", ".sh", ".sha256", ".toml", ".tsv", ".txt", ".url", ".xml", ".yaml", ".yml",
)  # fmt: skip
"""Endings of files that describe samples and are none; they are not reported as unread."""
DOCUMENTS = re.compile(
    r"(readme|license|licence|copying|notice|authors|changelog|makefile|checksums?|(md5|sha)\w*)", re.I
)
"""Files without an ending that are no samples."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MOST_ENDINGS = 6
"""Unread endings that a note counts one by one."""


@dataclass(frozen=True)
class FileKind:
    """Which files are samples.

    noun: what messages call a sample; suffixes: lower case, with the dot; convert_to: those that messages recommend.
    by_path: whether the decoder opens a file on disk itself, because whole files may be too large to be read.
    source_of: maps the name of a sample to that of its source; samples of one source (clips of one recording) are held
    out together. None: each sample is its own.
    """

    noun: str
    suffixes: tuple[str, ...]
    convert_to: tuple[str, ...]
    by_path: bool = False
    source_of: Callable[[str], str] | None = None

    def holds(self, name: str) -> bool:
        """Whether a file is a sample, by its suffix. Hidden files and those of the operating system are not."""
        return name.lower().endswith(self.suffixes) and not _is_hidden(name)

    def unread(self, names: Iterable[str]) -> Counter[str]:
        """Count the files that are neither samples nor known to describe some, by ending in lower case ("" without)."""
        endings: Counter[str] = Counter()
        for name in names:
            file = name.rpartition("/")[2].lower()
            ending = os.path.splitext(file)[1]
            described = ending in BESIDE or (not ending and DOCUMENTS.fullmatch(file))
            if file and not (described or _is_hidden(name) or file.endswith(self.suffixes)):
                endings[ending] += 1
        return endings

    def note(self, unread: Counter[str], where: object) -> list[str]:
        """Return one line that counts unread files by ending; none if there are none."""
        if not unread:
            return []
        total = sum(unread.values())
        way_out = f"convert {self.noun}s among them to {' or '.join(self.convert_to)}"
        verb = "s were" if total > 1 else " was"
        return [one_line(f"{where}: {total:,} file{verb} not read: {counted(unread)}; {way_out}")]


def printed(name: str) -> str:
    """Return a name of a file for messages, without line ends and other control characters."""
    return CONTROL.sub("?", name)


def one_line(text: str) -> str:
    """Return a text without line ends, which names of files may contain."""
    return " ".join(text.split())


def counted(endings: Counter[str]) -> str:
    """Return counts of endings as words, the most frequent first: "18 .heic, 2 .mov"."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], not item[0], item[0]))
    most = [f"{count:,} {ending or 'without an ending'}" for ending, count in ordered[:MOST_ENDINGS]]
    others = sum(count for _, count in ordered[MOST_ENDINGS:])
    return ", ".join([*most, f"{others:,} others"] if others else most)


def _is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or one that an operating system adds."""
    parts = name.split("/")
    return parts[-1].lower() in SYSTEM or any(part.startswith((".", "__MACOSX")) for part in parts)


class FileSource(ABC):
    """Files by name: the path inside a folder or archive, with forward slashes."""

    path: Path
    kind: FileKind

    @abstractmethod
    def files(self) -> list[str]:
        """Return the names of all files of any kind."""

    def names(self) -> list[str]:
        """Return the names of all samples, sorted."""
        return sorted(name for name in set(self.files()) if self.kind.holds(name))

    def notes(self) -> list[str]:
        """Return what was found and is not read, one line each."""
        return self.kind.note(self.kind.unread(self.files()), self.path)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file; BadSample if it cannot be read."""

    def content(self, name: str) -> Any:
        """Return what the decoder of the samples takes: the bytes of a file, or its path (`FileKind.by_path`)."""
        return self.read(name)

    @abstractmethod
    def stamp(self, name: str) -> str:
        """Return what is known about a file without reading it: part of the data fingerprint."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the file's path, for messages."""

    @abstractmethod
    def witnesses(self, names: Sequence[str]) -> list[str]:
        """Return the files and folders that change when the names of files do, or a size of these files.

        Of a folder's files, at most CHECKED are among them (`listings`). Called after `files`.
        """

    def directory(self) -> dict[str, list[Any]] | None:
        """Return what `use` takes, so that another process can read files without listing them; None: it need not."""
        return None

    def use(self, directory: dict[str, list[Any]] | None) -> None:
        """Use what `directory` returned in another process. Default: nothing."""
        return None


class Folder(FileSource):
    """A folder with all its subfolders."""

    def __init__(self, path: Path, kind: FileKind):
        self.path, self.kind = path, kind
        self.folders: list[str] = []
        """All folders that `files` found."""

    def files(self) -> list[str]:
        names, self.folders = [], []
        for folder, subfolders, files in os.walk(self.path, onerror=_unreadable, followlinks=True):
            self.folders.append(folder)
            subfolders[:] = [name for name in subfolders if not _is_loop(Path(folder, name))]
            inside = Path(folder).relative_to(self.path).as_posix()
            names += [name if inside == "." else f"{inside}/{name}" for name in files]
        return names

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: {error.strerror}; make it readable or remove it"
            ) from error

    def content(self, name: str) -> Any:
        return self.path / name if self.kind.by_path else self.read(name)

    def stamp(self, name: str) -> str:
        try:
            return str((self.path / name).stat().st_size)
        except OSError:
            return "missing"

    def where(self, name: str) -> str:
        return printed(str(self.path / name))

    def witnesses(self, names: Sequence[str]) -> list[str]:
        return [*self.folders, *(os.path.join(self.path, name) for name in spread(names))]


class ZipArchive(FileSource):
    """A zip file. Each process opens it itself, because forked processes would share one file position.

    Its directory is read once: data workers and other processes (`use`) get it from the first one.
    Names have forward slashes and the encoding in which they were written, whatever program made the archive.
    """

    def __init__(self, path: Path, kind: FileKind):
        self.path, self.kind = path, kind
        self._process: int | None = None
        self._opened: zipfile.ZipFile | None = None

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        with zipfile.ZipFile(self.path) as archive:
            return members(archive)

    def files(self) -> list[str]:
        return [name for name in self._members if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: not in the archive; add it, or remove it from the table"
            )
        if member.file_size > MEMBER_BYTES:
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: unpacks to {member.file_size / 2**20:,.0f} MiB, more than "
                f"{MEMBER_BYTES >> 20}; remove it or save it smaller"
            )
        try:
            return self._open().read(member)
        except Exception as error:  # BadZipFile, zlib.error, RuntimeError when encrypted, NotImplementedError, ...
            reason = " ".join(str(error).split())
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: cannot be unpacked ({reason}); create the zip again"
            ) from error

    def stamp(self, name: str) -> str:
        member = self._members.get(name)
        return "missing" if member is None else f"{member.file_size} {member.CRC:08x}"

    def where(self, name: str) -> str:
        return printed(f"{name} in {self.path}")

    def witnesses(self, names: Sequence[str]) -> list[str]:
        return [str(self.path)]

    def directory(self) -> dict[str, list[Any]]:
        return {name: [getattr(member, field) for field in MEMBER] for name, member in self._members.items()}

    def use(self, directory: dict[str, list[Any]] | None) -> None:
        if directory is not None and "_members" not in self.__dict__:
            self._members = {name: _member(values) for name, values in directory.items()}

    def _open(self) -> zipfile.ZipFile:
        """Open the archive in this process, without reading its directory."""
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = zipfile.ZipFile(BytesIO(EMPTY_ZIP)), os.getpid()
            self._opened.fp = self.path.open("rb")
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_opened": None}


MEMBER = ("orig_filename", "header_offset", "compress_type", "compress_size", "file_size", "CRC", "flag_bits")
"""What the directory of an archive says about a member and is needed to read it."""
EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


def _member(values: Sequence[Any]) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo()
    for field, value in zip(MEMBER, values, strict=True):
        setattr(member, field, value)
    return member


def _unreadable(error: OSError) -> None:
    raise ValueError(f"folder {error.filename}: {error.strerror}; make it readable or remove it") from error


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to one that contains it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def locate(path: Path, field: str, kind: FileKind) -> FileSource:
    """Open the folder or zip archive at a path; ValueError names `field` when it is neither."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"{field}: {path} does not exist; give a folder or .zip of {kind.noun}s")
    if path.is_dir():
        return Folder(path, kind)
    if path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        raise ValueError(f"{field}: {path} is neither a folder nor a .zip of {kind.noun}s; give one of these")
    try:
        zipfile.ZipFile(path).close()
    except OPENING_FAILS as error:
        raise ValueError(f"{field}: {path} is not a complete zip archive ({error}); copy or create it again") from error
    return ZipArchive(path, kind)


def at_least_one(names: list[str], source: FileSource, field: str) -> list[str]:
    """Return the names; NothingFound if there are none."""
    if not names:
        kind = source.kind
        unread = kind.unread(source.files())
        found = f", but {counted(unread)}" if unread else ""
        raise NothingFound(
            one_line(f"{field}: {source.path} holds no {kind.noun}s{found}; accepted are {', '.join(kind.suffixes)}")
        )
    return names


NUMBER = re.compile("[0-9]+")


def class_root(names: Sequence[str]) -> str:
    """Return the folder that contains the class folders, as a prefix: the deepest one that contains all files."""
    root = ""
    while True:
        parts = {name[len(root) :].partition("/")[::2] for name in names}  # (folder, path inside) or (file, "")
        tops = {top for top, _ in parts}
        if len(tops) > 1 or any(not inside for _, inside in parts):
            return root
        root += tops.pop() + "/"


def class_folders(names: Sequence[str], where: Path, field: str, noun: str) -> tuple[str, ...]:
    """Return the class folders of these files, in order; () if no file is in a folder. ValueError on a mixture.

    They are in the order of their characters, but those called by numbers alone share their places in the order of the
    numbers.
    """
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return ()
    if loose:
        raise ValueError(
            f"{field}: {where} contains {len(loose)} {noun}s ({printed(loose[0])}, ...) next to its class folders; "
            f"move them into class folders, or give a folder with only {noun}s"
        )
    folders = {name.split("/", 1)[0] for name in names}
    if SPLIT_NAMES.issuperset(name.lower() for name in folders):
        raise ValueError(
            f"{field}: {where} contains {', '.join(sorted(folders))}, which are splits, not classes; give one of them"
        )
    numbers = iter(sorted(filter(NUMBER.fullmatch, folders), key=number_order))
    return tuple(next(numbers) if NUMBER.fullmatch(name) else name for name in sorted(folders))


def number_order(name: str) -> tuple[int, str, str]:
    """Sort key of decimal numbers of any length by their value; equal ones by their text."""
    digits = name.lstrip("0")
    return len(digits), digits, name


def natural_order(name: str) -> list[tuple[int, str, str]]:
    """Sort key of names with numbers in them, by the values of these: 2.png before 10.png."""
    parts = re.split("([0-9]+)", name)
    return [(-1, part, "") if place % 2 == 0 else number_order(part) for place, part in enumerate(parts)]


def lone_class(root: str) -> tuple[str, ...]:
    """Return the class of files that are all in one folder (`class_root`): its name, unless that means a split."""
    name = root.rstrip("/").rpartition("/")[2]
    return (name,) if name and name.lower() not in SPLIT_NAMES else ()
