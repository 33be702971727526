"""Whole runs by name: each file's PRESETS maps a name to a function that returns the run's configuration."""

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
    """Every preset of every file here, by name."""
    found: dict[str, Callable[[], RunConfig]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").PRESETS
    return found


def preset(name: str) -> RunConfig:
    """A preset's run; ConfigError suggests the nearest name."""
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"preset {name!r} is unknown{hint} See `unilatent presets`.")
    return presets()[name]().model_copy(update={"preset": name})


def summary(name: str) -> str:
    """The first paragraph of a preset's docstring and, where it is a variant, its arguments, in one line."""
    function = presets()[name]
    text = " ".join((inspect.getdoc(getattr(function, "func", function)) or "").split("\n\n")[0].split())
    given = inspect.signature(function.func).bind(*function.args).arguments if isinstance(function, partial) else {}
    return text + "".join(f" {key.replace('_', ' ')} {value.upper()}." for key, value in given.items())
