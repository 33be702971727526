"""Imports point down: to the same floor or lower; modalities and conditions do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unilatent

PACKAGE = Path(unilatent.__file__).parent
FLOORS = (
    ("types", "config", "registry", "files", "devices", "faults", "progress", "maths"),
    ("nets", "pretrained", "records", "shards"),
    ("modalities", "conditions", "atoms"),
    ("methods",),
    ("training", "sampling", "evaluation", "analysis", "importers", "loading", "latents"),
    ("presets",),
    ("cli", "demo", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
APART = [("modalities", "conditions"), ("conditions", "modalities")]
EXEMPT = {"__init__.py"}
"""The public surface."""


def sources() -> Iterator[tuple[str, str]]:
    """(path inside the package, source) of every file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


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


def faults(path: str, source: str) -> list[str]:
    """Every import of a file that points up or sideways."""
    own = path.removesuffix(".py").split("/")
    if path in EXEMPT:
        return []
    if own[0] not in FLOOR:
        return [f"{path}: {own[0]!r} stands on no floor; give it one in {Path(__file__).name}"]
    found = []
    for line, name in imported(path, source):
        if not name or (len(name) == 1 and name[0] not in FLOOR):
            continue  # the package itself, or a name such as __version__
        if name[0] not in FLOOR:
            found.append(f"{path}:{line}: {'.'.join(name)} stands on no floor")
        elif FLOOR[name[0]] > FLOOR[own[0]]:
            found.append(f"{path}:{line}: {'.'.join(name)} is above {own[0]}")
        elif (own[0], name[0]) in APART:
            found.append(f"{path}:{line}: {own[0]} must not know {name[0]}")
        elif (
            own[0] == name[0] == "modalities" and len(own) > 1 and own[1] != "base" and name[1] not in ("base", own[1])
        ):
            found.append(f"{path}:{line}: a modality must not know another one ({name[1]})")
    return found


def test_imports_point_down():
    assert [fault for path, source in sources() for fault in faults(path, source)] == []


def test_every_file_is_read():
    paths = [path for path, _ in sources()]
    assert len(paths) > 30 and "maths/paths.py" in paths and "methods/unite.py" in paths


OFFENDERS = [
    ("maths/x.py", "from ..nets import layers", "nets.layers is above maths"),
    ("maths/x.py", "import unilatent.training.trainer", "training.trainer is above maths"),
    ("types.py", "from .nets.layers import linear", "nets.layers.linear is above types"),
    (
        "nets/x.py",
        "def f():\n    from ..modalities.base import Modality",
        "x.py:2: modalities.base.Modality is above nets",
    ),
    ("nets/x.py", "if TYPE_CHECKING:\n    from ..methods.unite import UNITE", "methods.unite.UNITE is above nets"),
    ("nets/x.py", "from .. import sampling", "sampling is above nets"),
    ("training/x.py", "from unilatent.presets import preset", "presets.preset is above training"),
    ("modalities/image/data.py", "from ...conditions.base import Condition", "modalities must not know conditions"),
    ("conditions/text.py", "from ..modalities import base", "conditions must not know modalities"),
    ("modalities/video/tokens.py", "from ..image.tokens import pack", "must not know another one (image)"),
    ("modalities/video.py", "from .image import Image", "must not know another one (image)"),
    ("elsewhere/x.py", "", "stands on no floor"),
    ("methods/x.py", "from ..elsewhere import y", "stands on no floor"),
]


@pytest.mark.parametrize(("path", "source", "words"), OFFENDERS)
def test_offences_are_noticed(path: str, source: str, words: str):
    found = faults(path, source)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "modalities/image/metrics.py",
            "from ...maths.frechet import moments\nfrom ..base import Metric\nfrom . import data",
        ),
        ("training/trainer.py", "from .. import __version__\nfrom ..evaluation.judging import judge\nimport torch.nn"),
        ("__init__.py", "from .sampling import sample"),
        ("nets/attention.py", "from .layers import linear\nfrom ..types import Layout"),
    ],
)
def test_lawful_imports_pass(path: str, source: str):
    assert faults(path, source) == []
