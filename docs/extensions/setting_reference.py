"""The reference of all settings of a run, from the configuration classes and their docstrings."""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from command_reference import escaped
from docstrings import ENTRY, entries
from pydantic_core import PydanticUndefined
from sphinx.pycode import ModuleAnalyzer

from unilatent.config import Config
from unilatent.model_config import ModelConfig
from unilatent.registry import available, find
from unilatent.training.config import RunConfig

KINDS = {"modalities": "modality", "conditions": "conditions.NAME", "methods": "method"}
"""What has a file for each name, and where its settings are."""


def markdown() -> str:
    """Return a section for each configuration class, with a table of its fields."""
    shown: set[type[Config]] = set()
    parts = ["## The run", *tables("", RunConfig, shown)]
    for kind, place in KINDS.items():
        for name in available(kind):
            component = find(kind, name)
            parts += [f"## {place.replace('NAME', name)}" + (f": {name}" if "NAME" not in place else "")]
            parts += tables(place.replace("NAME", name), component.Config, shown)
            if kind == "modalities":
                parts += [f"### data, of {name}", *tables("data", component.DataConfig, shown)]
    return "\n\n".join(parts)


def tables(place: str, config: type[Config], shown: set[type[Config]]) -> Iterator[str]:
    """Yield the table of a class, then those of the classes in its fields that no table shows yet."""
    shown.add(config)
    texts = meanings(config)
    rows, inner = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"], []
    for name, field in config.model_fields.items():
        if name == "name" and typing.get_origin(field.annotation) is Literal:
            continue  # chooses the file; the heading says it
        key = f"{place}.{name}".strip(".")
        found = list(classes(field.annotation))
        inner += [(key, cls) for cls in found if cls not in shown and cls not in (Config, ModelConfig, RunConfig)]
        cells = [f"`{key}`", annotation(field), default(field, found), escaped(texts[name])]
        rows.append(f"| {' | '.join(cells)} |")
    yield from introduction(config)
    yield "\n".join(rows)
    for key, cls in inner:
        if cls not in shown:
            yield f"### {key}: {cls.__name__}"
            yield from tables(key if key != place else place, cls, shown)


def introduction(config: type[Config]) -> Iterator[str]:
    """Yield what the docstring of a class says before its entries."""
    for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(config.__doc__ or "")):
        lines = part.splitlines()
        if any(ENTRY.match(line) for line in lines):
            return
        separator = "\n" if any(line.startswith("- ") for line in lines) else " "
        yield separator.join(map(escaped, lines))


def meanings(config: type[Config]) -> dict[str, str]:
    """Return what each field means: from the string below it, or from its entry in the docstring of its class."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not (isinstance(cls, type) and issubclass(cls, Config)) or cls is Config:
            continue
        for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(cls.__doc__ or "")):
            lines = part.splitlines()
            start = next((i for i, line in enumerate(lines) if ENTRY.match(line)), None)
            for names, text in entries(lines[start:]) if start is not None else ():
                found |= dict.fromkeys(names.split(", "), text)
        attributes = ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
        found |= {name: " ".join(lines).strip() for (owner, name), lines in attributes.items() if owner == cls.__name__}
    if missing := [name for name in config.model_fields if name not in found and name != "name"]:
        raise ValueError(f"{config.__module__}.{config.__name__}: nothing says what {', '.join(missing)} mean")
    return found


def classes(annotation: Any) -> Iterator[type[Config]]:
    """Yield the configuration classes in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in typing.get_args(annotation):
        yield from classes(part)


def default(field: Any, inner: list[type[Config]]) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "(required)"
    if isinstance(value, Config):
        return f"`{type(value).__name__}`" if len(inner) > 1 else "(below)"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`".replace("'", '"')


LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def annotation(field: Any) -> str:
    """Return a type in words, with its limits."""
    limits = [f"{word} {getattr(limit, key):g}" for limit in field.metadata for key, word in LIMITS.items()
              if hasattr(limit, key)]  # fmt: skip
    return escaped(", ".join([words(field.annotation), *limits]))


WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return words(parts[0])
    if origin is Literal:
        return " or ".join(f'"{part}"' if isinstance(part, str) else str(part).lower() for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(part) for part in parts))
    if origin in (tuple, list):
        inner = [words(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in parts or origin is list else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"names with {words(parts[1])}"
    if isinstance(kind, type) and issubclass(kind, Config):
        return "settings"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))
