"""Atomic writes of text and JSON, reading of untrusted JSON, paths with ~, and what is said about a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, quota or file that can take no more."""
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG)
SMALLEST = 4096
"""Bytes that any file takes on a disk, about."""


class DiskError(OSError):
    """A file that cannot be written. The message is for users, in one line: folder, reason, needed and free space."""


def expanded(path: str | Path) -> Path:
    """Return a path with a leading ~ or ~user replaced by the home folder, unchanged if there is none."""
    return Path(os.path.expanduser(path))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Surrogates (from file names that are not UTF-8) are written as escapes."""
    content = text.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with room(path.parent, len(content)):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def readable(path: Path) -> None:
    """Give a file the permissions of one that is opened and written: safetensors writes for its owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file and the fault, and ends with `way_out`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or 'cannot be read'}; {way_out}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON text; {way_out}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains {type(content).__name__}, not named fields; {way_out}")
    return content


# ---- space -----------------------------------------------------------------------------------------------------------


@contextmanager
def room(folder: Path, needed: int | Callable[[], int]) -> Iterator[None]:
    """Raise DiskError in place of an error of the system that says that nothing can be written to the folder.

    needed: bytes that the block writes, or that remain to be written, about.
    """
    try:
        yield
    except Exception as error:
        reason = system_reason(error)
        if (
            isinstance(error, DiskError)
            or reason is None
            or reason[0] not in UNWRITABLE
            or _is_elsewhere(error, folder)
        ):
            raise
        raise disk_error(folder, reason, needed() if callable(needed) else needed) from error


def _is_elsewhere(error: Exception, folder: Path) -> bool:
    """Whether an error names a file outside the folder."""
    name = getattr(error, "filename", None)
    return isinstance(name, str | bytes) and not Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute())


def disk_error(folder: Path, reason: tuple[int, str], needed: int) -> DiskError:
    """Return the error of a folder that cannot be written, with the space that is needed and free."""
    number, words = reason
    if number in FULL:
        way_out = "free some space or give another folder, then run the same command again"
        return DiskError(number, f"{folder}: {words} ({space(folder, needed)}); {way_out}")
    return DiskError(number, f"{folder}: cannot be written ({words}); give another folder")


def space(folder: Path, needed: int) -> str:
    """Return the needed and the free space of a folder, in words."""
    return f"{size_text(max(needed, SMALLEST))} needed, {size_text(shutil.disk_usage(nearest(folder)).free)} free there"


def size_text(count: int) -> str:
    """Return a number of bytes with a unit that suits it: 1.9 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def system_reason(error: BaseException) -> tuple[int, str] | None:
    """Return number and text of the system's error, None for any other.

    safetensors has them in a message that ends with `(os error 28)`.
    """
    if isinstance(error, OSError):
        return None if error.errno is None else (error.errno, error.strerror or str(error))
    match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return (int(match[1]), os.strerror(int(match[1]))) if match else None


def nearest(folder: Path) -> Path:
    """Return a folder, or the nearest parent of it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writable(folder: Path, field: str = "--out") -> None:
    """ConfigError unless files can be created in the folder, or in the nearest parent that exists."""
    try:
        place = nearest(folder)
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        tempfile.TemporaryFile(dir=place).close()  # every process uses another name
    except OSError as error:
        if error.errno in FULL:
            raise disk_error(folder, (error.errno, error.strerror or ""), SMALLEST) from None
        raise ConfigError(f"{field} {folder}: cannot be written ({error.strerror}); choose another folder") from None


def is_alive(pid: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
