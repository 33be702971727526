"""The memory of a step can be estimated for every method on every modality, without side effects."""

from __future__ import annotations

import pytest
import torch
from building import batch_of, model_config, model_of

from unilatent.maths.streams import Streams
from unilatent.registry import available, find
from unilatent.training import memory
from unilatent.training.config import RunConfig


@pytest.mark.parametrize(
    ("modality", "method"), [(a, b) for a in available("modalities") for b in available("methods")]
)
def test_an_estimate_leaves_nothing_fake_behind(modality: str, method: str) -> None:
    """What a modality or method caches between calls must not hold fake tensors."""
    config, data = model_config(modality, method), find("modalities", modality).DataConfig.small().plain()
    run = RunConfig.parse({**config.plain(), "data": data, "training": {"steps": 1, "batch_size": 4}})
    memory._measured.cache_clear()
    found = memory.estimate(run, batch_of(modality, 4), torch.device("cpu"))
    assert found.activations is not None and found.activations > 0
    parts = list(model_of(modality, method).loss(batch_of(modality, 4), Streams(("a",), range(4))))
    assert all(type(part.value) is torch.Tensor and part.value.isfinite() for part in parts)
