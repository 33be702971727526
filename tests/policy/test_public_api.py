"""The public names, and what importing them costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unilatent

HEAVY = ("torch", "torchvision", "transformers", "matplotlib", "datasets", "accelerate", "sklearn", "pydantic")
OPTIONAL = ("torchvision", "timm", "transformers", "rdkit", "av", "diffusers", "torchmetrics", "matplotlib", "datasets",
            "gradio", "starlette")  # fmt: skip

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import unilatent
names = [m.name for m in pkgutil.walk_packages(unilatent.__path__, "unilatent.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert "unilatent.training.trainer" in names and len(names) > 30
print(len(names))
"""


def python(code: str) -> str:
    source = str(Path(unilatent.__file__).parents[1])
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, unilatent; unilatent.__version__; print([n for n in {HEAVY} if n in sys.modules])"
    assert python(code).strip() == "[]"


def test_every_module_can_be_imported_without_optional_packages():
    assert int(python(IMPORT_ALL.format(blocked=OPTIONAL))) > 30


def test_public_names_resolve_and_are_documented():
    assert {"load", "sample", "reconstruct", "UNITE"} <= set(unilatent.__all__)
    for name in unilatent.__all__:
        value = getattr(unilatent, name)
        assert name == "__version__" or value.__doc__, name
    assert sorted(unilatent.__all__, key=lambda name: (not name.isupper(), name)) == unilatent.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'unilatent' has no attribute 'smaple'"):
        unilatent.smaple  # noqa: B018
    assert not hasattr(unilatent, "train")


def test_public_names_are_the_ones_for_type_checkers_too():
    import ast

    tree = ast.parse(Path(unilatent.__file__).read_text())
    typed = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.If)
             for line in ast.walk(node) if isinstance(line, ast.ImportFrom) for alias in line.names}  # fmt: skip
    assert typed == set(unilatent.__all__) - {"__version__"}


def test_relative_links_in_the_documents_resolve():
    root = Path(unilatent.__file__).parents[2]
    documents = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    assert documents
    for document in documents:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
