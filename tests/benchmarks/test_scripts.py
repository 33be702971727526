"""Benchmarks run by hand, and rarely: what they take from the package exists."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


def absent(script: Path) -> list[str]:
    """Return the names that a script takes from modules of the package, and that these do not have."""
    tree, modules, missing = ast.parse(script.read_text(encoding="utf-8")), dict[str, ModuleType](), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("unilatent"):
            continue
        source = importlib.import_module(str(node.module))
        for alias in node.names:
            found = getattr(source, alias.name, None)
            if found is None:
                try:
                    found = importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    missing.append(f"{node.module}.{alias.name}")
            if isinstance(found, ModuleType):
                modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    return missing


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_package_exists(script: Path) -> None:
    pytest.importorskip("rdkit")
    pytest.importorskip("pymatgen.core")
    assert absent(script) == []


def test_a_name_that_was_renamed_is_found(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(
        "from unilatent.modalities.crystal import plausibility\nfrom unilatent.batches import none\n"
        "plausibility.KnownTypes()\nplausibility.KnownTypeShare()\n"
    )
    names = ["unilatent.batches.none", "unilatent.modalities.crystal.plausibility.KnownTypes"]
    assert absent(tmp_path / "old.py") == names
