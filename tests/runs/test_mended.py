"""Runs that went wrong once: started again when finished, locked by the dead, resumed apart, saved while poisoned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import QUICK, Command
from test_training import digits

from unilatent.training.journal import Journal
from unilatent.training.trainer import Trainer

EVALUATED = ("training.evaluate_samples=20", "training.steps=4")


def test_a_finished_run_started_again_trains_and_evaluates_nothing(tmp_path: Path, cli: Command) -> None:
    run = tmp_path / "run"
    Trainer(digits(*EVALUATED), run).fit()
    before = (run / "metrics.jsonl").read_text()
    assert '"eval/' in before
    again = cli("train", "digits", *QUICK, *EVALUATED, "--out", run, "--resume", "auto")
    assert again.code == 0 and "nothing is left to train" in again.err and "evaluated before" in again.err
    assert (run / "metrics.jsonl").read_text() == before


def test_an_evaluation_of_an_abandoned_continuation_is_made_again(tmp_path: Path) -> None:
    """Resumed before it, the run has not been evaluated, whatever files say."""
    run = tmp_path / "run"
    settings = ("training.evaluate_samples=20", "training.steps=8")
    Trainer(digits(*settings), run).fit()
    numbers = run / "eval" / "step_00000008.json"
    numbers.write_text("stale")
    Trainer(digits(*settings), run, resume=str(run / "checkpoints" / "step_00000004")).fit()
    assert json.loads(numbers.read_text())


def test_numbers_of_the_step_a_run_started_from_have_no_clock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with Journal(tmp_path, total=8, done=8) as journal:
        journal.log(8, {"loss/total": 1.0})
    assert capsys.readouterr().err == "step 8/8  total 1\n"
