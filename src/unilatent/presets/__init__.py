"""Configurations of whole runs by name.

PRESETS of each file maps names to a `PresetEntry`: a function that returns a run's configuration, and the published
numbers of exactly these settings. `_shared.py` has what they share.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import cache, partial
from pathlib import Path

from ..config import ConfigError
from ..training.config import RunConfig
from ._shared import PresetEntry


@cache
def presets() -> dict[str, PresetEntry]:
    """Return the presets of all files here, by name."""
    found: dict[str, PresetEntry] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            found |= importlib.import_module(f"{__name__}.{module.name}").PRESETS
    return found


def preset(name: str) -> RunConfig:
    """Return the run of a preset; ConfigError suggests the nearest name."""
    return find_preset(name)().model_copy(update={"preset": name})


def find_preset(name: str) -> PresetEntry:
    """Return a preset; ConfigError suggests the nearest name."""
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        if (Path(name) / "config.yaml").is_file():
            hint = f"; that is a run: give {Path(name) / 'config.yaml'} for its configuration, or"
        raise ConfigError(f"preset {name!r} is unknown{hint} see `unilatent presets`")
    return presets()[name]


def summary(name: str) -> str:
    """Return the first paragraph of a preset's docstring and the arguments of a variant, in one line."""
    function = presets()[name].make
    text = " ".join((inspect.getdoc(getattr(function, "func", function)) or "").split("\n\n")[0].split())
    variant = inspect.signature(function.func).bind(*function.args).arguments if isinstance(function, partial) else {}
    return text + "".join(f" {key.replace('_', ' ')} {str(value).upper()}." for key, value in variant.items())
