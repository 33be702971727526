"""A pytest plugin: the table of faults in docs/reliability.md, written by the tests that provoke them.

    PYTHONPATH=tests python -m pytest -p fault_table --fault-table docs/reliability.md -m "not slow and not soak"

Ids are F01 to F47. A test shows those in its name (`test_f27_f28_a_dead_process`) and in `@pytest.mark.covers("F05")`;
what it does is the first paragraph of its docstring, else its name. Rows of tests that a session leaves out keep their
last outcome. The command fails when a test does, and when an id has neither a test nor a reason in `REASONS`.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"
IDS = tuple(f"F{number:02d}" for number in range(1, 48))
TIERS = ("faults", "soak", "slow")
REASONS: dict[str, str] = {}
"""Why an id has no test. One that has a test must leave this list."""


@dataclass(frozen=True)
class Shown:
    """A test function that shows faults: its file below tests/, its name, what it does, its tier."""

    ids: tuple[str, ...]
    file: str
    name: str
    what: str
    tier: str

    @property
    def where(self) -> str:
        return f"`{self.file}` `{self.name}`"


def shown() -> list[Shown]:
    """Every test function that names an id, read off the sources, in the order of ids."""
    found = [one for path in sorted(TESTS.rglob("test_*.py")) for one in _in_file(path)]
    return sorted(found, key=lambda one: (one.ids, one.file, one.name))


def _in_file(path: Path) -> Iterator[Shown]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    everywhere = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
        for name in _attributes(node.value)
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and (ids := _ids(node)):
            marks = everywhere | {name for one in node.decorator_list for name in _attributes(one)}
            tier = next((tier for tier in TIERS if tier in marks), "test")
            yield Shown(ids, path.relative_to(TESTS).as_posix(), node.name, _what(node), tier)


def _attributes(node: ast.AST) -> set[str]:
    return {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}


def _ids(node: ast.FunctionDef) -> tuple[str, ...]:
    prefix = re.match(r"test_((?:f\d\d_)*)", node.name)
    assert prefix is not None
    named = prefix[1].upper().split("_")[:-1]
    marked = [
        argument.value
        for one in node.decorator_list
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "covers"
        for argument in one.args
        if isinstance(argument, ast.Constant)
    ]
    return tuple(sorted({*named, *marked}))


def _what(node: ast.FunctionDef) -> str:
    line = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    return line or re.sub(r"^test_(f\d\d_)*", "", node.name).replace("_", " ")


# ---- the table -----------------------------------------------------------------------------------------------------


def listed(document: Path) -> dict[str, str]:
    """The last written outcome of each row's test, by where it is."""
    return {cells[2]: cells[4] for cells in _rows(document)}


def listed_ids(document: Path) -> tuple[set[str], set[str]]:
    """Ids with a test, and ids with a reason or nothing, as the document has them."""
    tested, others = set(), set()
    for cells in _rows(document):
        (tested if cells[2] else others).update(cells[0].split(", "))
    return tested, others


def _rows(document: Path) -> list[list[str]]:
    inside = document.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in inside.splitlines() if line.startswith("| F")]


@dataclass
class Table:
    """Outcomes of this session, and the document they go into."""

    document: Path
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def note(self, report: pytest.TestReport) -> None:
        """A setup, call or teardown; of passes only the call counts."""
        if report.when == "call" or not report.passed:
            path, name = report.nodeid.partition("[")[0].split("::")[:2]
            where = f"`{Path(path).relative_to('tests').as_posix()}` `{name}`"
            self.outcomes.setdefault(where, Counter())[report.outcome] += 1

    def write(self, torch: str) -> None:
        """Puts the table into the document; `faults` says what is wrong with it."""
        before = listed(self.document)
        rows = [(one.ids, self._line(one, before, torch)) for one in shown()]
        missing = [key for key in IDS if not any(key in ids for ids, _ in rows)]
        for key in missing:
            rows.append(((key,), f"| {key} | {REASONS.get(key, 'not shown')} |  |  |  |"))
            if key not in REASONS:
                self.faults.append(f"{key} has neither a test nor a reason")
        table = [line for _, line in sorted(rows)]
        start, _, rest = self.document.read_text(encoding="utf-8").partition(BEGIN)
        old, _, end = rest.partition(END)
        said = next((line for line in old.splitlines() if line.startswith("Last run")), "")
        if any(one.tier != "soak" and one.where in self.outcomes for one in shown()):
            said = f"Last run of `make faults`: {date.today()}, torch {torch}."
        head = ["| fault | what the test does | test | tier | outcome |", "| --- | --- | --- | --- | --- |"]
        text = "\n".join([BEGIN, "", said, "", *head, *table, "", END])
        self.document.write_text(start + text + end, encoding="utf-8")

    def _line(self, one: Shown, before: dict[str, str], torch: str) -> str:
        outcome = before.get(one.where, "not run")
        if counts := self.outcomes.get(one.where):
            word = "FAILED" if counts["failed"] else "passed" if counts["passed"] else "skipped"
            outcome = f"{word} {counts[word.lower()]}" if sum(counts.values()) > 1 else word
            outcome += f", {date.today()}, torch {torch}" if one.tier == "soak" else ""
        if not outcome.startswith("passed"):
            self.faults.append(f"{', '.join(one.ids)}: {outcome}: {one.file}::{one.name}")
        return f"| {', '.join(one.ids)} | {one.what.replace('|', '/')} | {one.where} | {one.tier} | {outcome} |"


# ---- hooks ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="run the tests that show faults and write their table here")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fault-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Table(config.getoption("--fault-table"))), "fault-table-writer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fault-table"):
        known = {(one.file, one.name) for one in shown()}
        kept = [i for i in items if (i.path.relative_to(TESTS).as_posix(), getattr(i, "originalname", i.name)) in known]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


class _Writer:
    """Lives in the process that gathers reports, which with xdist runs no test itself."""

    def __init__(self, table: Table):
        self.table = table

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.table.note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        import torch

        if self.table.outcomes:
            self.table.write(torch.__version__.partition("+")[0])
        if self.table.faults:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("fault table")
        for line in self.table.faults or [f"{self.table.document}: every fault has a test that passed, or a reason"]:
            terminalreporter.line(line)
