"""What README.md and docs/faq.md show a user works: every command line and Python block, in an empty folder."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Command
from test_cli import images

import unilatent

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FAQ = (ROOT / "docs" / "faq.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("unilatent")
]


@pytest.fixture
def workplace(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder: runs/digits is trained, `my_images` holds class folders."""
    shutil.copytree(run_folder, tmp_path / "runs" / "digits")
    images(tmp_path / "my_images", size=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    return tmp_path


TINY = [
    "training.steps=2", "training.checkpoint_every=0", "training.sample_every=0", "training.evaluate_samples=0",
    "training.batch_size=4", "method.generative_encoder.depth=1", "method.generative_encoder.in_context_tokens=0",
    "method.generative_encoder.in_context_start=0", "method.decoder.depth=1",
]  # fmt: skip
OTHERS = {"runs/scenes": ["scenes-unite", "data.num_samples=64", "data.held_out=8"],
          "runs/molecules": ["molecules", "data.num=48", "data.held_out=8"]}  # fmt: skip
"""Runs of other presets that the README trains, and the settings that train them in seconds."""


@pytest.fixture
def others(cli: Command, workplace: Path) -> None:
    for folder, arguments in OTHERS.items():
        done = cli("train", *arguments, *TINY, "--out", folder)
        assert done.code == 0, done.err


def shortened(arguments: list[str]) -> list[str]:
    """A command line on one of those runs: not trained again; few samples."""
    if arguments[0] == "train":
        folder = arguments[arguments.index("--out") + 1]
        return ["train", *OTHERS[folder], *TINY, "--out", "runs/again", "--dry-run"]
    if "--num" in arguments:
        arguments[arguments.index("--num") + 1] = "4"
    return [*arguments, "--steps", "2"]


def test_every_command_line_on_other_data(cli: Command, workplace: Path, others: None) -> None:
    own = [command[1:] for command in COMMANDS if any(part in OTHERS for part in command)]
    assert {command[0] for command in own} == {"train", "sample", "evaluate"}
    for arguments in own:
        done = cli(*shortened(arguments))
        assert done.code == 0, (arguments, done.err)
    assert len(list((workplace / "new_molecules").glob("*.xyz"))) == 4


def test_every_command_line(cli: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) >= 9
    monkeypatch.setattr("unilatent.demo.server.wait", lambda: 0)
    for _, *arguments in COMMANDS:
        if any(part in OTHERS for part in arguments) or (arguments[0] == "demo" and find_spec("gradio") is None):
            continue
        if arguments[0] == "train":
            arguments += ["--dry-run"]
            if "digits" in arguments:
                shutil.rmtree(workplace / "runs" / "again", ignore_errors=True)
                arguments = ["runs/again" if a == "runs/digits" else a for a in arguments]
            else:
                arguments += ["data.held_out=0", "training.epochs=null", "training.steps=1"]
            if "imagenet256-unite-b" in arguments:  # a thinner one, and without the VGG16 and Inception downloads
                arguments += ["modality.perceptual_weight=0", "training.evaluate_samples=0",
                              "method.generative_encoder.depth=1", "method.generative_encoder.in_context_start=0",
                              "method.decoder.depth=1"]  # fmt: skip
        done = cli(*arguments)
        assert done.code == 0, (arguments, done.err)
    assert (workplace / "samples" / "grid.png").exists() and (workplace / "decoded" / "000000.png").exists()


def test_the_python_block(workplace: Path) -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code.replace("num_inference_steps=50", "num_inference_steps=3"), "README.md", "exec"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["z"].ndim == 3
    assert isinstance(names["model"], torch.nn.Module)


@pytest.mark.parametrize("number", range(len(blocks("python", FAQ))))
def test_the_python_blocks_of_the_faq(workplace: Path, number: int) -> None:
    """Training blocks take the settings of `TINY` that leave the model as it is, and another initialisation."""
    code = blocks("python", FAQ)[number]
    quick = ["seed=1", *(setting for setting in TINY if setting.startswith("training."))]
    exec(compile(code.replace('"training.steps=1400"', str(quick)[1:-1]), "faq.md", "exec"), {})
    if "Trainer" in code:
        (trained,) = (folder for folder in workplace.glob("runs/*") if folder.name != "digits")
        weights = unilatent.load(trained).state_dict()
        before = unilatent.load("runs/digits").state_dict()
        moved = max((weights[key] - before[key]).abs().max() for key in weights if not key.startswith("conditions."))
        assert (moved < 1e-3) == ("load_state_dict" in code), "fine-tuning starts from the weights that were loaded"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", blocks("")[0], flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
