"""docs/architecture.md is true: its layers are those of CONTRIBUTING.md, and its walks happen in that order."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from test_imports import CONTRIBUTING, FLOORS, PACKAGE

import unilatent
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

PAGE = CONTRIBUTING.parent / "docs" / "architecture.md"
Call = tuple[str, str]
"""File inside the package, qualified name of a function."""


def section(title: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(f"## {title}")
    return text[start : text.find("\n## ", start + 1) if "\n## " in text[start + 1 :] else None]


def walk(title: str) -> list[Call]:
    return re.findall(r"^\| \d+ \| `([^`]+)` \| `([^`]+)` \|", section(title), re.MULTILINE)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Every call into the package inside the block, in order."""
    calls: list[Call] = []
    prefix = f"{PACKAGE}/"

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            calls.append((frame.f_code.co_filename.removeprefix(prefix), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def out_of_order(expected: Iterable[Call], calls: Iterable[Call]) -> list[Call]:
    """What is left of `expected` once its calls were met in order."""
    left = list(expected)
    for call in calls:
        if left and call == left[0]:
            left.pop(0)
    return left


def test_the_diagram_shows_the_floors():
    shown = {
        name.rstrip("/"): int(floor)
        for floor, entries in re.findall(r'F\d\["(\d) · .*?<br/>(.*?)"\]', section("Layers"))
        for name in entries.split()
    }
    assert shown == FLOORS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call]]:
    """A run of one step, and its calls."""
    config = preset("digits").override(
        "training.steps=1", "training.batch_size=8", "training.sample_every=0", "training.evaluate_samples=0",
        "training.checkpoint_every=0", "training.log_every=5",
    )  # fmt: skip
    trainer = Trainer(config, tmp_path_factory.mktemp("walk") / "run")
    with recorded() as calls:
        folder = trainer.fit()
    return folder, calls


def test_a_batch_walks_as_the_page_says(finished: tuple[Path, list[Call]]):
    expected = walk("One batch")
    assert len(expected) > 15 and out_of_order(expected, finished[1]) == []


def test_a_sample_walks_as_the_page_says(finished: tuple[Path, list[Call]]):
    model = unilatent.load(finished[0])
    with recorded() as calls:
        unilatent.sample(model, num=2, guidance_scale=2.0, num_inference_steps=2)
    expected = walk("One sample")
    assert len(expected) > 8 and out_of_order(expected, calls) == []


def test_a_wrong_order_and_a_wrong_name_are_noticed(finished: tuple[Path, list[Call]]):
    expected = walk("One batch")
    swapped = [*expected[:-2], expected[-1], expected[-2]]
    assert out_of_order(swapped, finished[1]) != []
    assert out_of_order([*expected, ("training/ema.py", "EMA.refresh")], finished[1]) != []


def test_files_and_names_outside_the_tables_exist():
    for path, name in re.findall(r"`([\w/]+\.py)` `([\w.]+)`", PAGE.read_text(encoding="utf-8")):
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert all(re.search(rf"\b(?:def|class) {part}\b", source) for part in name.split(".")), (path, name)
