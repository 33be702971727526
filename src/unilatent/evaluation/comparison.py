"""Comparison of two evaluations. Numbers computed under different protocols are not ranked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import read_json
from ..model_card import read_record
from .evaluate import EvaluatedMetric
from .table import FORMAT, from_json, is_better


@dataclass(frozen=True)
class Comparison:
    """A metric in two evaluations. differences: (field, a, b) of their protocols; with any, they are not ranked."""

    a: EvaluatedMetric
    b: EvaluatedMetric
    differences: list[tuple[str, Any, Any]]

    @property
    def verdict(self) -> str:
        """Which is better, or why they cannot be ranked."""
        if self.differences:
            field, a, b = self.differences[0]
            others = ", ".join(name for name, _, _ in self.differences[1:])
            more = f"; {others} {'differ' if len(self.differences) > 2 else 'differs'} too" if others else ""
            return f"not comparable: {field} is {a!r} in A and {b!r} in B{more}"
        a, b = self.a.row, self.b.row
        if a.value == b.value or a.better == "same":
            return "equal" if a.value == b.value else "neither is better by itself"
        return "A is better" if is_better(a, b.value) else "B is better"


def evaluations_of(folder: Path) -> list[Path]:
    """Return the files of the evaluations of a run, or in a folder that `evaluate` wrote, the newest first."""
    places = [folder / "eval", folder] if (folder / "eval").is_dir() else [folder]
    found = [path for place in places for kind in ("evaluation-*.json", "step_*.json") for path in place.glob(kind)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def evaluation_at(path: Path) -> Path:
    """Return the file of an evaluation, or the newest of a folder; ValueError if that has none."""
    if not path.is_dir():
        return path
    if not (found := evaluations_of(path)):
        raise ValueError(f"{path}: no evaluation in it; run `unilatent evaluate` on a run first, or give its JSON file")
    return found[0]


def outdated(source: Path, evaluation: Path) -> bool:
    """Whether a run's finished model is known to be another one than that of its evaluation."""
    record, evaluated = read_record(source / "model"), read_json(evaluation, "").get("fingerprint")
    return record is not None and evaluated is not None and evaluated != record.fingerprint


def read_evaluation(path: Path) -> list[EvaluatedMetric]:
    """Read a file that `table.write_evaluation` wrote; ValueError names the file and the fault."""
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


def unshared(a: list[EvaluatedMetric], b: list[EvaluatedMetric]) -> list[EvaluatedMetric]:
    """Return the results of `a` whose metric `b` does not have."""
    keys = {result.row.key for result in b}
    return [result for result in a if result.row.key not in keys]


def compare(a: list[EvaluatedMetric], b: list[EvaluatedMetric]) -> list[Comparison]:
    """Compare every metric that both have; ValueError if they share none."""
    by_key = {result.row.key: result for result in b}
    shared = [(result, by_key[result.row.key]) for result in a if result.row.key in by_key]
    if not shared:
        raise ValueError("compare: the two evaluations have no metric in common")
    return [Comparison(x, y, x.protocol.differences(y.protocol)) for x, y in shared]
