"""Checkpoints: directories that are written atomically, without pickle.

checkpoints/step_00001000/
    model.safetensors  ema.safetensors  optimizer.safetensors  config.json  state.json
    MANIFEST.json       written last: {"step", "files": {name: {"bytes", "sha256"}}, "sha256"}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..faults import reach
from ..files import DiskError, space, system_reason, write_json

MANIFEST = "MANIFEST.json"
FILE = re.compile(r"(\w+\.safetensors|config\.json|state\.json|MANIFEST\.json)(\.tmp-\d+)?")
"""Names of the files of a checkpoint."""
UNPUBLISHED = re.compile(r"step_\d+\.(tmp-\d+|old-\d+|aside(-\d+)?)")
"""Names of checkpoints that are being written or removed, or were set aside."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file, what was expected and the fix."""


def save(folder: Path, step: int, write: Callable[[Path], None], keep: int, needed: int = 0) -> Path:
    """Write checkpoint `step` to `folder`: `write` fills a temporary directory, which is renamed when it is complete.

    Older checkpoints beyond the newest `keep` are removed afterwards, never before. Damaged ones neither count nor are
    removed.

    needed: bytes that it is expected to take, for the message of a save that fails.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f"step_{step:08d}.tmp-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        reach("save.start", step)
        write(temporary)
        reach("save.before_manifest", step)
        files = {path.name: describe(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(_manifest(step, files), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        reach("save.before_rename", step)
        aside = final.with_name(f"{final.name}.old-{os.getpid()}")
        if final.exists():
            final.rename(aside)
            reach("save.set_aside", step)
        temporary.rename(final)
        reach("save.after_rename", step)
        _sync(folder)
        if aside.exists():
            remove(aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        number, reason = system_reason(error) or (errno.EIO, str(error))
        raise DiskError(
            number, f"checkpoint of step {step} not written to {folder}: {reason} ({space(folder, needed)}); older "
            "checkpoints are untouched. Free some space (`unilatent ckpt prune` deletes all but the newest two), then "
            "--resume auto"
        ) from error  # fmt: skip
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        inspect(final)
    except CheckpointError as error:
        raise DiskError(
            errno.EIO, f"checkpoint of step {step} is not what was written: {error}. Older ones stay; check the disk, "
            "then --resume auto"
        ) from error  # fmt: skip
    write_json(folder.parent / "latest.json", {"step": step, "checkpoint": f"{folder.name}/{final.name}"})
    reach("save.before_prune", step)
    for old in [path for path in published(folder) if _is_complete(path)][:-keep]:
        if old != final and not others(old):
            doomed = old.with_name(f"{old.name}.tmp-{os.getpid()}")
            old.rename(doomed)
            reach("save.in_prune", step)
            remove(doomed)
    return final


def others(checkpoint: Path) -> list[str]:
    """Return the names of files in a checkpoint that are not its own; such a checkpoint is never removed."""
    return sorted({path.name for path in checkpoint.iterdir()} - _own(checkpoint))


def _own(checkpoint: Path) -> set[str]:
    """Names of a checkpoint's own files: those of any checkpoint, and those in its manifest."""
    listed: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):
        listed = set(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    return {path.name for path in checkpoint.iterdir() if FILE.fullmatch(path.name)} | listed


def remove(checkpoint: Path) -> None:
    """Remove the files of a checkpoint, and its folder unless something else is in it."""
    own = _own(checkpoint)
    for path in list(checkpoint.iterdir()):
        if path.name in own and not path.is_dir():
            path.unlink()
    with suppress(OSError):
        checkpoint.rmdir()


def unpublished(folder: Path) -> list[Path]:
    """Return what killed saves left and what was set aside."""
    return sorted(path for path in folder.glob("step_*") if UNPUBLISHED.fullmatch(path.name))


def _manifest(step: int, files: dict[str, Any]) -> str:
    """The exact text of the manifest. It ends with a hash of the other lines, so that damage to it is recognised."""
    body = {"step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=2) + "\n"


def published(folder: Path) -> list[Path]:
    """Return all checkpoints that were renamed into place, oldest first, valid or not."""
    return sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit())


def restore(folder: Path) -> None:
    """Restore a checkpoint that a killed save had moved out of the way before its replacement was in place.

    Only while no other process saves there.
    """
    for old in unpublished(folder):
        final = old.with_name(old.name.partition(".")[0])
        if ".old-" in old.name:
            remove(old) if final.exists() else old.rename(final)


def clean(folder: Path, step: int) -> None:
    """Prepare `folder` for training from `step`: remove leftovers of a killed save and set aside checkpoints of later
    steps, which are damaged or of an abandoned continuation. They are renamed to `.aside`, which no resume reads."""
    for leftover in unpublished(folder):
        if ".tmp-" in leftover.name:
            remove(leftover)
    restore(folder)
    for path in published(folder):
        if int(path.name[5:]) > step:
            aside, number = path.with_name(f"{path.name}.aside"), 0
            while aside.exists():
                remove(aside)
                if aside.exists():  # something else is in it
                    number += 1
                    aside = path.with_name(f"{path.name}.aside-{number}")
            path.rename(aside)


def inspect(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files all exist with the right size; only the manifest is read.

    CheckpointError names the first file that is missing or damaged.
    """
    manifest = checkpoint / MANIFEST
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint; give a folder like RUN/checkpoints/step_00001000")
    if not manifest.is_file():
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}, so it is incomplete; use an older checkpoint")
    try:
        text = manifest.read_text(encoding="utf-8")
        content = json.loads(text)
        files = dict(content["files"])
        valid = text == _manifest(content["step"], files)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(f"{manifest}: damaged; use an older checkpoint")
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; use an older checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: damaged (its size is not the manifest's); use an older checkpoint")
    return content


def verify(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a valid checkpoint; CheckpointError names the first file that is missing or changed."""
    content = inspect(checkpoint)
    for name, expected in content["files"].items():
        path = checkpoint / name
        if describe(path) != expected:
            raise CheckpointError(f"{path}: damaged (its SHA-256 is not the manifest's); use an older checkpoint")
    return content


def _is_complete(checkpoint: Path) -> bool:
    try:
        inspect(checkpoint)
    except CheckpointError:
        return False
    return True


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, valid or not."""
    return (folder / MANIFEST).is_file()


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files all exist with the right size, None without any."""
    return next((path for path in reversed(published(folder)) if _is_complete(path)), None)


def identity(checkpoint: Path) -> str:
    """Return which checkpoint this process finds under a path: its step and a hash of its manifest."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        return f"step {json.loads(text)['step']}, manifest {hashlib.sha256(text).hexdigest()[:16]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable checkpoint ({error})"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint (None without any), and the error of each newer one."""
    errors: list[str] = []
    for checkpoint in reversed(published(folder)):
        try:
            verify(checkpoint)
            return checkpoint, errors
        except CheckpointError as error:
            errors.append(str(error))
    return None, errors


def describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
