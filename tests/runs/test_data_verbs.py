"""unilatent data prepare and verify, and training on the shards that they write."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from PIL import Image
from sklearn.datasets import load_digits
from test_cli import images
from test_training import assert_same, digits, state

from unilatent.training.trainer import Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 300 embedded digits as class folders of PNG."""
    folder, data = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (pixels, label) in enumerate(zip(data.images[:300], data.target, strict=False)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.rint(pixels / 16 * 255).astype(np.uint8)).save(folder / str(label) / f"{i:04d}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_and_verify(cli: Command, tmp_path: Path) -> None:
    source = images(tmp_path / "in", each=5, size=20)
    (source / "class1" / "broken.png").write_bytes(b"\x89PNG nothing")
    options = ("--size", 8, "--format", "png", "--shard-size", 4)
    done = cli("data", "prepare", source, "--out", tmp_path / "out", *options, "--workers", 2)
    assert done.code == 0, done.err
    assert "10 samples, 2 classes in 3 shards in" in done.out and "1 bad sample left out" in done.out
    assert "class1/broken.png" in (tmp_path / "out" / "bad_samples.jsonl").read_text()
    again = cli("data", "prepare", source, "--out", tmp_path / "out", *options)
    assert again.code == 0 and "(3 of them already written)" in again.out
    sound = cli("data", "verify", tmp_path / "out")
    assert (sound.code, sound.out) == (0, "3 shards checked, all valid\n")

    path = tmp_path / "out" / "shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[700] ^= 4
    path.write_bytes(raw)
    bad = cli("data", "verify", tmp_path / "out")
    assert bad.code == 1 and bad.out.startswith("shard-000001.tar: SHA-256 is") and "3 shards checked, 1 bad" in bad.out


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_decodes_every_file_of_a_folder(cli: Command, tmp_path: Path, workers: int) -> None:
    source = images(tmp_path / "in", each=5)
    assert cli("data", "verify", source, "--workers", workers).out == "10 samples checked, all valid\n"
    whole = (source / "class0" / "3.png").read_bytes()
    (source / "class0" / "3.png").write_bytes(whole[:50])
    bad = cli("data", "verify", source, "--workers", workers)
    assert bad.code == 1 and str(source / "class0" / "3.png") in bad.out and "10 samples checked, 1 bad" in bad.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prepare", "{in}", "--out", "{out}", "--size", "0"), "--size: '0' is not a size in pixels"),
        (("prepare", "{in}", "--out", "{out}", "--format", "bmp"), "--format: 'bmp' is unknown; use jpg, png, webp"),
        (("prepare", "{gone}", "--out", "{out}"), "does not exist; give a folder or .zip of images"),
        (("verify", "{gone}"), "does not exist"),
        (("verify", "pipe:cat x.tar"), "runs a shell command and is refused"),
        (("verify", "{gone}-{{0..3}}.tar"), "(4 of 4 shards are missing)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    cli: Command, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"in": images(tmp_path / "in"), "out": tmp_path / "out", "gone": tmp_path / "gone"}
    done = cli("data", *(argument.format(**places) for argument in arguments))
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


def test_training_on_shards_resumes_bit_for_bit(cli: Command, digit_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    done = cli("data", "prepare", digit_folder, "--out", shards, "--format", "png", "--shard-size", 37)
    assert done.code == 0, done.err
    settings = (f"data.path={shards}", "data.held_out=20", "training.steps=8")
    Trainer(digits(*settings), tmp_path / "whole").fit()
    stopped = Trainer(digits(*settings, "training.workers=1"), tmp_path / "parts")
    assert (stopped.samples, len(stopped.splits.held_out)) == (280, 20)
    assert stopped.config.conditions["class_label"].num_classes == 10
    stopped.steps = 5
    stopped.fit()
    shutil.rmtree(tmp_path / "cache")  # what was kept of the shards is only for speed
    Trainer(digits(*settings), tmp_path / "parts", resume=str(tmp_path / "parts/checkpoints/step_00000005")).fit()
    assert_same(state(tmp_path / "whole", 8), state(tmp_path / "parts", 8))

    (shards / "shards.json").write_text((shards / "shards.json").read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="damaged"):
        Trainer(digits(*settings), tmp_path / "parts", resume="auto")


def test_a_run_reconstructs_and_encodes_shards(
    cli: Command, run_folder: Path, digit_folder: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    shutil.copytree(digit_folder / "3", few / "3")
    assert cli("data", "prepare", few, "--out", tmp_path / "shards", "--format", "png").code == 0
    done = cli("reconstruct", run_folder, tmp_path / "shards", "--num", 5, "--out", tmp_path / "again")
    assert done.code == 0 and "5 reconstructions" in done.out, done.err
    assert cli("encode", run_folder, tmp_path / "shards" / "shard-000000.tar", "--out", tmp_path / "z").code == 0


def wait_for_the_end_of_group(group: int) -> None:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their first process")


@pytest.mark.faults
def test_prepare_survives_kills(digit_folder: Path, tmp_path: Path) -> None:
    """kill -9 of the first process at several moments: the others leave, what is made in the end is the same."""
    command = [sys.executable, "-m", "unilatent", "data", "prepare", str(digit_folder), "--format", "png",
               "--shard-size", "5", "--workers", "2", "--out"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=120, capture_output=True)
    kills = 0
    for wanted in (1, 15, 40, 59):
        process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True)
        while process.poll() is None and len(list((tmp_path / "out").glob("*.done"))) < wanted:
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.wait()
        wait_for_the_end_of_group(process.pid)
    subprocess.run([*command, str(tmp_path / "out")], check=True, timeout=120, capture_output=True)
    assert kills >= 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")
