"""Components are registered by file name: find("methods", "unite") is the class defined in unilatent/methods/unite.py.

Only modules of this package can be found; a config file cannot import anything else.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

BASES = {"methods": "LatentModel", "modalities": "Modality", "conditions": "Condition"}
"""The base class of each kind, from its `base` module. A component's file defines exactly one public subclass."""


@cache
def available(kind: str) -> tuple[str, ...]:
    """Return the sorted names of all components of a kind; modules with a leading underscore are shared code."""
    package = importlib.import_module(f"unilatent.{kind}")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in names if name != "base" and not name.startswith("_")))


@cache
def find(kind: str, name: str) -> Any:
    """Return the class of a component; ValueError lists all names."""
    if kind not in BASES:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(BASES)}")
    if name not in available(kind):
        raise ValueError(f"{kind} name {name!r} is unknown; available: {', '.join(available(kind))}")
    base = getattr(importlib.import_module(f"unilatent.{kind}.base"), BASES[kind])
    module = importlib.import_module(f"unilatent.{kind}.{name}")
    classes = [
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not key.startswith("_")
    ]
    assert len(classes) == 1, f"unilatent/{kind}/{name} must define exactly one {BASES[kind]}, found {classes}"
    return classes[0]
