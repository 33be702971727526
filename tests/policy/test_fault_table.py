"""Every fault of the list has a test or a reason, and the document says which."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import fault_table
from fault_table import BEGIN, END, IDS, REASONS, Table, listed, listed_ids, shown

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


@cache
def covered() -> set[str]:
    return {key for one in shown() for key in one.ids}


def test_every_fault_has_a_test_or_a_reason():
    assert [key for key in IDS if key not in covered() and key not in REASONS] == []


def test_no_test_shows_a_fault_that_is_none():
    assert covered() <= set(IDS) and set(REASONS) <= set(IDS)


def test_a_reason_ends_where_a_test_begins():
    assert [key for key in REASONS if key in covered()] == [], "these have tests now: take their reasons out"


def test_a_reason_says_why_a_fault_cannot_happen():
    """What is only not done yet is no reason."""
    assert [key for key, reason in REASONS.items() if not reason.startswith("not applicable: ")] == []


def test_the_document_shows_no_failure():
    """A table is committed when its tests pass."""
    assert [where for where, outcome in listed(DOCUMENT).items() if "FAILED" in outcome] == []


def test_the_document_lists_what_there_is():
    """Run `make faults` (or `make soak`) after adding a fault test."""
    assert listed_ids(DOCUMENT) == (covered(), set(IDS) - covered())


def test_ids_come_from_names_and_marks_and_tiers_from_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "test_x.py").write_text(
        'import pytest\npytestmark = [pytest.mark.faults]\ndef test_f27_f28_both_end(): ...\n'
        '@pytest.mark.covers("F05")\n@pytest.mark.soak\ndef test_out():\n    """It is\n    refused.\n\n    More."""\n'
        "def test_other(): ...\n"
    )  # fmt: skip
    (tmp_path / "test_y.py").write_text("def test_f01_x(): ...\n")
    monkeypatch.setattr(fault_table, "TESTS", tmp_path)
    assert [(one.ids, one.file, one.name, one.what, one.tier) for one in shown()] == [
        (("F01",), "test_y.py", "test_f01_x", "x", "test"),
        (("F05",), "runs/test_x.py", "test_out", "It is refused", "faults"),
        (("F27", "F28"), "runs/test_x.py", "test_f27_f28_both_end", "both end", "faults"),
    ]


def report(node: str, outcome: str, when: str = "call") -> pytest.TestReport:
    return pytest.TestReport(node, ("", 0, ""), {}, outcome, None, when)  # type: ignore[arg-type]


def test_the_table_is_written_kept_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_x.py").write_text(
        "import pytest\ndef test_f01_a(): ...\n@pytest.mark.soak\ndef test_f02_b(): ...\ndef test_f03_c(): ...\n"
    )
    monkeypatch.setattr(fault_table, "TESTS", tests)
    monkeypatch.setattr(fault_table, "IDS", ("F01", "F02", "F03", "F04", "F05"))
    monkeypatch.setattr(fault_table, "REASONS", {"F04": "not applicable: none"})
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")

    def session(*reports: pytest.TestReport) -> list[str]:
        table = Table(document)
        for one in reports:
            table.note(one)
        table.write("9.9")
        return table.faults

    first = session(
        report("tests/test_x.py::test_f01_a[1]", "passed"), report("tests/test_x.py::test_f01_a[2]", "passed"),
        report("tests/test_x.py::test_f01_a[2]", "passed", "teardown"),
        report("tests/test_x.py::test_f03_c", "failed", "setup"),
    )  # fmt: skip
    assert first == [
        "F02: not run: test_x.py::test_f02_b", "F03: FAILED: test_x.py::test_f03_c",
        "F05 has neither a test nor a reason",
    ]  # fmt: skip
    second = session(report("tests/test_x.py::test_f02_b", "passed"), report("tests/test_x.py::test_f03_c", "passed"))
    assert second == ["F05 has neither a test nor a reason"]
    outcomes = listed(document)
    assert outcomes["`test_x.py` `test_f01_a`"] == "passed 2", "kept from the first session"
    assert outcomes["`test_x.py` `test_f02_b`"].endswith("torch 9.9")
    assert session(report("tests/test_x.py::test_f01_a", "skipped", "setup"))[0].startswith("F01: skipped")
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count(BEGIN) == 1
    assert listed_ids(document) == ({"F01", "F02", "F03"}, {"F04", "F05"})
