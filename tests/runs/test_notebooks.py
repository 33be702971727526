"""The notebooks: every cell runs on small models, and their stored outputs are sound, small and without places."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, small_python
from workplace import Workplace

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def cells(path: Path) -> list[dict[str, Any]]:
    """Code cells of a notebook, with their source as one text."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in content["cells"] if c["cell_type"] == "code"]


def run(cell: dict[str, Any], place: str, workplace: Workplace, names: dict[str, Any]) -> None:
    """Run a cell, small: Python, and lines that begin with an exclamation mark as commands."""
    refused = "refused" in cell["metadata"].get("tags", [])
    for part in re.split(r"^(!.*)$", cell["source"], flags=re.MULTILINE):
        if part.startswith("!"):
            line = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), part.removeprefix("!"))
            words = shlex.split(re.sub(r"( 2?> \S+)+$", "", line))
            assert words[0] == "unilatent", f"{place}: {line}"
            workplace.command(place, words[1:], code=2 if refused and "--compare" in words else 0)
        elif part.strip():
            exec(compile(small_python(part), place, "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_cell_runs_on_small_models(path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(path)):
        run(cell, f"{path.name}, code cell {number}", workplace, names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_small_and_sound(path: Path) -> None:
    assert path.stat().st_size < 300_000
    assert all(cell["execution_count"] for cell in cells(path)), "it is stored as it was run"
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert len(outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = json.dumps([{k: v for k, v in output.get("data", output).items() if k != "image/png"} for output in outputs])
    assert not re.findall(r"Traceback|/tmp/|/home/|/root/|site-packages|https?://", text)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_jupyter_runs_them(path: Path, tmp_path: Path) -> None:
    """As a reader does, at the sizes that are printed."""
    nbformat = pytest.importorskip("nbformat", reason="Jupyter is missing: pip install 'unilatent[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="Jupyter is missing: pip install 'unilatent[notebooks]'")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
