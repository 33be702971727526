"""Nobody else knows their names: a component is known in its own file, in presets and importers, and nowhere else."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from test_imports import imported, sources

from unilatent.registry import BASES, available, find

EXEMPT = ("presets/", "importers/")
FILES = ("__init__.py",)


def components() -> dict[tuple[str, str], set[str]]:
    """(kind, name) -> its classes: the component, its Config and, for a modality, its DataConfig."""
    found = {}
    for kind in BASES:
        for name in available(kind):
            cls = find(kind, name)
            found[kind, name] = {
                cls.__name__,
                *(getattr(cls, c).__name__ for c in ("Config", "DataConfig") if hasattr(cls, c)),
            }
    return found


def docstrings(tree: ast.AST) -> set[int]:
    """Strings that stand alone as a statement: documentation."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def foreign(tree: ast.AST) -> set[str]:
    """Names that a file imports from other packages: Pillow's Image is no modality."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] != "unilatent"
        for alias in node.names
    }


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and not _of_foreign_module(node):
            yield node.lineno, node.attr


def _of_foreign_module(node: ast.Attribute) -> bool:
    """Pillow's `Image.Image`, Gradio's `gr.Image`, under whatever name the module was imported."""
    return isinstance(node.value, ast.Name) and node.value.id in ("Image", "PIL", "gr")


def faults(path: str, source: str, known: dict[tuple[str, str], set[str]]) -> list[str]:
    """Every place in a file that names a component it has no business with."""
    if path.startswith(EXEMPT) or path in FILES:
        return []
    tree = ast.parse(source)
    documentation, others = docstrings(tree), foreign(tree)
    imports, names = list(imported(path, source)), list(identifiers(tree))
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documentation]
    found = []
    for (kind, name), classes in known.items():
        if path == f"{kind}/{name}.py" or path.startswith(f"{kind}/{name}/"):
            continue
        found += [f"{path}:{line}: imports {kind}.{name}" for line, what in imports if what[:2] == (kind, name)]
        found += [f"{path}:{line}: names {what}" for line, what in names if what in classes - others]
        found += [f"{path}:{node.lineno}: the string {name!r}" for node in constants if node.value == name]
    return found


def test_nobody_else_knows_their_names():
    known = components()
    assert [fault for path, source in sources().items() for fault in faults(path, source, known)] == []


def test_components_are_known_by_what_they_are():
    assert components()["methods", "unite"] == {"UNITE", "UNITEConfig"}
    assert components()["modalities", "image"] == {"Image", "ImageConfig", "ImageData"}


OFFENDERS = [
    ("training/trainer.py", 'if config.method.name == "unite":\n    pass', "the string 'unite'"),
    ("sampling.py", "from .methods.unite import MIN_TIME", "imports methods.unite"),
    ("sampling.py", "from .methods import unite as method", "imports methods.unite"),
    ("cli/train.py", "def f():\n    import unilatent.modalities.image.data", "imports modalities.image"),
    ("evaluation/x.py", "def f(model):\n    return isinstance(model, UNITE)", "names UNITE"),
    ("evaluation/x.py", "kinds = base.ImageConfig", "names ImageConfig"),
    ("methods/unite.py", 'CONDITION = {"class_label": 1}', "the string 'class_label'"),
    ("methods/other.py", 'TEACHER = "unite"', "the string 'unite'"),
    ("config.py", "def f(x):\n    match x:\n        case 'image':\n            pass", "the string 'image'"),
]


@pytest.mark.parametrize(("path", "source", "words"), OFFENDERS)
def test_offences_are_noticed(path: str, source: str, words: str):
    assert [words in fault for fault in faults(path, source, components())] == [True]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("methods/unite.py", 'class UNITE:\n    name = "unite"'),
        ("presets/x.py", "from ..methods.unite import UNITEConfig"),
        ("importers/x.py", 'METHOD = "unite"'),
        ("modalities/image/data.py", "from . import tokens\nx = ImageData()"),
        (
            "cli/x.py",
            '"""image"""\nfrom PIL import Image\n\ndef f() -> Image.Image:\n    """unite"""\n    return Image.new()',
        ),
        ("sampling.py", 'message = "a UNITE model of an image"'),
    ],
)
def test_lawful_mentions_pass(path: str, source: str):
    assert faults(path, source, components()) == []


def defined(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Public class or type alias -> the files that define it."""
    places: dict[str, list[str]] = {}
    for path, source in files.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names = [node.targets[0].id]
            else:
                continue
            for name in names:
                if re.fullmatch("[A-Z]+[a-z]\\w*", name):  # no constant, no type variable, nothing private
                    places.setdefault(name, []).append(path)
    return places


def test_a_public_name_means_one_thing():
    assert {name: files for name, files in defined(sources()).items() if len(files) > 1} == {}


def test_a_second_meaning_is_noticed():
    files = {
        "a.py": "class Rows: ...",
        "b.py": "Rows = list[int]\nROWS = 3\nclass _Rows: ...",
        "c.py": "class ROW: ...",
    }
    assert defined(files) == {"Rows": ["a.py", "b.py"]}


def test_tests_of_a_policy_see_the_real_files():
    """The checks read the same files that are imported."""
    assert Path(inspect.getsourcefile(find("methods", "unite"))).name == "unite.py"
