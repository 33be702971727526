"""Runs the notebooks in docs/notebooks, each in an empty folder, and stores their outputs.

python benchmarks/notebooks.py [NAME ...]            some minutes on one CPU core; `unilatent` must be on the PATH
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
MOST = 300_000
"""Bytes of a notebook with its outputs, at most."""


def of_few_colours(encoded: str) -> str:
    """Return a PNG with 64 colours, in base64 like the given one: a third of its size."""
    image, smaller = Image.open(io.BytesIO(base64.b64decode(encoded))), io.BytesIO()
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def run(path: Path) -> None:
    """Run a notebook and store it with its outputs; an error in a cell, or outputs that are too large, are raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in each run
        if "outputs" in cell:  # without warnings, which name places on this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = of_few_colours(output["data"]["image/png"])
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MOST:
        raise ValueError(f"{path.name}: {len(text.encode()):,} bytes with its outputs, more than {MOST:,}")
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(text.encode()):,} bytes")


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)


if __name__ == "__main__":
    main(sys.argv[1:])
