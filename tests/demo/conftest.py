"""A tiny trained run, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import unilatent
from unilatent.methods.base import LatentModel
from unilatent.presets import preset
from unilatent.training.trainer import Trainer


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps on the embedded digits."""
    config = preset("digits").override(
        "training.steps=12", "training.batch_size=16", "training.sample_every=0", "training.evaluate_samples=0",
        "training.checkpoint_every=0", "sampling.num_inference_steps=4",
    )  # fmt: skip
    return Trainer(config, tmp_path_factory.mktemp("demo") / "digits").fit()


@pytest.fixture(scope="session")
def model(run_folder: Path) -> LatentModel:
    return unilatent.load(run_folder, device="cpu")
