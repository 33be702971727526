"""A step reads its micro-batches one after the other, and a step that is left out names its samples without them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from unilatent import batches
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

SMALL = (
    "training.steps=2", "training.batch_size=12", "training.micro_batch_size=2", "training.workers=0",
    "training.sample_every=0", "training.evaluate_samples=0", "training.threads=1",
)  # fmt: skip


def test_a_step_holds_one_micro_batch_beside_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most, original = [0], batches.collate

    def watched(*arguments: Any) -> Any:
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        batch = original(*arguments)
        alive.append(weakref.ref(batch.data))
        return batch

    monkeypatch.setattr(batches, "collate", watched)
    Trainer(preset("digits").override(*SMALL), tmp_path / "run").fit()
    assert len(alive) >= 12 and most[0] <= 1


def test_a_step_that_is_left_out_names_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(preset("digits").override(*SMALL, "training.non_finite=skip:5"), tmp_path / "run")
    monkeypatch.setattr("unilatent.training.step.gradient_norm", lambda *_: torch.tensor(torch.nan))
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_batches.rank0.jsonl").read_text().splitlines()]
    expected = [[trainer.splits.train.index_at(0, 12 * step + p) for p in range(12)] for step in range(2)]
    assert [line["samples"] for line in lines] == expected
