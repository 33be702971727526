"""Small trained models that come with the package, by name: folders here, whose files SHA256SUMS lists."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SUMS = "SHA256SUMS"
"""One line a file, as `sha256sum` writes and checks it."""


def names() -> tuple[str, ...]:
    """Return the names of the models."""
    return tuple(sorted({path.split("/")[0] for path in _sums()}))


def packaged(name: str) -> Path | None:
    """Return the folder of a model; None if there is none of this name. ValueError names a file that was changed."""
    if name not in names():
        return None
    for path, expected in _sums().items():
        if path.startswith(f"{name}/"):
            _check(FOLDER / path, expected)
    return FOLDER / name


@cache
def _sums() -> dict[str, str]:
    """Path of each file -> its SHA-256."""
    lines = (FOLDER / SUMS).read_text(encoding="ascii").splitlines()
    return {path: digest for digest, path in (line.split(maxsplit=1) for line in lines)}


def _check(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; install unilatent again") from None
    if found != expected:
        raise ValueError(f"{path}: its SHA-256 is not that of the release; install unilatent again")
