"""Runs of a second stage that is trained on stored latents: equal to one that encodes in each step, and what is
refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from safetensors.torch import load_file, save_file
from test_processes import TORCHRUN, environment, port

from unilatent.cli import main
from unilatent.methods.base import LatentModel
from unilatent.records import Records
from unilatent.training.trainer import Trainer

STEPS = 6
SHORT = [
    f"training.steps={STEPS}", "training.checkpoint_every=2", "training.log_every=1", "training.batch_size=16",
    "training.sample_every=0", "training.evaluate_samples=0", "method.base.width=32", "method.base.depth=2",
    *(f"tokenizer.training.{setting}" for setting in ("steps=2", "checkpoint_every=0", "batch_size=16")),
]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/base"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_state(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    return {
        f"{name}:{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `ul` of two stages whose second read the latents in `z`, and `fly`, which encoded itself."""
    folder = tmp_path_factory.mktemp("stored")
    commands = (
        (2, ["train", "digits-ul", *SHORT, f"training.latents={folder / 'z'}", "--out", f"{folder / 'ul'}"]),
        (0, ["encode", f"{folder / 'ul' / 'tokenizer'}", "--views", "1", "--shard-size", "500", "--out",
             f"{folder / 'z'}"]),
        (0, ["train", "digits-ul", *SHORT, f"training.latents={folder / 'z'}", "--out", f"{folder / 'ul'}"]),
        (0, ["train", "digits-ul", *SHORT, f"method.tokenizer={folder / 'ul' / 'tokenizer'}", "--out",
             f"{folder / 'fly'}"]),
    )  # fmt: skip
    for expected, command in commands:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert int(stop.value.code or 0) == expected, command
    return folder


def train(folder: Path, out: Path, *settings: str) -> tuple[object, ...]:
    """The command of a second stage on the latents."""
    given = (f"method.tokenizer={folder / 'ul' / 'tokenizer'}", f"training.latents={folder / 'z'}")
    return ("train", "digits-ul", *SHORT, *given, *settings, "--out", out)


def test_the_losses_are_those_of_encoding_in_each_step(made: Path) -> None:
    """Digits are not augmented, and their clean latents have no random part: equal up to float32 rounding."""
    assert len(losses(made / "ul")) == STEPS
    assert losses(made / "ul") == pytest.approx(losses(made / "fly"), rel=1e-5)
    a, b = (load_file(made / run / "model" / "model.safetensors") for run in ("ul", "fly"))
    assert a.keys() == b.keys() and max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4
    assert yaml.safe_load((made / "ul" / "config.yaml").read_text())["training"]["latents"] == str(made / "z")


def test_no_step_encodes(made: Path, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: LatentModel, *arguments: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr("unilatent.methods.unified_latents.UnifiedLatents.encode_clean", encode)
    assert cli(*train(made, tmp_path / "run")).code == 0
    assert losses(tmp_path / "run") == losses(made / "ul")


def test_without_latents_the_first_stage_is_trained_and_the_command_to_encode_is_named(
    made: Path, cli: Command, tmp_path: Path
) -> None:
    refused = cli(*train(made, tmp_path / "run", f"training.latents={tmp_path / 'none'}"))
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert f"unilatent encode TOKENIZER --views 1 --out {tmp_path / 'none'}" in refused.err


def test_the_model_needs_no_latents_afterwards(made: Path, cli: Command, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(made / "ul", model)
    settings = yaml.safe_load((model / "config.yaml").read_text())
    settings["training"]["latents"] = str(tmp_path / "gone")
    (model / "config.yaml").write_text(yaml.safe_dump(settings))
    fast = ("--steps", 2, "--decoder-steps", 2)
    assert cli("sample", model, "--num", 2, *fast, "--out", tmp_path / "samples").code == 0
    evaluated = cli("evaluate", model, "--num", 20, "--num-held-out", 20, *fast, "--out", tmp_path / "eval")
    assert evaluated.code == 0 and "psnr" in next((tmp_path / "eval").glob("evaluation-*.json")).read_text()
    again = cli("encode", model, "--views", 1, "--out", tmp_path / "z")
    assert again.code == 0, again.err
    header, own = (json.loads((z / "header.json").read_text()) for z in (made / "z", tmp_path / "z"))
    assert header["tokenizer"] == own["tokenizer"], "the second stage contains the tokenizer"


@pytest.mark.covers("F07")
def test_stopped_and_resumed_with_workers_it_is_bitwise_the_same(
    made: Path, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._one_step

    def interrupted(self: Trainer, micro: list) -> object:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro)

    command = train(made, tmp_path / "run", "training.workers=1")
    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    assert cli(*command).code == 143
    monkeypatch.setattr(Trainer, "_one_step", original)
    assert cli(*command, "--resume", "auto").code == 0
    a, b = last_state(tmp_path / "run"), last_state(made / "ul")
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["data.held_out=300"], "latents of other data than data.path and data.held_out"),
        (["modality.flip=true"], "modality.flip: True, but"),
        (["training.latents=docs"], "training.latents: docs"),
    ],
)
def test_latents_of_other_data_are_refused(
    made: Path, cli: Command, tmp_path: Path, settings: list[str], named: str
) -> None:
    refused = cli(*train(made, tmp_path / "run", *settings))
    assert refused.code == 2 and named in refused.err and len(refused.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def altered(made: Path, place: Path, **header: object) -> str:
    """A copy of the latents with other fields in the header, as a setting."""
    shutil.copytree(made / "z", place)
    path = place / "header.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **header}))
    return f"training.latents={place}"


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"tokenizer": "f" * 64}, "latents of another tokenizer (fingerprint ffffffffffff"),
        ({"precision": "bf16"}, "was encoded in bf16, but the run computes in fp32"),
        ({"conditions": {"labels": "0"}}, "was written with other labels"),
        ({"format": 2}, "latents of another version"),
        ({"views": 2}, "does not hold 2 views"),
        ({"rows": None}, "no valid number of rows"),
    ],
)
def test_other_latents_are_refused(
    made: Path, cli: Command, tmp_path: Path, header: dict[str, object], named: str
) -> None:
    refused = cli(*train(made, tmp_path / "run", altered(made, tmp_path / "z", **header)))
    assert refused.code == 2 and named in refused.err and len(refused.err.splitlines()) == 1


def test_latents_of_another_tokenizer_are_refused_at_the_start_and_when_a_run_resumes(
    made: Path, cli: Command, tmp_path: Path
) -> None:
    """Of the same data and settings: the weights differ by one number."""
    other = tmp_path / "other"
    shutil.copytree(made / "ul" / "tokenizer", other)
    weights = load_file(other / "model" / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder.") and weights[name].ndim == 2)
    weights[name][0, 0] += 0.5
    save_file(weights, other / "model" / "model.safetensors")
    assert cli("encode", other, "--views", 1, "--out", tmp_path / "z").code == 0
    latents = f"training.latents={tmp_path / 'z'}"
    refused = cli(*train(made, tmp_path / "run", latents))
    assert refused.code == 2 and "latents of another tokenizer" in refused.err
    run = tmp_path / "copy"
    shutil.copytree(made / "ul", run)
    more = ("training.steps=8", "--resume", "auto")
    resumed = cli(*train(made, run, latents), *more)
    assert resumed.code == 2 and resumed.err.startswith("error: training.latents: ") and str(made / "z") in resumed.err
    assert "latents of another tokenizer" in cli(*train(made, run, latents), *more, "--allow-data-change").err
    shutil.rmtree(run / "eval", ignore_errors=True)
    assert cli(*train(made, run), *more).code == 0, "its own latents are accepted"


def test_incomplete_latents_are_refused_and_the_same_command_completes_them(
    made: Path, cli: Command, tmp_path: Path
) -> None:
    setting = altered(made, tmp_path / "z")
    (tmp_path / "z" / "rows_00000500_00001000.safetensors").unlink()
    refused = cli(*train(made, tmp_path / "run", setting))
    assert refused.code == 2 and "incomplete, 1 of 3 shards" in refused.err
    encode = ("encode", made / "ul" / "tokenizer", "--views", 1, "--shard-size", 500, "--out", tmp_path / "z")
    done = cli(*encode)
    assert done.code == 0 and "937 of them already encoded" in done.out
    name = "rows_00000500_00001000.safetensors"
    assert (tmp_path / "z" / name).read_bytes() == (made / "z" / name).read_bytes()
    other = cli(*encode, "--seed", 1)
    assert other.code == 2 and "records with another seed" in other.err
    (tmp_path / "z" / name).write_bytes(b"torn")
    torn = cli(*train(made, tmp_path / "run", setting))
    assert torn.code == 2 and "damaged" in torn.err


def test_encoding_that_is_stopped_goes_on_at_its_last_complete_shard(
    made: Path, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Records.add

    def stopped(self: Records, rows: range, tensors: dict[str, torch.Tensor]) -> None:
        original(self, rows, tensors)
        os.kill(os.getpid(), signal.SIGTERM)

    encode = ("encode", made / "ul" / "tokenizer", "--views", 1, "--shard-size", 500, "--workers", 1,
              "--out", tmp_path / "z")  # fmt: skip
    monkeypatch.setattr(Records, "add", stopped)
    first = cli(*encode)
    assert first.code == 143 and "the same command resumes" in first.err
    monkeypatch.setattr(Records, "add", original)
    again = cli(*encode)
    assert again.code == 0 and "500 of them already encoded" in again.out
    for path in (made / "z").glob("rows_*"):
        assert path.read_bytes() == (tmp_path / "z" / path.name).read_bytes()


def test_latents_to_decode_and_latents_to_train_on_are_not_mixed_up(
    made: Path, cli: Command, tmp_path: Path, sources: dict[str, Path]
) -> None:
    tokenizer = made / "ul" / "tokenizer"
    decoded = cli("decode", tokenizer, made / "z", "--out", tmp_path / "images")
    assert decoded.code == 2 and "`unilatent encode` without --views" in decoded.err
    into = cli("encode", tokenizer, sources["images"], "--out", made / "z")
    assert into.code == 2 and "did not write" in into.err
    shutil.copytree(sources["latents"], tmp_path / "z0")
    mixed = cli("encode", tokenizer, "--views", 1, "--out", tmp_path / "z0")
    assert mixed.code == 2 and "did not write" in mixed.err
    trained = cli(*train(made, tmp_path / "run", f"training.latents={tmp_path / 'z0'}"))
    assert trained.code == 2 and "holds no latents to train on" in trained.err


def test_a_method_with_an_encoder_of_its_own_refuses_latents(made: Path, cli: Command, tmp_path: Path) -> None:
    refused = cli("train", "digits", f"training.latents={made / 'z'}", "--out", tmp_path / "run")
    assert refused.code == 2 and "training.latents" in refused.err and "its own encoder" in refused.err


def test_encode_asks_for_what_is_missing(cli: Command, made: Path, tmp_path: Path) -> None:
    assert "INPUT: missing" in cli("encode", made / "ul", "--out", tmp_path / "z").err
    model = made / "ul" / "tokenizer" / "model"
    assert "does not record its training data" in cli("encode", model, "--views", 1, "--out", tmp_path / "z").err


@pytest.mark.covers("F25")
def test_two_sharded_processes_on_stored_latents_are_one_optimisation(made: Path, tmp_path: Path) -> None:
    """Both encode their shards, then train with FSDP2: the losses are those of one process that encodes itself."""

    def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
        launcher = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port())]
        words = [*launcher, "-m", "--", "unilatent", *map(str, command)]
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)

    z = tmp_path / "z"
    encoded = torchrun("encode", made / "ul" / "tokenizer", "--views", 1, "--shard-size", 500, "--out", z)
    assert encoded.returncode == 0, encoded.stderr[-3000:]
    for path in (made / "z").glob("rows_*"):
        a, b = load_file(path), load_file(z / path.name)
        assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-6) for key in a)
    settings = (f"training.latents={z}", "training.shard=true")
    done = torchrun(*train(made, tmp_path / "run", *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(made / "fly"), rel=1e-4)
