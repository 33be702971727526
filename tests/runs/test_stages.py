"""Runs of two stages: trained by one command, stopped and resumed in either stage, usable by every command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from PIL import Image as PILImage
from safetensors.torch import load_file

from unilatent.cli import main
from unilatent.loading import load
from unilatent.training.trainer import Trainer

SHORT = [
    f"{stage}training.{setting}"
    for stage in ("", "tokenizer.")
    for setting in (
        "steps=4", "checkpoint_every=2", "log_every=2", "batch_size=16", "sample_every=0", "evaluate_samples=0",
    )
]  # fmt: skip
FIRST, SECOND = "digits-ul-tokenizer", "digits-ul"


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors in the last checkpoints of both stages."""
    return {
        f"{stage}:{name}:{key}": value
        for stage in (".", "tokenizer")
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(run / stage / "checkpoints" / "step_00000004" / f"{name}.safetensors").items()
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages, four steps each."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits-ul", *SHORT, "--out", str(folder)])
    assert stop.value.code == 0
    return folder


def test_one_command_trains_both_stages(both: Path) -> None:
    for folder in (both, both / "tokenizer"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
        assert {"config.json", "model.safetensors"} <= {path.name for path in (folder / "model").iterdir()}
    assert lines[0].keys() >= {"loss/prior", "loss/decoder", "bits_per_pixel", "bits_per_latent_dimension"}
    first, second = load(both / "tokenizer", device="cpu"), load(both, device="cpu")
    data = torch.rand(3, 1, 8, 8)
    assert torch.equal(first.encode(data), second.encode(data)), "the second stage's tokenizer is not the first stage's"


def test_settings_of_either_stage_and_of_both(both: Path) -> None:
    """`tokenizer.KEY` sets the first stage's; both stages share seed and data."""
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (both / "tokenizer", both))
    assert first["training"]["steps"] == second["training"]["steps"] == 4
    assert first["data"] == second["data"] and first["seed"] == second["seed"] and first["preset"] == FIRST


def test_the_stages_may_differ_in_length(cli: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("train", "digits-ul", *SHORT, "tokenizer.training.steps=3", "seed=5", "--out", run).code == 0
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (run / "tokenizer", run))
    assert (first["training"]["steps"], second["training"]["steps"]) == (3, 4)
    assert first["seed"] == second["seed"] == 5
    assert (run / "tokenizer" / "checkpoints" / "step_00000003").is_dir()


def test_a_dry_run_shows_both_stages_and_writes_nothing(cli: Command, tmp_path: Path) -> None:
    done = cli("train", "digits-ul", *SHORT, "--out", tmp_path / "run", "--dry-run")
    assert done.code == 0 and FIRST in done.out and "then" in done.out and not (tmp_path / "run").exists()


@pytest.mark.covers("F07", "F24")
@pytest.mark.parametrize("stage", [FIRST, SECOND])
def test_stopped_in_either_stage_the_same_command_goes_on_bitwise(
    stage: str, both: Path, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = tmp_path / "run", Trainer._one_step
    command = ("train", "digits-ul", *SHORT, "--out", run, "--resume", "auto")

    def interrupted(self: Trainer, micro: list) -> dict:
        if self.config.preset == stage and self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    assert cli(*command).code == 143
    assert (run / "tokenizer" / "model").is_dir() == (stage == SECOND)
    assert not (run / "model").exists()
    monkeypatch.setattr(Trainer, "_one_step", original)
    assert cli(*command).code == 0
    a, b = state(both), state(run)
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []
    finished = [load_file(folder / "model" / "model.safetensors") for folder in (both, run)]
    assert all(torch.equal(value, finished[1][key]) for key, value in finished[0].items())


def test_a_second_command_does_not_train_the_tokenizer_again(both: Path, cli: Command) -> None:
    weights = both / "tokenizer" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = cli("train", "digits-ul", *SHORT, "--out", both)
    assert again.code == 2 and "holds a run already" in again.err
    assert weights.stat().st_mtime_ns == before


def test_a_run_whose_tokenizer_is_given_uses_that_one(both: Path, cli: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("train", "digits-ul", *SHORT, f"method.tokenizer={both / 'tokenizer'}", "--out", run)
    assert done.code == 0 and not (run / "tokenizer").exists() and (run / "model").is_dir()
    missing = cli("train", "digits-ul", *SHORT, f"method.tokenizer={tmp_path / 'none'}", "--out", tmp_path / "other")
    assert missing.code == 2 and "method.tokenizer" in missing.err and not (tmp_path / "other").exists()


def test_a_finished_first_stage_is_not_taken_for_another(both: Path, cli: Command) -> None:
    """Settings that differ from those the first stage was trained with are refused."""
    for override, named in (
        ("method.loss_factor=3", "method.loss_factor: 3.0"),
        ("training.steps=5", "training.steps: 5"),
    ):
        refused = cli("train", "digits-ul", *SHORT, f"tokenizer.{override}", "--out", both, "--dry-run")
        assert refused.code == 2 and f"tokenizer.{named}, but {both / 'tokenizer'} was trained with" in refused.err
    assert cli("train", "digits-ul", *SHORT, "seed=5", "--out", both, "--dry-run").err.startswith(
        "error: tokenizer.seed"
    )
    assert cli("train", "digits-ul", *SHORT, "--out", both, "--resume", "auto", "--dry-run").code == 0


def test_a_second_stage_that_cannot_be_built_is_refused_before_the_first_is_trained(
    cli: Command, tmp_path: Path
) -> None:
    refused = cli("train", "digits-ul", *SHORT, "method.base.heads=5", "--out", tmp_path / "run")
    assert refused.code == 2 and "not divisible by heads 5" in refused.err and not (tmp_path / "run").exists()
    larger = cli("train", "digits-ul", *SHORT, "modality.size=16", "--out", tmp_path / "run", "--dry-run")
    assert larger.code == 0, "both stages share the image size"


def test_a_run_of_the_other_method_can_be_the_first_stage(cli: Command, tmp_path: Path) -> None:
    """As documented; its reconstruction loss has other weights."""
    short = ["training.steps=2", "training.checkpoint_every=0", "training.evaluate_samples=0", "training.batch_size=8"]
    assert cli("train", "digits", *short, "--out", tmp_path / "digits").code == 0
    run, tokens = tmp_path / "run", "modality.patch_size=4"
    assert cli("train", "digits-ul", *short, tokens, f"method.tokenizer={tmp_path / 'digits'}", "--out", run).code == 0
    assert cli("sample", run, "--num", 2, "--steps", 2, "--out", tmp_path / "samples").code == 0


def test_every_command_works_on_the_result(both: Path, cli: Command, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        PILImage.fromarray((torch.rand(8, 8) * 255).byte().numpy()).save(images / f"{i}.png")
    sampled = cli("sample", both, "--num", 4, "--labels", "0-3", "--steps", 3, "--guidance-scale", 2.0,
                  "--out", tmp_path / "samples")  # fmt: skip
    assert sampled.code == 0 and len(list((tmp_path / "samples").glob("0*.png"))) == 4
    again = cli("reconstruct", both, images, "--out", tmp_path / "again")
    assert again.code == 0 and json.loads((tmp_path / "again" / "metrics.json").read_text())["num"] == 3
    assert cli("encode", both, images, "--out", tmp_path / "latents").code == 0
    assert cli("decode", both, tmp_path / "latents", "--out", tmp_path / "decoded").code == 0
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 3
    assert cli("decode", both / "tokenizer", tmp_path / "latents", "--out", tmp_path / "same").code == 0
    for path in (tmp_path / "decoded").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes(), "the same latents and decoder"
    evaluated = cli("evaluate", both, "--num", 20, "--num-held-out", 20, "--steps", 2, "--out", tmp_path / "eval")
    assert evaluated.code == 0 and list((tmp_path / "eval").glob("evaluation-*.json"))
