"""Long runs that nothing should wear down: random kills, and thousands of steps with a save every few."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from test_faults import finish, start
from test_training import digits

from unilatent.training.trainer import Trainer

KILLS = 100


@pytest.mark.soak
def test_f02_a_hundred_random_kills(tmp_path: Path) -> None:
    """100 kills at random moments of training, each followed by --resume auto: final weights equal bit for bit."""
    settings = ("training.steps=400", "training.checkpoint_every=7", "training.log_every=50")
    code, out = finish(start(tmp_path / "whole", *settings), within=600)
    assert code == 0, out
    want = digest(tmp_path / "whole" / "model")
    rng, kills, during = random.Random(0), 0, 0
    while kills < KILLS:
        process = start(tmp_path / "killed", *settings)
        moment = rng.uniform(0, 1.5)
        if rng.random() < 0.9:  # the others die while they start
            wait_until_training(tmp_path / "killed", process)
            during += 1
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, out = process.communicate()
        if process.returncode == 0:
            assert digest(tmp_path / "killed" / "model") == want
            shutil.rmtree(tmp_path / "killed")
        else:
            assert process.returncode == -9, out
    assert during > KILLS // 2, "most kills should hit training"
    code, out = finish(start(tmp_path / "killed", *settings), within=600)
    assert code == 0, out
    assert digest(tmp_path / "killed" / "model") == want


def wait_until_training(run: Path, process: subprocess.Popen[str], within: float = 120) -> None:
    """Until this very process holds the run folder, or has ended."""
    until = time.monotonic() + within
    while time.monotonic() < until and process.poll() is None:
        try:
            if json.loads((run / "lock.json").read_text())["pid"] == process.pid:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    assert process.poll() is not None, f"no training within {within} s"


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file; 0 of a folder, and of a file that a save in the background has just renamed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


@pytest.mark.soak
def test_f41_memory_files_and_disk_stay_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 steps with a save every 10: memory and open files flat within 2 %, disk bounded by keep_checkpoints."""
    config = digits(
        "training.steps=2000", "training.batch_size=4", "training.checkpoint_every=10", "training.log_every=10",
        "training.sample_every=100", "training.keep_checkpoints=3",
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run")
    memory: list[int] = []
    files: list[int] = []
    disk: list[int] = []
    original = trainer._monitor_and_save

    def measured() -> None:
        original()
        if trainer.step % 10 == 0:
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            files.append(len(os.listdir("/proc/self/fd")))
            folder = tmp_path / "run" / "checkpoints"
            disk.append(sum(size_of(path) for path in folder.rglob("*")))

    monkeypatch.setattr(trainer, "_monitor_and_save", measured)
    trainer.fit()
    assert len(memory) == 200
    early, late = statistics.median(memory[50:75]), statistics.median(memory[-25:])
    assert late < 1.02 * early, f"{early / 2**20:.1f} MiB became {late / 2**20:.1f} MiB"
    # the fewest: a save that is being written in the background has a file open when it is looked at
    assert min(files[-25:]) == min(files[50:75]), files
    assert statistics.median(disk[3:]) < 1.02 * disk[3], "three checkpoints"
    assert max(disk[3:]) < 1.02 * 4 / 3 * disk[3], "and at most the one that is being written"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
