"""What commands write into folders of users, with a record of it: nothing that a command did not write is removed or
replaced.

FOLDER/.unilatent-outputs.jsonl   a line per file: {"command", "file", "bytes", "sha256"}

A file is written to a hidden folder beside the record, then noted, then moved to its name. So whatever stops a command,
no file is there by halves, and the record names every file that the command put there. A file of another size or hash
than its record says is the user's: somebody edited or replaced it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from .files import SMALLEST, check_writable, expanded, is_alive, room, write_text
from .plain_text import count_of

RECORD = ".unilatent-outputs.jsonl"
STAGING = re.compile(r"\.unilatent-partial-(\d+)(?:@(.+))?")
"""A folder of files that are not finished: the number of its process, and the name of its machine (older versions left
that out)."""
STALE_HOURS = 24.0
"""After so many hours without a change, unfinished files of another machine are of a command that was killed."""
HARMLESS = ("Thumbs.db", "desktop.ini")
"""Files of file managers. Like hidden files, they may lie in any folder; no command removes them."""
NAMED = 3
"""So many files of others are named in a message."""
NOTES = (".txt", ".log", ".out", ".err", ".md", ".rst", ".sh", ".py", ".yaml", ".yml")
"""Endings of notes, scripts and logs, which people keep beside a run, an evaluation or a model."""


class Outputs:
    """The files of one command in one folder.

    Nothing is written before `begin`. A new set of files takes the place of the command's earlier one, in a folder that
    holds nothing else.
    """

    def __init__(
        self, folder: Path, command: str, inputs: Iterable[str | Path | None] = (), *, shared: bool = False,
        keep: bool = False, field: str = "--out", known: Callable[[str], bool] = lambda name: False,
    ):  # fmt: skip
        """inputs: what the command reads; ValueError if the folder is in it, or it is in the folder.

        shared: files of others may lie there. keep: the command goes on with its earlier files. known: whether a file
        is the command's although no record says so.
        ValueError names files of others.
        """
        self.folder, self.command, self.shared, self.field = expanded(folder), command, shared, field
        self.keep = keep or shared
        self._is_known, self._count, self._begun = known, 0, False
        self._looked_at: dict[tuple[str, int, int], dict[str, Any]] = {}
        refuse_overlap(self.folder, inputs, field, around=not shared)
        check_writable(self.folder, field)
        self.refuse_others()

    def refuse_others(self) -> None:
        """ValueError if the folder holds files that this command did not write, and must hold none."""
        if self.shared or not self.folder.is_dir():
            return
        files, recorded = visible_files(self.folder), self._recorded()
        others = (name for name in files if not self._is_ours(name, recorded))
        if first := _first_names(others):
            raise ValueError(
                f"{self.field} {self.folder}: holds files that `unilatent {self.command}` did not write there "
                f"({first}); give a new or empty folder, or move them away"
            )

    def check(self, *names: str) -> None:
        """ValueError if a file of this name is there that this command did not write."""
        recorded = self._recorded()
        for name in names:
            if os.path.lexists(self.folder / name) and not self._is_ours(name, recorded):
                raise ValueError(
                    f"{self.field} {self.folder / name}: is there, and `unilatent {self.command}` did not write it, or "
                    "it was changed since; give another name or folder, or move it away"
                )

    def begin(self) -> Path:
        """Create the folder and return it; what this command wrote there before is removed, unless it is kept."""
        self._begun = True
        check_writable(self.folder, self.field)
        self.refuse_others()
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        if not self.keep:
            recorded = self._recorded()
            replaced = [name for name in recorded if self._is_ours(name, recorded)]
            for name in replaced:
                (self.folder / name).unlink()
                self._remove_empty(name)
            if replaced:
                what = f"{count_of(len(replaced), 'file')} that `unilatent {self.command}` wrote there before"
                print(f"note: {self.field} {self.folder}: replaces {what}", file=sys.stderr)
            write_text(self.folder / RECORD, "")
        return self.folder

    @contextmanager
    def writing(self, needed: int | Callable[[], int] = SMALLEST) -> Iterator[Path]:
        """Yield an empty folder; at the end of the block, its files are noted and moved into the folder of outputs.

        needed: bytes that the block writes, about, for the message about a full disk. If the block fails, none of its
        files is moved.
        """
        if not self._begun:
            self.begin()
        self._count += 1
        parent = self.folder / f".unilatent-partial-{os.getpid()}@{_host()}"
        staging = parent / str(self._count)
        try:
            with room(self.folder, needed):
                staging.mkdir(parents=True)
                yield staging
                self._publish(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _publish(self, staging: Path) -> None:
        """Note the files of a folder in the record, then move them."""
        names = list(visible_files(staging))
        self.check(*names)
        _append(self.folder / RECORD, [{"command": self.command, "file": n, **_describe(staging / n)} for n in names])
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(self.folder / name)

    def _recorded(self) -> dict[str, list[dict[str, Any]]]:
        """What this command noted: name -> size and hash of each version of the file."""
        recorded: dict[str, list[dict[str, Any]]] = {}
        for line in _lines(self.folder / RECORD):
            if line.get("command") == self.command and _is_inside(name := line.get("file")):
                recorded.setdefault(str(name), []).append({"bytes": line.get("bytes"), "sha256": line.get("sha256")})
        return recorded

    def _is_ours(self, name: str, recorded: dict[str, list[dict[str, Any]]]) -> bool:
        """Whether a file is there as this command wrote it."""
        if self._is_known(name):
            return True
        path, versions = self.folder / name, recorded.get(name, [])
        if not versions or path.is_symlink() or not path.is_file():
            return False
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            return False
        state = path.stat()
        if all(version["bytes"] != state.st_size for version in versions):
            return False
        key = (name, state.st_size, state.st_mtime_ns)
        if key not in self._looked_at:
            self._looked_at[key] = _describe(path)
        return self._looked_at[key] in versions

    def _remove_empty(self, name: str) -> None:
        """Remove the subfolders of a removed file, if they are empty."""
        for parent in list(PurePosixPath(name).parents)[:-1]:
            with contextlib.suppress(OSError):
                (self.folder / parent).rmdir()


def refuse_foreign(
    folder: Path, what: str, is_ours: Callable[[str], bool], commands: Sequence[str] = (), field: str = "--out"
) -> None:
    """ValueError if a folder holds files of others, which are named, beside NOTES at its top and `what`.

    is_ours: whether a file, by its name in the folder, belongs to `what`; those in the record of `commands` do.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        return
    recorded = {line.get("file") for line in _lines(folder / RECORD) if line.get("command") in commands}
    others = (
        name for name in visible_files(folder)
        if not ("/" not in name and name.lower().endswith(NOTES)) and name not in recorded and not is_ours(name)
    )  # fmt: skip
    if first := _first_names(others):
        raise ValueError(
            f"{field} {folder}: holds files that are not of {what} ({first}); give a new or empty folder, or move them "
            "away"
        )


def _first_names(names: Iterable[str]) -> str:
    """The first NAMED names, with "..." if there are more; "" if there are none."""
    first = list(islice(names, NAMED + 1))
    return ", ".join([*first[:NAMED], *(["..."] if len(first) > NAMED else [])])


def refuse_overlap(
    folder: Path, inputs: Iterable[str | Path | None], field: str = "--out", around: bool = False
) -> None:
    """ValueError if a folder of outputs is one of the inputs, or lies in one; with `around`, also if one lies in it."""
    out = expanded(folder).resolve()
    for given in inputs:
        if given is None or not (source := expanded(given)).exists():  # a URL, a hub id, a pattern
            continue
        source = source.resolve()
        if _same(source, out):
            raise ValueError(f"{field} {folder}: is the input itself; give another folder")
        if any(_same(source, parent) for parent in out.parents):
            raise ValueError(f"{field} {folder}: lies in the input {given}; give a folder outside it")
        if around and any(_same(out, parent) for parent in source.parents):
            raise ValueError(f"{field} {folder}: the input {given} lies in it; give another folder")


def single_file(
    path: Path, command: str, inputs: Iterable[str | Path | None] = (), *, field: str = "--out"
) -> Outputs:  # fmt: skip
    """Return the outputs of a command that writes one file; ValueError if a file is there that it did not write."""
    path = expanded(path)
    if path.is_dir():
        raise ValueError(f"{field} {path}: is a folder; give the name of a file in it")
    for given in inputs:
        if given is not None and (source := expanded(given)).exists():
            if _same(source.resolve(), path.resolve()):
                raise ValueError(f"{field} {path}: is the input itself; give another file")
            if any(_same(source.resolve(), parent) for parent in path.resolve().parents):
                raise ValueError(f"{field} {path}: lies in the input {given}; give a file outside it")
    outputs = Outputs(path.parent, command, shared=True, field=field)
    outputs.check(path.name)
    return outputs


def visible_files(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, sorted within each; those of file managers and hidden ones are left out."""
    for place, subfolders, files in os.walk(folder):
        links = [name for name in subfolders if Path(place, name).is_symlink()]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted([*files, *links]):
            if not name.startswith(".") and name not in HARMLESS:
                yield Path(place, name).relative_to(folder).as_posix()


def _is_inside(name: object) -> bool:
    """Whether a name in a record is that of a file below the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record; a damaged one names no file, so that its file counts as the user's."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(parsed := json.loads(line), dict):
                yield parsed


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a record and bring them to the disk; if that fails, none of them stays."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with path.open("ab", buffering=0) as file:
        end = os.lseek(file.fileno(), 0, os.SEEK_END)
        try:
            while content:
                content = content[os.write(file.fileno(), content) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed command had not moved to its name. On a shared file system it may be of another machine, of
    whose processes nothing is known here: that is removed after STALE_HOURS, and named before."""
    for path in folder.iterdir():
        match = STAGING.fullmatch(path.name)
        if not match or path.is_symlink():
            continue
        if match[2] in (None, _host()):
            is_over = not _is_another(int(match[1]))
        else:
            is_over = (age := _idle_hours(path)) > STALE_HOURS
            if not is_over:
                warnings.warn(
                    f"{path}: unfinished files of process {match[1]} on {match[2]}, last changed {max(age, 0):.1f} "
                    f"hours ago; they are removed {STALE_HOURS:g} hours after the last change. Delete them before if "
                    "no command writes there any more",
                    stacklevel=4,
                )
        if is_over:
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    """The name of this machine, as a part of a file name."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64] or "unknown"


def _idle_hours(folder: Path) -> float:
    """Hours since the last change in a folder, by the clock of its file system where that can be read."""
    newest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.lstat().st_mtime)
    now = time.time()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder.parent) as file:
        now = os.fstat(file.fileno()).st_mtime
    return (now - newest) / 3600


def _is_another(pid: int) -> bool:
    """Whether another process of this number runs. What is left under this one's number is of an earlier process, since
    leftovers are removed before anything is written: in containers, numbers repeat."""
    return pid != os.getpid() and is_alive(pid)


def in_shared_folder(folder: Path, command: str) -> Outputs:
    """Return the outputs of a command whose files lie beside others, as in RUN/eval.

    Earlier versions kept no record there: a JSON file with a `format_version` and no line in the record, and an image
    of the same name, are the command's.
    """

    def known(name: str) -> bool:
        if any(line.get("command") == command and line.get("file") == name for line in _lines(folder / RECORD)):
            return False
        try:
            content = json.loads((folder / name).with_suffix(".json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and "format_version" in content

    return Outputs(folder, command, shared=True, known=known)


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file or folder."""
    try:
        return a == b or os.path.samefile(a, b)
    except OSError:
        return False
