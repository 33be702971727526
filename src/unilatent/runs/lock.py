"""The lock of a run folder: one job trains there; a second one is refused, unless the owner of the lock is gone.

RUN/lock.json   {"pid", "host", "started", "job", "launch"} of the first process, from the start of training to its end
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import SMALLEST, is_alive, room

LOCK = "lock.json"
JOBS = {"job": "SLURM_JOB_ID", "launch": "TORCHELASTIC_RUN_ID"}
"""Variables with the name of a job, which stays the same when the job is restarted, also on other machines."""
UNNAMED = (None, "", "none")
"""Values of these variables for a job without a name."""
ATTEMPTS = 10
"""How often `take` tries to replace a lock whose owner is gone."""


def owner(run: Path) -> dict[str, Any] | None:
    """Return who is training in this folder, as far as this machine can tell: {"pid", "host"}; None if nobody is.

    A lock of this same job from another machine is of an earlier start, which is over.
    """
    return _owner(_read(run / LOCK))


def refuse_second(run: Path) -> None:
    """ConfigError if another process holds the folder."""
    holder = owner(run)
    if holder is not None and (holder["pid"], holder["host"]) != (os.getpid(), socket.gethostname()):
        raise ConfigError(
            f"--out {run}: process {holder['pid']} on {holder['host']} is training there; stop it, choose another "
            f"folder, or delete {run / LOCK} if it is gone"
        )


def take(run: Path) -> None:
    """Lock the folder until `release`; ConfigError if another process holds it. Of several at once, one succeeds."""
    path, content = run / LOCK, _own_lock()
    for _ in range(ATTEMPTS):
        refuse_second(run)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _set_aside(path)
            continue
        try:
            with room(run, SMALLEST), os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if _read(path) == content:  # not removed by another process in the meantime
            return
    raise ConfigError(f"--out {run}: several processes try to train there at once; start only one")


def release(run: Path) -> None:
    """Remove the lock if this process holds it."""
    if _read(run / LOCK) == _own_lock():
        (run / LOCK).unlink(missing_ok=True)


def _own_lock() -> dict[str, Any]:
    names = {key: os.environ.get(variable) for key, variable in JOBS.items()}
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()), **names}


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a lock; None if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "pid": int(content["pid"]), "host": str(content["host"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _owner(holder: dict[str, Any] | None) -> dict[str, Any] | None:
    """The owner of a lock with this content, None if it is gone."""
    if holder is None or holder["pid"] < 1:
        return None
    pid, host = holder["pid"], holder["host"]
    if host == socket.gethostname():
        is_gone = not is_alive(pid) or holder.get("started") not in (None, _started(pid))
    else:
        is_gone = any(
            holder.get(key) not in UNNAMED and holder[key] == os.environ.get(variable) for key, variable in JOBS.items()
        )
    return None if is_gone else {"pid": pid, "host": host}


def _set_aside(path: Path) -> None:
    """Remove a lock whose owner is gone; a lock that was taken in the meantime is put back."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    holder = _owner(_read(aside))
    if holder is not None and holder["pid"] != os.getpid():
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process, by which a reused pid is recognised; None without /proc."""
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, IndexError):
        return None
