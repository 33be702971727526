"""Imports point down: the floors of CONTRIBUTING.md, no circle anywhere, and no modality that knows another one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import unilatent

PACKAGE = Path(unilatent.__file__).parent
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"
APART = {("modalities", "conditions"), ("conditions", "modalities")}
COMPONENTS = ("modalities", "methods", "conditions")
"""Folders in which an entry is a component, unless it is `base` or begins with an underscore."""

Sources = Mapping[str, str]
"""Path inside the package -> source."""


def floors() -> dict[str, int]:
    """Entry of the package -> its floor, from the table in CONTRIBUTING.md."""
    found: dict[str, int] = {}
    for line in CONTRIBUTING.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| (\d+) \| (.*?) \|.*", line):
            found |= {name.rstrip("/"): int(match[1]) for name in re.findall(r"`([a-z_/]+)`", match[2])}
    return found


FLOORS = floors()


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
    }


def imported(path: str, source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name below `unilatent`) of everything a file imports from this package, wherever in the file.

    `from ..maths import paths` gives ("maths", "paths"): what follows the module may be a submodule or a name in it.
    """
    here = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "unilatent":
                    yield node.lineno, tuple(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = here[: len(here) - node.level + 1] + module
            elif module[0] == "unilatent":
                base = module[1:]
            else:
                continue
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def file_of(name: tuple[str, ...], files: Iterable[str]) -> str | None:
    """The file that an imported name is defined in, or that it is."""
    for end in range(len(name), -1, -1):
        stem = "/".join(name[:end])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if candidate in files:
                return candidate
    return None


def upward(files: Sources) -> list[str]:
    """Every import of a higher floor, of a component by another one, and of anything that stands on no floor."""
    found = []
    for path, source in files.items():
        own = path.removesuffix(".py").split("/")
        if path == "__init__.py":
            continue  # the public face
        if own[0] not in FLOORS:
            found.append(f"{path}: {own[0]!r} stands on no floor; give it one in {CONTRIBUTING.name}")
            continue
        for line, name in imported(path, source):
            where = f"{path}:{line}: {'.'.join(name) or 'the package itself'}"
            if not name or name[0] not in FLOORS:
                found.append(f"{where} stands on no floor")
            elif FLOORS[name[0]] > FLOORS[own[0]]:
                found.append(f"{where} is above {own[0]}")
            elif (own[0], name[0]) in APART:
                found.append(f"{where}: {own[0]} must not know {name[0]}")
            elif sideways(own, name):
                found.append(f"{where}: {own[0]}/{own[1]} must not know another one of {own[0]}")
    return found


def sideways(own: list[str], name: tuple[str, ...]) -> bool:
    """Whether one modality, method or condition, or the code that they share, imports a component of its kind."""
    if own[0] != name[0] or own[0] not in COMPONENTS or len(own) < 2 or len(name) < 2:
        return False
    return own[1] != name[1] and name[1] != "base" and not name[1].startswith("_") and file_exists(own[0], name[1])


def file_exists(kind: str, name: str) -> bool:
    """Whether a name in a kind's folder is a module, and not something defined in its `__init__`."""
    return (PACKAGE / kind / name).is_dir() or (PACKAGE / kind / f"{name}.py").is_file()


def circles(files: Sources) -> list[str]:
    """In every folder, the entries (files, and folders as wholes) that reach each other through imports.

    A circle of files is one in the deepest folder that holds all of it, so this finds each, of files as of rooms.
    """
    arrows: dict[str, dict[str, set[str]]] = {}  # folder -> entry -> entries of the same folder it imports from
    for path, source in files.items():
        for _, name in imported(path, source):
            target = file_of(name, files)
            if target is None or target == path:
                continue
            a, b = path.split("/"), target.split("/")
            depth = next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
            arrows.setdefault("/".join(a[:depth]), {}).setdefault(a[depth], set()).add(b[depth])
    return [f"{folder or 'unilatent'}: {' <-> '.join(ring)}" for folder in arrows for ring in rings(arrows[folder])]


def rings(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes, each of which reaches all others of its group."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen, todo = set(), [start]
        while todo:
            for node in arrows.get(todo.pop(), set()) - seen:
                seen.add(node)
                todo.append(node)
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach.get(b, set()))) for a in reach if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def test_imports_point_down():
    assert upward(sources()) == []


def test_nothing_stands_in_a_circle():
    assert circles(sources()) == []


def test_every_entry_of_the_package_has_a_floor_and_every_floor_an_entry():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__pycache__", "__init__", "py.typed"} == set(FLOORS)


def test_every_file_is_read():
    paths = sources()
    assert len(paths) > 100 and "maths/paths.py" in paths and "methods/unite.py" in paths


UPWARD = [
    ("maths/x.py", "from ..nets import layers", "nets.layers is above maths"),
    ("maths/x.py", "import unilatent.training.trainer", "training.trainer is above maths"),
    ("types.py", "from .nets.layers import linear", "nets.layers.linear is above types"),
    ("nets/x.py", "def f():\n    from ..modalities.base import Modality", "x.py:2: modalities.base.Modality is above"),
    ("nets/x.py", "if TYPE_CHECKING:\n    from ..methods.unite import UNITE", "methods.unite.UNITE is above nets"),
    ("nets/x.py", "from .. import sampling", "sampling is above nets"),
    ("evaluation/x.py", "from ..training.trainer import Trainer", "training.trainer.Trainer is above evaluation"),
    ("runs/x.py", "from ..training.config import RunConfig", "training.config.RunConfig is above runs"),
    ("training/x.py", "from unilatent.presets import preset", "presets.preset is above training"),
    ("training/x.py", "from .. import __version__", "__version__ stands on no floor"),
    ("modalities/image/data.py", "from ...conditions.base import Condition", "modalities must not know conditions"),
    ("conditions/text.py", "from ..modalities import base", "conditions must not know modalities"),
    ("elsewhere/x.py", "", "stands on no floor"),
    ("methods/x.py", "from ..elsewhere import y", "stands on no floor"),
]
SIDEWAYS = [
    ("modalities/video/tokens.py", "from ..image.tokens import pack"),
    ("modalities/video.py", "from .image import Image"),
    ("modalities/_media/x.py", "from ..image.data import ImageData"),
    ("methods/other.py", "from .unite import UNITE"),
    ("conditions/other.py", "from . import class_label"),
]


@pytest.mark.parametrize(("path", "source", "words"), UPWARD)
def test_an_upward_import_is_noticed(path: str, source: str, words: str):
    found = upward({path: source})
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(("path", "source"), SIDEWAYS)
def test_a_sideways_import_is_noticed(path: str, source: str):
    found = upward({path: source})
    assert len(found) == 1 and "must not know another one" in found[0]


PLANTED = [
    # A circle of two files of one room, one of three, one through a name of a package, and circles of rooms.
    ({"nets/layers.py": "from .attention import attend"}, "nets: attention.py <-> embeddings.py <-> layers.py"),
    ({"maths/coding.py": "def f():\n    from . import solvers", "maths/paths.py": "from . import coding"},
     "maths: coding.py <-> paths.py <-> solvers.py"),
    ({"runs/journal.py": "from ..latents import encode_folder", "latents.py": "from .runs import journal"},
     "unilatent: latents.py <-> runs"),
    ({"modalities/_media/x.py": "from ..image import losses", "modalities/image/losses.py": "from .._media import x"},
     "modalities: _media <-> image"),
]  # fmt: skip


@pytest.mark.parametrize(("planted", "words"), PLANTED)
def test_a_circle_is_noticed(planted: dict[str, str], words: str):
    found = circles({**sources(), **planted})
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "modalities/image/metrics.py",
            "from ...maths.frechet import moments\nfrom ..base import Metric\nfrom . import data\n"
            "from .._media import captions",
        ),
        (
            "training/trainer.py",
            "from ..version import __version__\nfrom ..evaluation.table import table\nimport torch",
        ),
        ("__init__.py", "from .sampling import sample"),
        ("nets/attention.py", "from .layers import linear\nfrom ..types import Layout"),
        ("methods/unite.py", "from . import base\nfrom ..modalities.base import Modality"),
    ],
)
def test_lawful_imports_pass(path: str, source: str):
    assert upward({path: source}) == []
