"""Two evaluations side by side; numbers made differently are not ranked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .evaluate import Measured
from .table import FORMAT, from_json, is_better


@dataclass(frozen=True)
class Comparison:
    """A metric in two evaluations. differences: (field, a, b) of their protocols; any of them forbids a ranking."""

    a: Measured
    b: Measured
    differences: list[tuple[str, Any, Any]]

    @property
    def verdict(self) -> str:
        """Which is better, or why nobody can say."""
        if self.differences:
            field, a, b = self.differences[0]
            more = f" and {len(self.differences) - 1} more" if len(self.differences) > 1 else ""
            return f"not comparable: {field} is {a!r} and {b!r}{more}"
        a, b = self.a.row, self.b.row
        if a.value == b.value or a.better == "same":
            return "equal" if a.value == b.value else "neither is better by itself"
        return "A is better" if is_better(a, b.value) else "B is better"


def read_evaluation(path: Path) -> list[Measured]:
    """The numbers of a file that `table.write` wrote; ValueError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, numbers = content["format_version"], content["numbers"]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a file that `unilatent evaluate` wrote") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not an evaluation; give a file that `unilatent evaluate` wrote") from None
    if version != FORMAT:
        raise ValueError(f"{path}: format_version {version}, this package reads {FORMAT}; evaluate again")
    try:
        return [from_json(number) for number in numbers]
    except (KeyError, TypeError, ConfigError) as error:
        raise ValueError(f"{path}: damaged ({error}); evaluate again") from None


def unshared(a: list[Measured], b: list[Measured]) -> list[Measured]:
    """The numbers of the first whose metric the second has not."""
    others = {measured.row.key for measured in b}
    return [measured for measured in a if measured.row.key not in others]


def compare(a: list[Measured], b: list[Measured]) -> list[Comparison]:
    """Every metric that both have; ValueError if they share none."""
    others = {measured.row.key: measured for measured in b}
    shared = [(measured, others[measured.row.key]) for measured in a if measured.row.key in others]
    if not shared:
        raise ValueError("compare: the two evaluations have no metric in common")
    return [Comparison(x, y, x.protocol.differences(y.protocol)) for x, y in shared]
