"""What the README tells a user to type works: every command line and the Python block, in an empty folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Command
from test_cli import pictures

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("unilatent")
]


@pytest.fixture
def workplace(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: runs/digits is trained, `pictures` holds class folders."""
    shutil.copytree(run_folder, tmp_path / "runs" / "digits")
    pictures(tmp_path / "pictures", size=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_command_line(cli: Command, workplace: Path) -> None:
    assert len(COMMANDS) >= 9
    for _, *arguments in COMMANDS:
        if arguments[0] == "train":
            arguments += ["--dry-run"]
            if "digits" in arguments:
                shutil.rmtree(workplace / "runs" / "again", ignore_errors=True)
                arguments = ["runs/again" if a == "runs/digits" else a for a in arguments]
            else:
                arguments += ["data.held_out=0", "training.epochs=null", "training.steps=1"]
            if "imagenet256-unite-b" in arguments:  # a thinner one, and without the VGG16 download
                arguments += ["modality.perceptual_weight=0", "method.generative_encoder.depth=1",
                              "method.generative_encoder.in_context_start=0", "method.decoder.depth=1"]  # fmt: skip
        done = cli(*arguments)
        assert done.code == 0, (arguments, done.err)
    assert (workplace / "samples" / "grid.png").exists() and (workplace / "decoded" / "000000.png").exists()


def test_the_python_block(workplace: Path) -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code.replace("num_inference_steps=50", "num_inference_steps=3"), "README.md", "exec"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["z"].ndim == 3
    assert isinstance(names["model"], torch.nn.Module)


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", blocks("")[0], flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
