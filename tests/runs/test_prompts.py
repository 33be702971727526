"""Prompts through whole runs and the command line: digits conditioned on captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image
from test_training import assert_same, state

from unilatent.batches import collate
from unilatent.conditions.text import TextConfig
from unilatent.modalities._media import render
from unilatent.modalities._media.collection import CollectionDataset
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.memory import estimate
from unilatent.training.trainer import Trainer
from unilatent.types import decode_texts

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EXAMPLES = tuple(f"the digit {word}" for word in WORDS)


@pytest.fixture
def captioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded digits with captions: one of two, chosen by the sample index."""
    plain, original_init = CollectionDataset.__getitem__, CollectionDataset.__init__

    def init(self: CollectionDataset, *arguments: Any) -> None:
        original_init(self, *arguments)
        self.facts = {**self.facts, "prompts": {"examples": EXAMPLES}}

    def caption(self: CollectionDataset, index: int, position: int = 0) -> tuple[Any, dict[str, Any]]:
        data, values = plain(self, index)
        word = WORDS[values["labels"]]
        return data, {**values, "prompts": word if position % 2 else f"the digit {word}"}

    monkeypatch.setattr(CollectionDataset, "__init__", init)
    monkeypatch.setattr(CollectionDataset, "__getitem__", caption)
    monkeypatch.setattr(CollectionDataset, "view", caption)
    monkeypatch.setattr(CollectionDataset, "values", lambda self, index: self[index][1])


def digits_in_words(*overrides: str) -> RunConfig:
    config = preset("digits").override(*QUICK, "sampling.num_inference_steps=3", *overrides)
    text = TextConfig.small().model_copy(update={"examples": ()})
    return config.model_copy(update={"conditions": {"text": text}})


def test_a_run_on_captions_is_resumed_bitwise_evaluated_and_sampled(
    captioned: None, tmp_path: Path, cli: Command
) -> None:
    Trainer(digits_in_words("training.sample_every=12"), tmp_path / "whole").fit()
    Trainer(digits_in_words("training.steps=4"), tmp_path / "parts").fit()
    Trainer(digits_in_words(), tmp_path / "parts", resume="auto").fit()
    assert_same(state(tmp_path / "whole", 12), state(tmp_path / "parts", 12))
    assert (tmp_path / "whole" / "samples" / "step_00000012.png").is_file()
    written = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert written["conditions"]["text"]["examples"] == list(EXAMPLES)

    (tmp_path / "list.txt").write_text("the digit one\n\nnine\n", encoding="utf-8")
    out, model = tmp_path / "out", tmp_path / "whole"
    done = cli(
        "sample", model, "--prompt", "two", "--prompts", tmp_path / "list.txt", "--negative-prompt", "three",
        "--guidance-scale", 2, "--steps", 2, "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    arrays = np.load(out / "samples.npz", allow_pickle=False)
    assert decode_texts(torch.from_numpy(arrays["prompts"])) == ["two", "the digit one", "nine"]
    record = json.loads((out / "sampling.json").read_text())
    assert record["prompts"] == ["two", "the digit one", "nine"] and record["negative_prompts"] == "three"
    assert Image.open(out / "grid.png").size[0] == 3 * (96 + render.GAP) + render.GAP
    done = cli("sample", model, "--prompt", "two", "--num", 5, "--steps", 2, "--out", out)
    assert done.code == 0 and len(list(out.glob("0*.png"))) == 5
    page = tmp_path / "page.html"
    done = cli("evaluate", model, "--num", 40, "--steps", 2, "--out", tmp_path / "eval", "--report", page)
    assert done.code == 0 and "the digit four" in page.read_text(), done.err


def test_memory_is_estimated_with_texts(captioned: None) -> None:
    config = digits_in_words()
    trainer = Trainer(config, Path("never-written"))
    train = trainer.splits.train
    example = collate([train.view(i, i) for i in range(4)], trainer.model.modality)
    needed = estimate(trainer.config, example, torch.device("cpu"))
    assert needed.activations is not None and needed.activations > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "two"], "prompts: this model has no such condition; it takes labels"),
        (["--negative-prompt", "two"], "negative_prompts: this model has no such condition; it takes labels"),
        (["--prompts", "{tmp}/nowhere.txt"], "--prompts {tmp}/nowhere.txt: No such file"),
        (["--prompts", "{tmp}/blank.txt"], "has no line with a text"),
        (["--prompts", "{tmp}/latin.txt"], "line 1: byte 0xfc is not UTF-8"),
        (["--prompts", "{tmp}/folder"], "Is a directory"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    cli: Command, run_folder: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    out = tmp_path / "out"
    done = cli("sample", run_folder, *[a.format(tmp=tmp_path) for a in arguments], "--out", out)
    assert done.code == 2 and words.format(tmp=tmp_path) in done.err and done.err.count("\n") == 1
    assert not out.exists()


def test_captions_are_drawn_under_their_images(tmp_path: Path) -> None:
    """Rows that belong together share the captions of the last row; nothing else moves."""
    images = torch.rand(5, 3, 32, 32)
    render.draw_grid([images, 1 - images], tmp_path / "grid.png", 3, ["a", "b " * 40, "", "ß\t✓" * 500, "e"])
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    side, line, most = 96, render.LINE, render.MOST_LINES
    first = render.GAP + 2 * (side + render.GAP)  # where the captions of the first group begin
    assert image.shape[1] == render.GAP + 3 * (side + render.GAP)
    under = image[first - render.GAP : first]
    assert (under == 255).all()
    words = image[first : first + 4 * line]
    assert (words[:line, : side // 2] < 128).any() and (words[line:, :side] == 255).all()
    assert (words[:, side + 2 * render.GAP : 2 * side] < 128).any()
    assert (words[:, 2 * side + 3 * render.GAP :] == 255).all()
    assert image.shape[0] <= render.GAP + 4 * (side + render.GAP) + 2 * most * line
    assert all(len(render._wrap_text(text, 96)) <= most for text in ("x" * 10_000, "x " * 10_000, "", "\n"))
    assert render._wrap_text("a small red circle", 60) == ["a small red", "circle"]
