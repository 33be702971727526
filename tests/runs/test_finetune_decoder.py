"""`unilatent finetune-decoder`: from a run to a run, killed and continued."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file

import unilatent
from unilatent.cli.running import splits_for
from unilatent.runs.listing import describe
from unilatent.runs.record import record_of

TINY = ("batch_size=8", "start=1", "log_every=2", "sample_every=0", "checkpoint_every=2", "threads=1")


def test_a_run_becomes_a_run_with_another_decoder(run_folder: Path, tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "sharp"
    done = cli("finetune-decoder", run_folder, "steps=4", *TINY, "sample_every=2", "--out", out)
    assert done.code == 0 and "unilatent evaluate" in done.out, done.err
    assert (out / "recon" / "step_00000004.png").is_file() and (out / "metrics.jsonl").read_text().count("\n") == 2
    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (run_folder, out))
    assert {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"decoder"}
    evaluated = cli(
        "evaluate", out, "--num-samples", 0, "--num-held-out", 20, "--metrics", "psnr", "--out", tmp_path / "e"
    )
    assert evaluated.code == 0 and "psnr" in evaluated.out.lower(), "its data are those of the run"
    state = describe(out)
    assert (state.state, state.step, state.steps) == ("finished", 4, 4), "a script that waits for it ends"
    assert cli("runs", out, "--all-finished").code == 0


def test_the_decoder_of_a_video_model_is_sharpened(tmp_path: Path, cli: Command) -> None:
    """Its reconstruction loss and its adversary read tubelets; latents stay, and so do given frames."""
    trained = cli(
        "train", "bouncing-unite", "training.steps=2", "training.batch_size=4", "data.num_samples=24",
        "data.held_out=4", "training.sample_every=0", "training.evaluate_samples=0", "training.threads=1",
        "training.precision=fp32", "--out", tmp_path / "run",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    out = tmp_path / "sharp"
    done = cli("finetune-decoder", tmp_path / "run", "steps=4", *TINY, "batch_size=4", "--out", out)
    assert done.code == 0, done.err
    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", out))
    assert {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"decoder"}
    before, after = (unilatent.load(str(folder / "model")) for folder in (tmp_path / "run", out))
    clips = torch.rand(2, 16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.encode(clips), after.encode(clips))
    assert not torch.equal(before.decode(before.encode(clips)), after.decode(after.encode(clips)))


def test_a_model_of_the_package_is_sharpened_on_its_own_data(tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "sharp"
    done = cli("finetune-decoder", "digits", "steps=2", *TINY, "--out", out)
    assert done.code == 0, done.err
    old, new = unilatent.load("digits"), unilatent.load(out / "model")
    digits = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(old.encode(digits), new.encode(digits))
    assert not torch.equal(old.decode(old.encode(digits)), new.decode(old.encode(digits)))
    for model in ("digits", str(out)):  # both commands that the last line names
        splits = splits_for(old.modality, model, None)
        assert splits is not None and (len(splits.train), len(splits.held_out)) == (1437, 360), model
    evaluated = cli("evaluate", out, "--num", 0, "--num-held-out", 20, "--metrics", "psnr", "--out", tmp_path / "e")
    assert evaluated.code == 0, evaluated.err


def test_a_run_s_record_has_the_length_of_its_training_and_of_its_sharpening(
    run_folder: Path, tmp_path: Path, cli: Command
) -> None:
    assert cli("finetune-decoder", run_folder, "steps=4", *TINY, "--out", tmp_path / "sharp").code == 0
    known = unilatent.load(tmp_path / "sharp").known
    record, before = None if known is None else known(""), record_of(run_folder, "")
    assert record is not None
    assert record.training["sharpened"][0]["steps"] == 4
    assert {key: value for key, value in record.training.items() if key != "sharpened"} == before.training
    assert record.data == before.data


def test_one_that_is_not_finished_is_named_and_listed(run_folder: Path, tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "sharp"
    assert cli("finetune-decoder", run_folder, "steps=4", *TINY, "--out", out).code == 0
    for name in ("config.yaml", "model"):
        (out / name).rename(tmp_path / name)
    refused = cli("evaluate", out, "--num", 0)
    assert (
        refused.code == 2 and "not sharpened to its end; the same `unilatent finetune-decoder` goes on" in refused.err
    )
    state = describe(out)
    assert (state.state, state.step, state.steps) == ("stopped", 4, 4)
    assert "sharp" in cli("runs", tmp_path).out


def test_settings_that_make_no_sense_are_refused(run_folder: Path, tmp_path: Path, cli: Command) -> None:
    for setting, words in (("steps=0", "steps"), ("adversary=1", "adversary"), ("batch_size=x", "batch_size")):
        refused = cli("finetune-decoder", run_folder, setting, "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err and not (tmp_path / "x").exists()
    absent = cli("finetune-decoder", tmp_path / "none", "--out", tmp_path / "x")
    assert absent.code == 2 and "no such folder" in absent.err
    section = cli("finetune-decoder", run_folder, "training.steps=2", "--out", tmp_path / "x")
    assert section.code == 2 and "write steps=2" in section.err


@pytest.mark.faults
def test_f01_f02_a_killed_fine_tuning_goes_on_bitwise(run_folder: Path, tmp_path: Path) -> None:
    """Kill -9 while a decoder is sharpened, at any moment: the same command goes on, to the same weights."""
    arguments = [sys.executable, "-m", "unilatent", "finetune-decoder", str(run_folder), "steps=60", *TINY]
    whole = subprocess.run([*arguments, "--out", str(tmp_path / "whole")], capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    killed = 0
    for moment in (0.1, 0.35, 0.6):
        process = subprocess.Popen([*arguments, "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        begun, checkpoints = time.monotonic(), tmp_path / "cut" / "checkpoints"
        before = len(list(checkpoints.glob("step_*"))) if checkpoints.is_dir() else 0
        while process.poll() is None and time.monotonic() - begun < 120:
            if checkpoints.is_dir() and len(list(checkpoints.glob("step_*"))) > min(before, 2):
                time.sleep(moment)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed, "every one was over before it could be killed"
    rest = subprocess.run([*arguments, "--out", str(tmp_path / "cut")], capture_output=True, text=True, timeout=300)
    assert rest.returncode == 0, rest.stderr
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
