"""`unilatent sweep`: runs that differ in a few settings, skipped where finished, compared in a table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Command

TINY = ("training.steps=2", "training.sample_every=0", "training.evaluate_samples=20", "training.checkpoint_every=0",
        "training.log_every=1", "training.batch_size=8", "sampling.num_inference_steps=2",
        "data.held_out=1700")  # fmt: skip


def test_a_sweep_trains_each_setting_once_and_compares_them(tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "sweep"
    arguments = ("sweep", "digits", *TINY, "--ablate", "gradient", "--seeds", 1, "--jobs", 2, "--out", out)
    dry = cli(*arguments, "--dry-run")
    assert dry.code == 0 and "2 settings, 2 runs, 0 of them finished" in dry.out and not out.exists()
    done = cli(*arguments)
    assert done.code == 0, done.err
    runs = sorted(path.parent.name for path in out.glob("*/seed-0"))
    assert [name[:24] for name in runs] == ["as-it-is", "gradient-through-the-lat"]
    assert {path.name for path in out.glob("sweep.*")} | {"table.md"} == {"sweep.json", "sweep.png", "table.md"}
    found = json.loads((out / "sweep.json").read_text())
    assert [row["cell"] for row in found["rows"]] == ["as it is", "gradient through the latents"]
    assert found["rows"][1]["paper"] == {"generation": "worse", "reconstruction": "better"}
    assert not found["rows"][1]["here"] and not found["left_out"], "one seed has no spread"
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-0/metrics.jsonl")}
    again = cli(*arguments, "--metrics", "psnr,l1")
    assert again.code == 0 and "2 of them finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in written} == written, "finished runs are left alone"
    assert set(json.loads((out / "sweep.json").read_text())["metrics"]) == {"psnr", "l1"}


def test_a_stop_saves_what_runs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "unilatent", "sweep", "digits", *TINY, "training.steps=4000",
               "method.flow_draws=1,2", "--seeds", "1", "--jobs", "1", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = None
    for _ in range(600):
        time.sleep(0.1)
        logs = list(out.glob("*/seed-0/metrics.jsonl"))
        if logs and logs[0].stat().st_size:
            first = logs[0].parent
            break
    assert first is not None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in printed, printed
    assert list((first / "checkpoints").glob("step_*")), "the run that was stopped is saved"
    assert len(list(out.glob("*/seed-0"))) == 1, "no other began"


def test_a_run_that_fails_costs_no_other(tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "sweep"
    done = cli("sweep", "digits", *TINY, "data.path=digits,absent.npz", "--seeds", 1, "--out", out)
    assert done.code == 1 and "failed:" in done.out and "absent.npz" in done.out
    found = json.loads((out / "sweep.json").read_text())
    assert found["left_out"] == ["path absent.npz, seed 0: is not finished"]
    assert found["rows"][0]["numbers"]["psnr"]["std"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing varies"),
        (("--ablate", "adversary"), "'adversary' is no ablation of this method; there are gradient, weights, norm"),
        (("training.steps=1,zwei",), "training.steps"),
        (("method.flow_draws=1,2", "--seeds", 0), "--seeds"),
        (("method.flow_draws=1,2", "seed=3"), "seed: is set by --seeds"),
        (("method.flow_draws=1,2", "training.evaluate_samples=0"), "training.evaluate_samples: 0, but a sweep"),
        (("method.flow_draws=1,2", "--metrics", "fidd"), "fidd"),
        (
            ("method.flow_draws=1,2", "--metrics", "psnr,fid"),
            "name what they measure: training.evaluate_metrics=[psnr,fid]",
        ),
    ],
)
def test_what_makes_no_sweep_is_refused_before_any_run(
    tmp_path: Path, cli: Command, arguments: tuple, words: str
) -> None:  # fmt: skip
    done = cli("sweep", "digits", *arguments, "--out", tmp_path / "sweep")
    assert done.code == 2 and words in done.err.replace("\n", " "), done.err
    assert not (tmp_path / "sweep").exists()
