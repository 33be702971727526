"""Unusual machines: another clock, another locale, no home, no network, no terminal, odd paths."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, Command
from PIL import Image
from test_training import assert_same, digits, state

import unilatent
from unilatent.runs.crash import write_report
from unilatent.training.trainer import Trainer


def odd_images(folder: Path) -> Path:
    """Two classes of six images; names in other scripts, with spaces and with bytes that are not UTF-8."""
    rng = np.random.default_rng(0)
    for label, i in itertools.product(("Ä b", os.fsdecode(b"caf\xe9")), range(6)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        name = "日本 .png" if i == 0 else os.fsdecode(b"\xff.png") if i == 1 else f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / label / name)
    return folder


def test_f35_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes back an hour at every look: weights, steps and the lock are those of a steady clock."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    monkeypatch.setattr(time, "strftime", lambda form: f"long ago {-next(hours)}")
    trainer = Trainer(digits("training.steps=8"), tmp_path / "run")
    trainer.fit()
    assert not (tmp_path / "run" / "lock.json").exists()
    Trainer(digits(), tmp_path / "run", resume="auto").fit()
    assert next(hours) > 2, "the clock was looked at"
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_f35_crashes_at_one_time_keep_their_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    reports = [write_report(tmp_path, 0, RuntimeError(str(i)), "", {}) for i in range(3)]
    assert len(set(reports)) == 3
    assert [f"RuntimeError: {i}" in Path(path).read_text() for i, path in enumerate(reports)] == [True] * 3


def test_f35_names_in_any_script_go_round(cli: Command, tmp_path: Path) -> None:
    """Class names and paths with spaces, other scripts and bytes that are no UTF-8, into a model and out of it."""
    data, run = odd_images(tmp_path / "päth with späces" / "data"), tmp_path / "rün 1"
    done = cli("train", "digits", *QUICK, f"data.path={json.dumps(str(data))}", "data.held_out=2", "--out", run)
    assert done.code == 0, done
    names = unilatent.load(run, device="cpu").config.conditions["class_label"].class_names
    assert names == tuple(sorted(path.name for path in data.iterdir()))
    assert cli("train", "digits", *QUICK, f"data.path={json.dumps(str(data))}", "data.held_out=2", "--out", run,
               "--resume", "auto").code == 0  # fmt: skip
    for name in names:
        assert cli("sample", run, "--num", 1, "--steps", 1, "--label", name, "--out", tmp_path / name).code == 0
    latents = ("encode", run, data, "--shard-size", 4, "--out", tmp_path / "lätents")
    assert cli(*latents).code == 0 and "12 of them already encoded" in cli(*latents).out
    assert cli("decode", run, tmp_path / "lätents", "--out", tmp_path / "ouт").code == 0
    assert cli("runs", tmp_path).code == 0


@pytest.mark.faults
@pytest.mark.parametrize("nowhere", ["missing", "unwritable"])
def test_f35_a_bare_machine_trains_samples_and_reconstructs(tmp_path: Path, nowhere: str) -> None:
    """LC_ALL=C, HOME and TMPDIR missing or unwritable, no network, no terminal, a path with spaces and umlauts."""
    place = {"missing": str(tmp_path / "nowhere"), "unwritable": "/proc/self/fd"}[nowhere]  # even to root
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(unilatent.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "LC_ALL": "C", "HOME": place, "TMPDIR": place, "HF_HUB_OFFLINE": "1", "UNILATENT_OFFLINE": "1",
        "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    data, run = odd_images(tmp_path / "päth with späces" / "data"), tmp_path / "päth with späces" / "rün"

    def unilatent_(*arguments: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "unilatent", *map(str, arguments)], env=environment, cwd=tmp_path,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]

    unilatent_(
        "train", "digits", *QUICK, f"data.path={json.dumps(str(data))}", "data.held_out=2", "training.sample_every=6",
        "training.workers=1", "--out", run,
    )  # fmt: skip
    unilatent_("sample", run, "--num", 2, "--steps", 1, "--label", "Ä b", "--out", tmp_path / "päth with späces" / "a")
    unilatent_("reconstruct", run, data, "--out", tmp_path / "päth with späces" / "b")
    assert len(list((tmp_path / "päth with späces" / "b").glob("0*.png"))) == 12
