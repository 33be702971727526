"""Evaluations and searches of texts that the caller gives."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from conftest import Command
from test_captioned_runs import small

from unilatent.training.trainer import Trainer

ASKED = ["a small red circle", "a large blue square, and more", "a small black triangle"]
FEW = ("--num", 4, "--num-reference", 8, "--batch-size", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    Trainer(small("scenes-unite", evaluate_samples=0), folder).fit()
    return folder


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    (tmp_path / "list.txt").write_text(f"{ASKED[1]}\n\n{ASKED[2]}\n", encoding="utf-8")
    return ["--prompt", ASKED[0], "--prompts", tmp_path / "list.txt"]


def test_an_evaluation_asks_for_texts_that_are_given(
    cli: Command, model: Path, given: list[object], tmp_path: Path
):  # fmt: skip
    page = tmp_path / "page.html"
    out = ("--metrics", "scene_objects", "--num-held-out", 2, "--out", tmp_path / "eval", "--report", page)
    done = cli("evaluate", model, *FEW, *given, *out)
    assert done.code == 0, done.err
    text = page.read_text()
    assert all(prompt in text for prompt in ASKED)
    again = " ".join(f"--prompt {shlex.quote(prompt)}" for prompt in ASKED)
    assert again.replace("'", "&#x27;") in text or again in text, "the line that makes the numbers again has them all"


def test_a_search_asks_for_texts_that_are_given(cli: Command, model: Path, given: list[object], tmp_path: Path):
    over = ("--over", "guidance_scale", "--values", "2", "--metric", "scene_objects", "--out", tmp_path / "eval")
    done = cli("search", model, *FEW, *given, *over)
    assert done.code == 0, done.err
    assert ASKED[1] in next((tmp_path / "eval").glob("search-*.json")).read_text()


def test_texts_that_cannot_be_used_are_refused(cli: Command, model: Path, tmp_path: Path):
    for verb in (["evaluate"], ["search", "--over", "guidance_scale"]):
        done = cli(verb[0], model, *verb[1:], *FEW, "--prompts", tmp_path / "nowhere.txt", "--out", tmp_path / "out")
        assert done.code == 2 and "--prompts" in done.err and "No such file" in done.err
