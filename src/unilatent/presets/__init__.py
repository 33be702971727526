"""Configurations of whole runs by name.

PRESETS of each file maps names to functions that return a run's configuration; `_shared.py` has what they share.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache, partial

from ..config import ConfigError
from ..training.config import RunConfig


@cache
def presets() -> dict[str, Callable[[], RunConfig]]:
    """Return the presets of all files here, by name."""
    functions: dict[str, Callable[[], RunConfig]] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            functions |= importlib.import_module(f"{__name__}.{module.name}").PRESETS
    return functions


def preset(name: str) -> RunConfig:
    """Return the run of a preset; ConfigError suggests the nearest name."""
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ConfigError(f"preset {name!r} is unknown{hint} see `unilatent presets`")
    return presets()[name]().model_copy(update={"preset": name})


def summary(name: str) -> str:
    """Return the first paragraph of a preset's docstring and the arguments of a variant, in one line."""
    function = presets()[name]
    text = " ".join((inspect.getdoc(getattr(function, "func", function)) or "").split("\n\n")[0].split())
    variant = inspect.signature(function.func).bind(*function.args).arguments if isinstance(function, partial) else {}
    return text + "".join(f" {key.replace('_', ' ')} {value.upper()}." for key, value in variant.items())
