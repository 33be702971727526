"""The reference of the command line, from the commands themselves."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from unilatent.cli import app


def markdown() -> str:
    """Return a section for each command."""
    return "\n\n".join(section(name, command, context) for name, command, context in commands())


def commands() -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, command, context) of every command, groups opened."""
    group = typer.main.get_command(app)
    yield from within(group, group.context_class(group, info_name="unilatent"))


def within(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "list_commands"):
            yield from within(command, inner)
        else:
            yield inner.command_path.removeprefix("unilatent "), command, inner


def section(name: str, command: Any, context: Any) -> str:
    """Return the Markdown of one command."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {name}", f"```text\n{usage}\n```", *paragraphs(command.help), *paragraphs(command.epilog)]
    rows = [row for parameter in command.params if (row := parameter_row(parameter, context))]
    if rows:
        parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def paragraphs(text: str | None) -> Iterator[str]:
    """Yield the paragraphs of a help text. Those that begin with \\b, and indented ones, stay as they are."""
    for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(text or "")):
        lines = part.replace("\b", "").strip("\n").splitlines()
        if "\b" in part or (lines and all(line.startswith(" ") for line in lines)):
            yield "\n".join(["```text", *map(str.rstrip, inspect.cleandoc("\n".join(lines)).splitlines()), "```"])
        elif lines:
            yield escaped(" ".join(line.strip() for line in lines))


def parameter_row(parameter: Any, context: Any) -> str | None:
    """Return the table row of an argument or option; None for a hidden one."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return None
    names, text = record
    return f"| `{names.replace('|', chr(92) + '|')}` | {escaped(' '.join(text.split()))} |"


def escaped(text: str) -> str:
    """Return text for Markdown, with code in backticks left alone."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]<>|$])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", "\\|") for part in parts[1::2]]
    return "`".join(parts)
