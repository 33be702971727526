"""Numbers recorded from the UNITE authors' network; tests that need them are skipped where they are missing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"golden data not found at {FOLDER}")


@cache
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@cache
def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())
