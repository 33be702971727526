"""Many runs that differ in a few settings: a method's published ablations, or any grid, over several seeds.

Each run is a process of its own (`unilatent train ... --resume auto`), so that one that fails, or is stopped, costs no
other. A run that is finished is not trained again.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..config import ConfigError, flat
from ..evaluation.evaluate import EvaluatedMetric
from ..methods.base import Ablation
from ..modalities.base import Row
from ..plain_text import count_of
from ..registry import find
from ..runs.listing import describe as describe_run
from ..training.config import RunConfig
from ..training.resuming import refuse_other_settings
from .comparison import last_evaluation
from .plots import panels, titled

PUBLISHED = {"generation": "FID", "reconstruction": "rFID"}
"""Track of a metric -> the published number that it is compared with in direction."""
SHOWN = 2
"""Metrics of each track that are shown unless some are named."""


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep: name (of a folder), label, KEY=VALUE, and the paper's numbers of it and of the row that
    it compares it with, if any."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict, hash=False)
    base: Mapping[str, float] = field(default_factory=dict, hash=False)


PRESET = Cell("as-it-is", "as it is")
"""The run without changes: what all others are compared with."""


def ablation_cells(run: RunConfig, names: Sequence[str]) -> list[Cell]:
    """Return the named ablations of a run's method, or of its first stage's, but those that change nothing.

    ConfigError names one that neither has, and what there is.
    """
    stages = [("", run), *([("tokenizer.", run.first)] if run.first is not None else [])]
    varied = [(prefix, find("methods", stage.method.name).ablations) for prefix, stage in stages]
    prefix, known = next(((prefix, known) for prefix, known in varied if known), varied[0])
    unknown = [name for name in names if name not in known]
    if unknown:
        there = ", ".join(known) or "none"
        raise ConfigError(f"--ablate: {unknown[0]!r} is no ablation of this method; there are {there}")
    plain, cells = run.plain(), []
    for ablation in (ablation for name in dict.fromkeys(names) for ablation in known[name]):
        cell = _ablation_cell(run, ablation, prefix)
        if run.override(*cell.overrides).plain() != plain:
            cells.append(cell)
    return cells


def _ablation_cell(run: RunConfig, ablation: Ablation, prefix: str) -> Cell:
    values = flat(run.plain())
    scaled = []
    for key, factor in ablation.scales.items():
        name = key if key.startswith("modality.") else f"{prefix}{key}"  # a first stage has its run's modality
        if not isinstance(values.get(name), int | float):
            raise ConfigError(
                f"--ablate: {ablation.label!r} changes {name}, which is no number of this run; leave it out, or vary "
                "another setting, KEY=V1,V2"
            )
        value = values[name] * factor
        scaled.append(f"{name}={max(1, round(value)) if isinstance(values[name], int) else f'{value:.6g}'}")
    overrides = (*(f"{prefix}{text}" for text in ablation.overrides), *scaled)
    return Cell(_folder(ablation.label, overrides), ablation.label, overrides, ablation.published, ablation.base)


def grid_cells(axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Return all combinations of values: key -> values, in order, each once."""
    found = []
    for values in product(*axes.values()):
        overrides = tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(axes, values, strict=True))
        found.append(Cell(_folder(label, overrides), label, overrides))
    return list(dict.fromkeys(found))


def split_grid(assignments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate KEY=VALUE from KEY=V1,V2,...; commas inside brackets or quotes do not separate."""
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        values = list(_split(text))
        if len(values) > 1:
            axes[key.strip()] = values
        else:
            fixed.append(assignment)
    return fixed, axes


def _split(text: str) -> Iterator[str]:
    depth, quoted, start = 0, "", 0
    for place, letter in enumerate(text):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "\"'":
            quoted = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and not depth:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _folder(label: str, overrides: Sequence[str]) -> str:
    """The name of a cell's folder: its label, and a hash of its settings."""
    words = "-".join("".join(c if c.isalnum() or c in "._" else " " for c in label).split()).lower()
    return f"{words[:60]}-{hashlib.sha256(repr(tuple(overrides)).encode()).hexdigest()[:6]}"


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its cell, its seed, its folder and its configuration."""

    cell: Cell
    seed: int
    folder: Path
    config: RunConfig | None = field(default=None, compare=False)

    @property
    def is_finished(self) -> bool:
        """Whether it is trained to the end, and evaluated there: evaluations before the end do not count."""
        last = self.folder / "eval" / f"step_{describe_run(self.folder).step:08d}.json"
        return (self.folder / "model" / "config.json").is_file() and last.is_file()

    def refuse_other(self) -> None:
        """ConfigError if the folder holds a run of other settings, trained in another sweep."""

        def counts(key: str) -> bool:
            own = key.removeprefix("tokenizer.")  # of the first stage, the same settings count
            return own.partition(".")[0] in COUNT and own not in ANY and not key.startswith("method.tokenizer")

        if self.config is not None and (self.folder / "config.yaml").is_file():
            refuse_other_settings(self.config, self.folder, counts)


COUNT = ("seed", "data", "modality", "conditions", "method", "sampling", "given", "training")
"""Parts of a configuration that determine what comes out of a run."""
ANY = ("training.precision", "training.device", "training.threads", "training.workers", "training.timeout")
"""Settings that may differ from those of a run that is there: they are of the machine, or found on it."""


@dataclass(frozen=True)
class Failure:
    """A run that ended with an exit code other than 0, and the last line that it printed."""

    run: SweepRun
    code: int
    line: str


def run_all(
    runs: Sequence[SweepRun], preset: str, overrides: Sequence[str], jobs: int, stop: Callable[[], bool],
    progress: Callable[[SweepRun], object] = lambda run: None,
) -> list[Failure]:  # fmt: skip
    """Train all runs that are not finished, at most `jobs` at a time; return those that failed.

    stop: asked every fifth of a second; once true, running ones are told to save and stop, and no other begins.
    progress: called with each run that ends well.
    """
    waiting = [run for run in runs if not run.is_finished]
    running: dict[SweepRun, subprocess.Popen[bytes]] = {}
    failures: list[Failure] = []
    stopped = False
    try:
        while running or (waiting and not stopped):
            if stop() and not stopped:
                stopped = True
                for process in running.values():
                    _tell(process)
            while waiting and len(running) < jobs and not stopped:
                run = waiting.pop(0)
                running[run] = _start(run, preset, overrides)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                if code == 0 and run.is_finished:
                    progress(run)
                elif not stopped:
                    failures.append(Failure(run, code, _last_line(run)))
            time.sleep(0.2)
    finally:
        for process in running.values():
            _tell(process)
        for process in running.values():
            process.wait()
    return failures


def _start(run: SweepRun, preset: str, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unilatent", "train", preset, *overrides, *run.cell.overrides, f"seed={run.seed}",
               "--out", str(run.folder), "--resume", "auto"]  # fmt: skip
    with _log(run).open("ab") as log:
        return subprocess.Popen(  # a group of its own: Ctrl-C in a terminal reaches it once, through us
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "120"}, start_new_session=True
        )


def _log(run: SweepRun) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def _tell(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)


def _last_line(run: SweepRun) -> str:
    try:
        lines = _log(run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


# ---- what came out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A metric of a cell over its seeds: mean, and standard deviation (None of one seed)."""

    mean: float
    std: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class SweepRow:
    """A cell's numbers by metric, and what the paper (by track) and this sweep (by metric) say of it against the first
    cell: "better", "worse" or "equal" (here: within the spread of both)."""

    cell: Cell
    seeds: tuple[int, ...]
    numbers: dict[str, Measured]
    paper: dict[str, str]
    here: dict[str, str]


@dataclass(frozen=True)
class SweepResult:
    """Rows of a sweep. metrics: shown ones, by key, with one number each as an example of its name, unit and protocol.
    left_out: runs that are not compared, and why."""

    rows: list[SweepRow]
    metrics: dict[str, EvaluatedMetric]
    left_out: list[str]


def collect(runs: Sequence[SweepRun], wanted: Sequence[str] = ()) -> SweepResult:
    """Read the evaluations of finished runs. Numbers are compared only if their protocols are those of most runs.

    wanted: keys of metrics; (): the first ones of reconstructions and of samples that all finished runs have.
    ValueError if no run is finished, or none has a wanted metric.
    """
    found = {run: {m.row.key: m for m in last_evaluation(run.folder)} for run in runs if run.is_finished}
    left_out = [f"{run.cell.label}, seed {run.seed}: is not finished" for run in runs if run not in found]
    if not found:
        raise ValueError("sweep: no run is finished; run the same command again")
    keys = list(wanted) or _shown(list(found.values()))
    missing = [key for key in keys if not any(key in numbers for numbers in found.values())]
    if missing:
        known = dict.fromkeys(key for numbers in found.values() for key in numbers)
        raise ValueError(f"--metrics: {missing[0]!r} was not measured; there are {', '.join(known)}")
    examples = {key: _most_common([numbers[key] for numbers in found.values() if key in numbers]) for key in keys}
    for run, numbers in found.items():
        for key, example in examples.items():
            if key in numbers and (differing := numbers[key].protocol.differences(example.protocol)):
                what, a, b = differing[0]
                left_out.append(f"{run.cell.label}, seed {run.seed}: {key} has {what} {a}, others {b}")
                del numbers[key]
    rows: list[SweepRow] = []
    for cell in dict.fromkeys(run.cell for run in runs):
        own = {run.seed: numbers for run, numbers in found.items() if run.cell is cell}
        measured = {key: _measured([n[key].row.value for n in own.values() if key in n]) for key in keys}
        present = {key: value for key, value in measured.items() if value is not None}
        first = rows[0] if rows else None
        rows.append(SweepRow(cell, tuple(own), present, _paper(cell), _here(present, first, examples)))
    return SweepResult(rows, examples, left_out)


def _shown(found: list[dict[str, EvaluatedMetric]]) -> list[str]:
    common = [key for key in found[0] if all(key in numbers for numbers in found)]
    by_track: dict[str, list[str]] = {"reconstruction": [], "generation": []}
    for key in common:
        number = found[0][key]
        if number.row.headline and number.row.better in ("lower", "higher"):
            by_track[number.protocol.track].append(key)
    distances = [key for key in by_track["generation"] if found[0][key].row.better == "lower"]
    others = [key for key in by_track["generation"] if key not in distances]
    return [*by_track["reconstruction"][:SHOWN], *(distances + others)[:SHOWN]]


def _most_common(numbers: list[EvaluatedMetric]) -> EvaluatedMetric:
    """One of the numbers whose protocol most others share."""
    return max(numbers, key=lambda n: sum(not n.protocol.differences(other.protocol) for other in numbers))


def _measured(values: list[float]) -> Measured | None:
    if not values:
        return None
    return Measured(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


def _paper(cell: Cell) -> dict[str, str]:
    """The direction of each published number against that of the paper's own base."""
    said = {}
    for track, name in PUBLISHED.items():
        if name in cell.published and name in cell.base:
            a, b = cell.base[name], cell.published[name]
            said[track] = "equal" if math.isclose(a, b, rel_tol=0.02) else "better" if b < a else "worse"
    return said


def _here(
    numbers: dict[str, Measured], first: SweepRow | None, examples: dict[str, EvaluatedMetric]
) -> dict[str, str]:  # fmt: skip
    """The direction of each metric's mean against that of the first cell; nothing where a spread is unknown."""
    said = {}
    for key, own in numbers.items():
        base = first.numbers.get(key) if first else None
        if base is None or own.std is None or base.std is None:
            continue
        gain = _gain(examples[key].row, own.mean, base.mean)
        if gain is None:
            continue
        spread = math.hypot(own.std, base.std)
        said[key] = "equal" if abs(gain) <= spread else "better" if gain > 0 else "worse"
    return said


def _gain(row: Row, value: float, base: float) -> float | None:
    """By how much a number is better than another one of its metric. Where closer to the baselines is better, there is
    one answer for one baseline alone; else None."""
    if row.better != "same":
        return value - base if row.better == "higher" else base - value
    if len(row.beside) != 1:
        return None
    [ideal] = row.beside.values()
    return abs(base - ideal) - abs(value - ideal)


def table_of(result: SweepResult) -> list[list[str]]:
    """Return the table as rows of texts, the first one the head."""
    head = ["", "seeds", *(f"{m.row.name}{f', {m.row.unit}' if m.row.unit else ''}" for m in result.metrics.values()),
            "paper: samples, reconstructions"]  # fmt: skip
    rows = [head]
    for row in result.rows:
        cells = []
        for key in result.metrics:
            number = row.numbers.get(key)
            spread = "" if number is None or number.std is None else f" +- {number.std:.3g}"
            said = f" ({row.here[key]})" if key in row.here else ""
            cells.append("" if number is None else f"{number.mean:.4g}{spread}{said}")
        numbers = [f"{name} {row.cell.published[name]:g}" for name in PUBLISHED.values() if name in row.cell.published]
        words = [row.paper[track] for track in PUBLISHED if track in row.paper]
        paper = ", ".join(numbers) + (f" ({', '.join(words)})" if words else "")
        rows.append([row.cell.label, str(len(row.seeds)), *cells, paper])
    return rows


def plain(result: SweepResult) -> dict[str, Any]:
    """Return the result as plain data."""
    metrics = {
        key: {"name": m.row.name, "unit": m.row.unit, "better": m.row.better, "protocol": m.protocol.plain()}
        for key, m in result.metrics.items()
    }
    rows = []
    for row in result.rows:
        numbers = {
            key: {"mean": n.mean, "std": n.std, "values": list(n.values)} for key, n in row.numbers.items()
        }  # fmt: skip
        rows.append(
            {"cell": row.cell.label, "overrides": list(row.cell.overrides), "seeds": list(row.seeds),
             "numbers": numbers, "published": dict(row.cell.published), "paper": row.paper, "here": row.here}
        )  # fmt: skip
    return {"metrics": metrics, "rows": rows, "left_out": result.left_out}


def describe(runs: Sequence[SweepRun]) -> str:
    """Return how many runs there are and how many are finished, in words."""
    done = sum(run.is_finished for run in runs)
    cells = len(dict.fromkeys(run.cell for run in runs))
    return f"{count_of(cells, 'setting')}, {count_of(len(runs), 'run')}, {done} of them finished"


def draw_sweep(result: SweepResult, path: Path) -> None:
    """Draw each metric of a sweep by setting: the mean, the standard deviation over seeds, and each seed."""
    labels = [row.cell.label for row in result.rows]
    with panels(path, len(result.metrics)) as axes:
        for panel, (key, example) in zip(axes, result.metrics.items(), strict=True):
            better = "closer to the baselines" if example.row.better == "same" else example.row.better
            titled(panel, f"{example.row.name} ({better} is better)", example.row.unit, "")
            for place, row in enumerate(result.rows):
                if (number := row.numbers.get(key)) is not None:
                    panel.errorbar(number.mean, place, xerr=number.std, fmt="o", color="C0")
                    panel.plot(number.values, [place] * len(number.values), ".", color="0.6", markersize=4)
            if (first := result.rows[0].numbers.get(key)) is not None:
                panel.axvline(first.mean, linestyle="--", linewidth=0.8, color="0.4", label=labels[0])
                panel.legend(fontsize=7)
            panel.set_yticks(range(len(labels)), labels, fontsize=8)
            panel.invert_yaxis()
