"""What users keep in a run folder, or where a run is to go, is still there afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import QUICK, Command

from unilatent.outputs import Outputs


@pytest.mark.parametrize("resume", [(), ("--resume", "auto")])
def test_a_configuration_of_the_user_is_no_run(
    cli: Command, run_folder: Path, tmp_path: Path, resume: tuple[str, ...]
) -> None:
    config = tmp_path / "mine" / "config.yaml"
    config.parent.mkdir()
    config.write_text("# my notes\n" + (run_folder / "config.yaml").read_text())
    before = config.read_text()
    done = cli("train", config, *QUICK, "--out", config.parent, *resume)
    assert done.code == 2 and "holds config.yaml, which no run wrote there" in done.err
    assert config.read_text() == before and [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_a_model_card_and_notes_in_the_model_folder_survive_more_training(cli: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("train", "digits", *QUICK, "--out", run).code == 0
    (run / "model" / "README.md").write_text("my card")
    (run / "model" / "notes").mkdir()
    (run / "model" / "notes" / "a.txt").write_text("mine")
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert cli("train", "digits", *QUICK, "training.steps=14", "--out", run, "--resume", "auto").code == 0
    assert (run / "model" / "README.md").read_text() == "my card"
    assert (run / "model" / "notes" / "a.txt").read_text() == "mine"
    assert (run / "model" / "model.safetensors").read_bytes() != weights
    assert sorted(path.name for path in run.iterdir() if "tmp" in path.name) == []


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "out" / f".unilatent-partial-{os.getpid()}" / "1"
    left.mkdir(parents=True)
    (left / "000000.png").write_bytes(b"half")
    with Outputs(tmp_path / "out", "sample").writing() as folder:
        (folder / "000000.png").write_bytes(b"whole")
    assert (tmp_path / "out" / "000000.png").read_bytes() == b"whole" and not left.parent.exists()
