"""Files of samples in folders and zip archives, and classes from folder names."""

from __future__ import annotations

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import BadSample

MEMBER_BYTES = 256 * 2**20
"""Largest unpacked size of one file of an archive, against archives that unpack to terabytes."""
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
"""Folder names that mean splits, not classes."""


@dataclass(frozen=True)
class FileKind:
    """Which files are samples. noun: what messages call a sample; suffixes: lower case, with the dot."""

    noun: str
    suffixes: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether a file is a sample, by its suffix. Hidden files and the files that macOS adds to archives are not."""
        hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        return name.lower().endswith(self.suffixes) and not hidden


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

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file; BadSample if it cannot be read."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """Return what is known about a file without reading it: part of the data fingerprint."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the file's path, for messages."""


class Folder(FileSource):
    """A folder with all its subfolders."""

    def __init__(self, path: Path, kind: FileKind):
        self.path, self.kind = path, kind

    def files(self) -> list[str]:
        names = []
        for folder, subfolders, files in os.walk(self.path, onerror=_unreadable, followlinks=True):
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

    def stamp(self, name: str) -> str:
        path = self.path / name
        return str(path.stat().st_size) if path.exists() else "missing"

    def where(self, name: str) -> str:
        return str(self.path / name)


class ZipArchive(FileSource):
    """A zip file. Each process opens it itself, because forked processes would share one file position."""

    def __init__(self, path: Path, kind: FileKind):
        self.path, self.kind = path, kind
        self._process: int | None = None
        self._opened: zipfile.ZipFile | None = None

    def files(self) -> list[str]:
        return self._archive.namelist()

    def read(self, name: str) -> bytes:
        if name not in self._archive.NameToInfo:
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: not in the archive; add it, or remove it from the table"
            )
        if (size := self._archive.getinfo(name).file_size) > MEMBER_BYTES:
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: unpacks to {size / 2**20:,.0f} MiB, more than "
                f"{MEMBER_BYTES >> 20}; remove it or save it smaller"
            )
        try:
            return self._archive.read(name)
        except Exception as error:  # BadZipFile, zlib.error, RuntimeError when encrypted, NotImplementedError, ...
            reason = " ".join(str(error).split())
            raise BadSample(
                f"{self.kind.noun} {self.where(name)}: cannot be unpacked ({reason}); create the zip again"
            ) from error

    def stamp(self, name: str) -> str:
        member = self._archive.NameToInfo.get(name)
        return "missing" if member is None else f"{member.file_size} {member.CRC:08x}"

    def where(self, name: str) -> str:
        return f"{name} in {self.path}"

    @property
    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_opened": None}


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
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{field}: {path} is not a complete zip archive ({error}); copy or create it again") from error
    return ZipArchive(path, kind)


def at_least_one(names: list[str], source: FileSource, field: str) -> list[str]:
    """Return the names; ValueError if there are none."""
    if not names:
        kind = source.kind
        raise ValueError(f"{field}: {source.path} holds no {kind.noun}s; accepted are {', '.join(kind.suffixes)}")
    return names


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
    """Return the class folders of these files, sorted; () if no file is in a folder. ValueError on a mixture."""
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return ()
    if loose:
        raise ValueError(
            f"{field}: {where} contains {len(loose)} {noun}s ({loose[0]}, ...) next to its class folders; "
            f"move them into class folders, or give a folder with only {noun}s"
        )
    folders = sorted({name.split("/", 1)[0] for name in names})
    if SPLIT_NAMES.issuperset(name.lower() for name in folders):
        raise ValueError(
            f"{field}: {where} contains {', '.join(folders)}, which are splits, not classes; give one of them"
        )
    return tuple(folders)
