"""The file name is the registry: find("methods", "unite") is the class defined in unilatent/methods/unite.py.

Names come from the package's own folders only; nothing a config file says can import anything else.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

BASES = {"methods": "LatentModel", "modalities": "Modality", "conditions": "Condition"}
"""Each kind's interface, defined in its `base` module; a component's file defines exactly one public subclass."""


@cache
def available(kind: str) -> tuple[str, ...]:
    """Names of all components of a kind, sorted."""
    package = importlib.import_module(f"unilatent.{kind}")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in names if name != "base"))


@cache
def find(kind: str, name: str) -> Any:
    """The class of a component; ValueError lists those that exist."""
    if kind not in BASES:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(BASES)}")
    if name not in available(kind):
        raise ValueError(f"{kind} name {name!r} is unknown; available: {', '.join(available(kind))}")
    base = getattr(importlib.import_module(f"unilatent.{kind}.base"), BASES[kind])
    module = importlib.import_module(f"unilatent.{kind}.{name}")
    own = [
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not key.startswith("_")
    ]
    assert len(own) == 1, f"unilatent/{kind}/{name} must define exactly one {BASES[kind]}, found {own}"
    return own[0]
