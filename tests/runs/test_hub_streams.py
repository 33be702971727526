"""Runs on a stream: bitwise like any other, with their budget of bad samples and without a known length."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK
from PIL import Image as PIL
from test_training import assert_same, state

from unilatent.cli.train import describe
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.trainer import Trainer

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety images in three parquet files, one of them broken."""
    root = tmp_path_factory.mktemp("stream")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    for file in range(3):
        cells = []
        for i in range(30):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(100 * file + i).integers(0, 256, (8, 8), dtype=np.uint8)
            PIL.fromarray(pixels).save(buffer, format="PNG")
            cells.append({"bytes": b"<html>" if (file, i) == (1, 4) else buffer.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"image": cells, "label": [i % 3 for i in range(30)]}, features=features)
        table.to_parquet(root / f"train-{file}.parquet")
    return root


def config(folder: Path, *overrides: str) -> RunConfig:
    return preset("digits").override(
        *QUICK, f"data.path=hf:{folder}", "data.streaming=true", "data.held_out=0", "data.shuffle_buffer=16", *overrides
    )


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streamed") / "run"
    Trainer(config(folder), out).fit()
    return out


def test_a_stream_trains_and_names_its_bad_sample(run: Path) -> None:
    (line,) = [json.loads(line) for line in (run / "bad_samples.rank0.jsonl").read_text().splitlines()]
    assert "row 4 of file 1 of train" in line["message"] and line["index"] == (1 << 32) + 4


def test_a_streamed_run_does_not_depend_on_workers_and_resumes_bitwise(tmp_path: Path, run: Path, folder: Path) -> None:
    Trainer(config(folder, "training.workers=2"), tmp_path / "workers").fit()
    assert_same(state(tmp_path / "workers", 12), state(run, 12))
    shutil.copytree(run, tmp_path / "resumed")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_{step:08d}")
    resumed = Trainer(config(folder, "training.workers=1"), tmp_path / "resumed", resume="auto")
    assert resumed.step == 4
    resumed.fit()
    assert_same(state(tmp_path / "resumed", 12), state(run, 12))
    assert (tmp_path / "resumed" / "bad_samples.rank0.jsonl").read_text() == (
        run / "bad_samples.rank0.jsonl"
    ).read_text()


def test_a_run_of_unknown_length_counts_in_steps(tmp_path: Path, folder: Path) -> None:
    for i in range(20):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        PIL.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(ValueError, match=r"data\.num_samples: not set.*training\.steps"):
        Trainer(config(tmp_path / "set", "training.steps=null", "training.epochs=2"), tmp_path / "run")
    trainer = Trainer(config(tmp_path / "set"), tmp_path / "run")
    assert "uncounted training samples" in describe(trainer)
    trainer.fit()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == 192 and last["epoch"] == 0
    known = config(tmp_path / "set", "training.steps=null", "training.epochs=2", "data.num_samples=40")
    assert Trainer(known, tmp_path / "other").steps == 5
