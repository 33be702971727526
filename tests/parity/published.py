"""Import of single modules of torch-fidelity and pytorch-fid, without their packages' `__init__`.

The packages import torchvision, which does not exist for every build of torch. Tests are skipped where they are not
installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PARTS = ("datasets", "transforms", "transforms.functional", "models", "models.inception")
"""Modules of torchvision that they import."""


class Blank(ModuleType):
    """A module in which every name is an empty class: enough for imports and subclasses, not to compute anything."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def blank_torchvision() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {"torchvision": Blank("torchvision")}
    for part in PARTS:
        parent, _, child = f"torchvision.{part}".rpartition(".")
        modules[f"torchvision.{part}"] = Blank(f"torchvision.{part}")
        setattr(modules[parent], child, modules[f"torchvision.{part}"])
    return modules


def published(name: str) -> ModuleType:
    """Import `package.module` without the package's `__init__`; skip the test if it is not installed."""
    if name in sys.modules:
        return sys.modules[name]
    package = name.split(".")[0]
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if package not in sys.modules:
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        shell = Blank(package)
        shell.__path__ = [str(Path(spec.origin).parent)]
        sys.modules[package] = shell
    blanks = {} if importlib.util.find_spec("torchvision") else blank_torchvision()
    sys.modules.update(blanks)
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")
    finally:
        for key in blanks:
            del sys.modules[key]
