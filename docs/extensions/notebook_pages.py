"""Jupyter notebooks as pages: their text, code and stored outputs. Nothing is run."""

import json
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser


def markdown(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook, in format 4, as Markdown."""
    return "\n\n".join(part for cell in notebook["cells"] for part in cell_parts(cell))


def cell_parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"````{language(source)}\n{source}\n````", *(shown(output) for output in cell.get("outputs", []))]


def language(source: str) -> str:
    """Return the language of a cell: lines that begin with an exclamation mark are commands."""
    commands = [line.startswith("!") for line in source.splitlines()]
    return "bash" if all(commands) else "text" if any(commands) else "python"


def shown(output: dict[str, Any]) -> str:
    """Return one output: an image, else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png'].split())})"
    text = "".join(output.get("text") or data.get("text/plain") or "")
    return f"````text\n{text.rstrip()}\n````" if text.strip() else ""


class NotebookParser(MystParser):
    """Reads notebooks by way of Markdown."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: Any) -> None:
        super().parse(markdown(json.loads(inputstring)), document)


def setup(app: Any) -> dict[str, bool]:
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
