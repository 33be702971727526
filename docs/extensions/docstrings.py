"""Docstrings of this package as reStructuredText, for autodoc.

They are plain text: paragraphs, lists, indented lines that stay as they are, `code` in single backticks, and entries
"name: text" or "name, name: text" of arguments and fields, whose further lines are indented.
"""

import inspect
import re
from typing import Any

ENTRY = re.compile(r"^(\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*):(?: (.*))?$")
ITEM = re.compile(r"^(?:-|\d+\.) ")


def restructured(text: str) -> str:
    """Return a docstring as reStructuredText."""
    if not text.strip():
        return ""
    return "\n\n".join(block(part.splitlines()) for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(text)))


def block(lines: list[str]) -> str:
    """Return one paragraph of a docstring."""
    if all(line.startswith("    ") for line in lines):
        return "::\n\n" + "\n".join(lines)
    if ENTRY.match(lines[0]) and all(ENTRY.match(line) or line.startswith(" ") for line in lines):
        return "\n".join(f"{names(line)}\n    {inline(text)}" for line, text in entries(lines))
    if ITEM.match(lines[0]):
        return "\n".join(
            line if ITEM.match(line) or line.startswith(" ") else f"   {line}" for line in map(inline, lines)
        )
    return inline(" ".join(line.strip() for line in lines))


def entries(lines: list[str]) -> list[tuple[str, str]]:
    """Return (names, text) of each entry of a paragraph of entries."""
    found: list[tuple[str, str]] = []
    for line in lines:
        if match := ENTRY.match(line):
            found.append((match[1], match[2] or ""))
        else:
            name, text = found.pop()
            found.append((name, f"{text} {line.strip()}".strip()))
    return found


def names(text: str) -> str:
    return ", ".join(f"``{name}``" for name in text.split(", "))


def inline(text: str) -> str:
    """Return a line with code marked up, and all else taken literally."""
    parts = re.split(r"`([^`]+)`", text)
    plain = (re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts[::2])
    marked = "".join(
        part + (f"``{code}``" if code else "") for part, code in zip(plain, [*parts[1::2], ""], strict=True)
    )
    return re.sub(r"(``[^`]+``)(?=\w)", r"\1\\ ", re.sub(r"(?<=\w)(``[^`]+``)", r"\\ \1", marked))


def process(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured("\n".join(lines)).splitlines()


def skip(app: Any, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out configurations: the page of settings has them."""
    from pydantic import BaseModel

    return True if isinstance(value, type) and issubclass(value, BaseModel) else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
