"""Fault injection for tests: named points at which a run can be made to fail.

    UNILATENT_FAULT=point:action[:rank[:step]]      e.g. save.before_rename:kill, step.gradients:nan:1:7

Actions: kill (SIGKILL), term (SIGTERM), exit (code 1), raise (RuntimeError), full (no space left), hang, nan and zero
(the caller overwrites its values). Faults occur in the first start of a job only, not in processes that torchrun has
restarted. Without the variable, `reach` does nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

ACTIONS = ("kill", "term", "exit", "raise", "full", "hang", "nan", "zero")
POISONS = ("nan", "zero")


@dataclass
class Fault:
    """An action at a point; rank and step None mean any. It happens once."""

    point: str
    action: str
    rank: int | None = None
    step: int | None = None
    spent: bool = False

    @staticmethod
    def parse(text: str) -> Fault:
        """Parse point:action[:rank[:step]]; ValueError names the variable."""
        point, _, remainder = text.partition(":")
        action, *where = remainder.split(":")
        if action not in ACTIONS or len(where) > 2 or not all(part.isdigit() or part == "" for part in where):
            raise ValueError(
                f"UNILATENT_FAULT: {text!r} is not point:action[:rank[:step]]; actions: {', '.join(ACTIONS)}"
            )
        numbers = [int(part) if part else None for part in where] + [None, None]
        return Fault(point, action, numbers[0], numbers[1])

    def happens(self, point: str, step: int | None) -> bool:
        rank = int(os.environ.get("RANK", "0"))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        matches = not restarts and point == self.point and self.rank in (None, rank) and self.step in (None, step)
        return matches and not self.spent


def _act(point: str, step: int | None = None) -> str:
    """Perform the armed fault. Return "nan" or "zero" if the caller should overwrite its values, otherwise ""."""
    assert ARMED is not None
    if not ARMED.happens(point, step):
        return ""
    ARMED.spent = ARMED.action not in POISONS or ARMED.step is not None
    match ARMED.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(1)
        case "raise":
            raise RuntimeError(f"fault injected at {point}")
        case "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "hang":
            time.sleep(1000)
    return ARMED.action if ARMED.action in POISONS else ""


def _nothing(point: str, step: int | None = None) -> str:
    """Replace `_act` if no fault is armed."""
    return ""


ARMED = Fault.parse(os.environ["UNILATENT_FAULT"]) if os.environ.get("UNILATENT_FAULT") else None
reach = _act if ARMED else _nothing
