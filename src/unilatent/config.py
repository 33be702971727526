"""Typed, frozen, strict configuration: an unknown key is an error with a suggestion, never ignored."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError

from .errors import ConfigError
from .registry import available, find


class _Loader(yaml.SafeLoader):
    """Safe loader for which an unquoted 1e-4 is a number; YAML 1.1 reads it as text."""


class _Dumper(yaml.SafeDumper):
    """Safe dumper with the same resolver, so that text that looks like such a number is quoted."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


class _Nested(ValueError):
    """An error inside a polymorphic field, whose message is already complete."""


class Config(BaseModel):
    """Base class of every configuration: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Self:
        """Build from plain data; ConfigError names dotted field, value and fix of the first fault."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error)) from None

    @classmethod
    def small(cls) -> Self:
        """Return a configuration that builds and trains in seconds on one core. Override it if the defaults do not.

        Contract tests build every component from this, new ones included.
        """
        return cls()

    def example(self) -> Self:
        """Return a copy with placeholders for values that come from data, so that it can be built without data."""
        return self

    def plain(self) -> dict[str, Any]:
        """Return plain data, as YAML and JSON store it and `parse` accepts it."""
        return self.model_dump(mode="json")

    def override(self, *assignments: str) -> Self:
        """Return a copy with dotted `key.sub=value` assignments applied; values are YAML (`null`, `1e-4`, `[1, 2]`)."""
        data = self.plain()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"override {assignment!r} is not KEY=VALUE; write e.g. training.steps=500")
            try:
                value = yaml.load(text, Loader=_Loader) if text.strip() else None
            except (yaml.YAMLError, ValueError, RecursionError):
                raise ConfigError(f"{key}: {text!r} is not a YAML value; quote it") from None
            keys = key.strip().split(".")
            if len(keys) == 1 and keys[0] not in data:  # a field without its section
                ends = [name for name in flat(data) if name.endswith(f".{keys[0]}")]
                if ends:
                    raise ConfigError(f"{keys[0]}: unknown field; did you mean {' or '.join(ends)}?")
            _assign(data, keys, value)
        return type(self).parse(data)

    def to_yaml(self) -> str:
        return yaml.dump(self.plain(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def component(kind: str) -> Any:
    """Return the type of a field with a component's Config; its `name` selects the file in the package `kind`."""

    def resolve(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name")
        if name not in available(kind):
            hint = suggestion(str(name), available(kind))
            raise ValueError(f"{kind} name {name!r} is unknown{hint}; available: {', '.join(available(kind))}")
        return resolve_as(find(kind, name).Config, value)

    return Annotated[SerializeAsAny[Config], BeforeValidator(resolve)]


def resolve_as(cls: type[Config], value: Any, prefix: str = "") -> Config:
    """Convert plain data to a particular Config, inside a validator of the enclosing Config."""
    if not isinstance(value, dict):
        return value
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise _Nested(prefix + _explain(cls, error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read plain data from a YAML file (safe loader: tags never create objects)."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; give a preset name or a readable YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: invalid UTF-8, invalid dates
        raise ConfigError(f"config file {path} is not plain YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is nested too deeply to be a configuration") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} contains {type(data).__name__}, not a mapping of settings")
    return data


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _assign(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys[:-1]):
        if not isinstance(data.get(key), dict):
            if key in data and data[key] is not None:
                raise ConfigError(f"{'.'.join(keys)}: {'.'.join(keys[: i + 1])} is a single value, it has no fields")
            if key not in data and data:  # an empty mapping accepts any name: conditions.scalar.column=gap
                raise ConfigError(f"{'.'.join(keys)}: unknown field {key!r}{suggestion(key, data)}")
            data[key] = {}
        data = data[key]
    data[keys[-1]] = value


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the nearest of the known names, or "" if none is near."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Describe the first fault in one line: field, value, error, fix."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = ".".join(str(part) for part in fault["loc"]) or cls.__name__
    if fault["type"] == "extra_forbidden":
        known = _fields_at(cls, fault["loc"][:-1], fault)
        hint = suggestion(str(fault["loc"][-1]), known)
        fields = f"; fields here: {', '.join(known)}" if known and not hint else ""
        return f"{where}: unknown field{hint}{fields}"
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, _Nested):
        return f"{where}.{inner}" if fault["loc"] else str(inner)
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    if fault["type"] == "value_error" and (isinstance(value, dict) or where == cls.__name__):
        return f"{where}: {message}" if fault["loc"] else message
    return f"{where}: {_short(value)} cannot be used: {message[0].lower() + message[1:]}"


def _short(value: Any) -> str:
    shown = reprlib.Repr()  # reads little of the value: nested YAML aliases can expand without limit
    shown.maxlevel, shown.maxstring, shown.maxother = 3, 100, 100
    text = shown.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(cls: type[BaseModel], loc: tuple[Any, ...], fault: Any) -> list[str]:
    """Return the field names of the config at a location in the tree, as far as annotations determine it."""
    current: Any = cls
    for part in loc:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return []
        current = current.model_fields[part].annotation
        if typing.get_origin(current) in (typing.Union, types.UnionType):
            current = next((a for a in typing.get_args(current) if a is not type(None)), current)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []
