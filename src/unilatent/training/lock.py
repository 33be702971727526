"""One process group a run folder: a second one is refused, a lock whose owner is gone is not."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import write_json

LOCK = "lock.json"
JOB = "SLURM_JOB_ID"
"""Names the scheduler's job; a job that is queued again, on other machines perhaps, keeps it."""


def owner(run: Path) -> dict[str, Any] | None:
    """Who is training in this folder, as far as this machine can tell: {"pid", "host"}; None if nobody is.

    A scheduler's job that holds it from another machine is this job's own earlier start, which is over.
    """
    try:
        holder = json.loads((run / LOCK).read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), str(holder["host"])
        job = holder.get("job")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if pid < 1:
        return None
    if host == socket.gethostname() and not _is_alive(pid):
        return None
    if host != socket.gethostname() and job is not None and job == os.environ.get(JOB):
        return None
    return {"pid": pid, "host": host}


def refuse_second(run: Path) -> None:
    """ConfigError if another process holds the folder."""
    holder = owner(run)
    if holder is not None and (holder["pid"], holder["host"]) != (os.getpid(), socket.gethostname()):
        raise ConfigError(
            f"--out {run}: process {holder['pid']} on {holder['host']} is training there; stop it, choose another "
            f"folder, or delete {run / LOCK} if it is gone"
        )


def take(run: Path) -> None:
    """Hold the folder until `release`."""
    write_json(run / LOCK, {"pid": os.getpid(), "host": socket.gethostname(), "job": os.environ.get(JOB)})


def release(run: Path) -> None:
    """Let go of it."""
    (run / LOCK).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
