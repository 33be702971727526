"""A release is complete: one version everywhere, data in the wheel, templates that work, a doctor that knows all
dependencies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import unilatent
from unilatent.cli.doctor import LIBRARIES
from unilatent.training.loggers import LOGGERS
from unilatent.version import __version__

PACKAGE = Path(unilatent.__file__).parent
ROOT = PACKAGE.parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()  # type: ignore[index]


def test_the_version_is_one():
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "unilatent.version.__version__"}
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == __version__


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["license"] == PROJECT[
        "license"
    ]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_every_file_of_the_package_is_in_the_wheel():
    """Files that are no Python source are named by `package-data`."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["unilatent"]
    named = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    compiled = PYPROJECT["tool"]["setuptools"]["exclude-package-data"]["unilatent"]
    named = {path for path in named if not any(path.match(pattern) for pattern in compiled)}
    assert others == {path for path in named if path.is_file()} and len(others) > 8


def test_supported_versions_of_python_are_stated_once_and_alike():
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert f"| Python | {', '.join(versions)} |" in (ROOT / "docs" / "releasing.md").read_text()


def test_the_source_archive_has_all_that_is_here():
    """MANIFEST.in names every kind of file outside `src`, so that tests run from an unpacked archive."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    always = {"README.md", "LICENSE", "NOTICE", "pyproject.toml", "MANIFEST.in"}  # setuptools takes them by itself
    for path in (path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")):
        assert path.name in always or re.search(rf"^include .*\b{re.escape(path.name)}\b", manifest, re.MULTILINE), path
    for folder in (".github", "benchmarks", "docs", "tests"):
        taken = re.search(rf"^recursive-include {re.escape(folder)} (.*)", manifest, re.MULTILINE)
        assert taken is not None, folder
        kinds = {path.suffix for path in (ROOT / folder).rglob("*") if path.is_file()} - {".pyc", ""}
        assert kinds <= {pattern.removeprefix("*") for pattern in taken[1].split()}, folder


def test_the_doctor_lists_every_dependency():
    known = {name.lower() for names in LIBRARIES.values() for name in names}
    parts = {"core": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    needed = {name_of(line) for part, lines in parts.items() if part != "dev" for line in lines}
    assert needed - known - {"unilatent"} == set()


def test_every_logger_has_an_extra():
    assert set(LOGGERS) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms(path: Path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert "blank_issues_enabled" in content
        return
    assert {"name", "description", "body"} <= content.keys()
    for part in content["body"]:
        assert part["type"] == "textarea" and part["attributes"]["label"]
    identifiers = [part["id"] for part in content["body"]]
    assert len(set(identifiers)) == len(identifiers)


def test_a_bug_report_asks_for_the_doctor():
    assert len(TEMPLATES) >= 3
    assert "doctor --report" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
