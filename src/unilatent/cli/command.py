"""What every command has: examples at the end of its help, `--json`, and a home folder for the ~ in its paths."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from ..files import expanded

Record = dict[str, Any]
"""What a command found or did, as plain data: what --json prints."""
Function = TypeVar("Function", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
PLACES = (
    "model", "models", "reference", "data", "source", "preset", "resume", "inception_weights", "lpips_weights",
    "i3d_weights", "dinov2", "clip",
)  # fmt: skip
"""Arguments of commands that are texts and may be paths."""


JSON_OUTPUT: ContextVar[TextIO | None] = ContextVar("JSON_OUTPUT", default=None)
"""Where --json prints the record of the command that runs; None without it."""


class EndedWith(typer.Exit):
    """Ends a command with its record and an exit code other than 0: the work is done, and what it found is bad."""

    def __init__(self, record: Record, code: int = 1):
        super().__init__(code)
        self.record = record


def examples(*lines: str) -> Callable[[Function], Function]:
    """Give a command the examples of its help: complete command lines, with a comment after two spaces and #."""

    def attach(function: Function) -> Function:
        function.examples = lines  # type: ignore[attr-defined]
        return function

    return attach


def epilog(function: Callable[..., Any]) -> str:
    """Return the end of a command's help, in which lines are not joined."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in getattr(function, "examples", ()))])


def command(function: Callable[..., Record | None]) -> Callable[..., None]:
    """Return a command as it is registered: with `--json`, and with a leading ~ of its paths replaced.

    function: returns its record; None where another process prints it. With --json, all that it prints to standard
    output is dropped, and its record is printed instead.
    """
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        as_json = arguments.pop("as_json")
        arguments = {name: _with_home(name, value) for name, value in arguments.items()}
        if not as_json:
            function(**arguments)
            return
        token = JSON_OUTPUT.set(sys.stdout)
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                record = function(**arguments)
        except EndedWith as end:
            print_json(end.record)
            raise
        finally:
            JSON_OUTPUT.reset(token)
        if record is not None:
            print_json(record)

    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option], return_annotation=None
    )
    run.__annotations__ = {name: parameter.annotation for name, parameter in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return run


def announce(record: Record) -> None:
    """Print the record of a command that goes on until it is stopped, if --json was given."""
    if (output := JSON_OUTPUT.get()) is not None:
        print_json(record, output)


def print_json(record: Record, output: TextIO | None = None) -> None:
    """Print a record as one JSON object: paths are texts, and a number that is not finite is null.

    output: None is standard output.
    """
    text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    print(text, file=output, flush=True)


def plain(value: Any) -> Any:
    """Return a value as JSON has it; TypeError of what it has no form for."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _with_home(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_with_home(name, part) for part in value)
    if isinstance(value, Path):
        return expanded(value)
    return os.path.expanduser(value) if isinstance(value, str) and name in PLACES else value
