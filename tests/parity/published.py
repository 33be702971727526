"""Modules of torch-fidelity and pytorch-fid, each on its own: what their packages import needs a working torchvision,
which is not to be had for every build of torch. Where they are not installed, tests that ask for them are skipped."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PARTS = ("datasets", "transforms", "transforms.functional", "models", "models.inception")
"""Of torchvision, those that are imported."""


class Blank(ModuleType):
    """Any name in it is a bare class: enough to be imported and subclassed, never to compute anything."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def blank_torchvision() -> dict[str, ModuleType]:
    found: dict[str, ModuleType] = {"torchvision": Blank("torchvision")}
    for part in PARTS:
        parent, _, child = f"torchvision.{part}".rpartition(".")
        found[f"torchvision.{part}"] = Blank(f"torchvision.{part}")
        setattr(found[parent], child, found[f"torchvision.{part}"])
    return found


def published(name: str) -> ModuleType:
    """`package.module`, without running the package's own `__init__`; skips where the package is not installed."""
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
