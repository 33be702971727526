"""Files that appear whole or not at all, and plain data out of files that may be anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Through a temporary file beside it. Bytes of a file name that are no UTF-8 are written as JSON escapes them."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Plain data, indented."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """A JSON object; ValueError names the file, what is wrong with it, and ends with the way out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or 'cannot be read'}; {way_out}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON text; {way_out}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not named fields; {way_out}")
    return content
