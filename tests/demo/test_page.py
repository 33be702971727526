"""The page's own bookkeeping, without a browser: stops of tabs and sessions, warnings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'unilatent[demo]'")

from unilatent.demo import page as page_module
from unilatent.demo.page import Page
from unilatent.demo.workbench import News, Workbench
from unilatent.methods.base import LatentModel

JANE, JOHN = SimpleNamespace(session_hash="jane"), SimpleNamespace(session_hash="john")


@pytest.fixture
def page(model: LatentModel, tmp_path: Path) -> Page:
    return Page(Workbench(model, "digits", tmp_path))


def test_stop_is_of_one_tab(page: Page):
    """Another tab of the same window, and other windows, go on; closing a window stops all of its tabs."""
    for who, tab in ((JANE, "sample"), (JANE, "map"), (JOHN, "sample")):
        page._begin(who, tab)
    flags = dict(page.stops)
    page._stop(JANE, "sample")
    assert [key for key, flag in flags.items() if flag.is_set] == [("jane", "sample")]
    page._left(JANE)
    assert [key for key, flag in flags.items() if not flag.is_set] == [("john", "sample")] == list(page.stops)


def test_every_tab_with_a_stop_has_its_own(page: Page):
    """The button that begins work and the one that stops it name the same tab, and no two tabs have the same name."""
    found: dict[str, set[int]] = {}
    for function in page.blocks.fns.values():
        if function.name in ("_begin", "_stop", "_sample", "_denoise", "_draw_map"):
            found.setdefault(function.inputs[0].value, set()).add(function._id)
    assert {tab: len(numbers) for tab, numbers in found.items()} == {"sample": 3, "denoise": 3, "map": 3}


def test_a_warning_is_shown_once(page: Page, monkeypatch: pytest.MonkeyPatch):
    """Also where the news that first had it was replaced by newer one before it was taken."""
    shown: list[str] = []
    monkeypatch.setattr(page_module.gr, "Warning", shown.append)

    def work(stop: Any, tell: Any) -> None:
        for warnings in ((), ("<a>",), ("<a>", "b"), ("<a>", "b")):
            tell(News("x", warnings=warnings))

    assert list(page._follow(JANE, "sample", work))[-1].warnings == ("<a>", "b")
    assert shown == ["&lt;a&gt;", "b"]
