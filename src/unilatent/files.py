"""Atomic writes of text and JSON files, and reading of JSON files from untrusted sources."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Surrogates (from file names that are not UTF-8) are written as escapes."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file and the fault, and ends with `way_out`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or 'cannot be read'}; {way_out}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON text; {way_out}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains {type(content).__name__}, not named fields; {way_out}")
    return content
