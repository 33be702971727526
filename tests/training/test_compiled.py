"""Compiled networks of every method: no graph break, a bounded number of graphs, and the numbers of eager code.

The compiler's front half runs here (`aot_eager`); its back half needs a GPU to be what runs on one.
"""

from __future__ import annotations

import pytest
import torch
from building import batch_of, model_of
from torch._dynamo.utils import counters

from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.registry import available
from unilatent.training.config import TrainingConfig
from unilatent.training.setup import COMPILED_FROM, compile_networks, compiles, slow

SIZES = (4, 3, 2, 4, 4, 3)
"""Samples of successive micro-batches: an epoch's last one is smaller, and the next epoch begins."""
SEEN = 3
"""Micro-batches after which no further graph is compiled: the second size makes the number of samples a variable."""


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model: LatentModel, number: int, modality: str) -> dict[str, torch.Tensor]:
    """The gradients of a micro-batch: its samples, times, draws and dropped conditions differ from those of others."""
    model.zero_grad(set_to_none=True)
    start = 5 * number
    batch, streams = batch_of(modality, SIZES[number], start), Streams(("t",), range(start, start + SIZES[number]))
    for part in model.loss(batch, streams):
        part.value.backward()
        part.close()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


QUICK = ("unite", "image"), ("unified_latents", "image")
ALL = [
    pytest.param(method, modality, marks=() if (method, modality) in QUICK else pytest.mark.slow)
    for method in available("methods")
    for modality in ("image", "molecule")
]


@pytest.mark.parametrize(("method", "modality"), ALL)
def test_every_method_compiles_without_breaks_and_few_graphs(method: str, modality: str):
    """`fullgraph` raises at a break, so a break cannot go unseen."""
    model, eager = (model_of(modality, method, awake=True) for _ in range(2))
    compile_networks(model, backend="aot_eager")
    graphs = []
    for number in range(len(SIZES)):
        found, want = (gradients(m, number, modality) for m in (model, eager))
        graphs.append(counters["stats"]["unique_graphs"])
        assert found.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(1 + gradient.abs().max()))
    assert not counters["graph_break"]
    assert graphs[0] > 0 and set(graphs[SEEN:]) == {graphs[SEEN - 1]}, graphs
    assert graphs[-1] <= 12, graphs


def test_large_models_compile_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    model, auto = model_of("image", "unite"), TrainingConfig(steps=1)
    assert auto.compile == "auto" and not compiles(auto, model)
    monkeypatch.setattr("unilatent.training.setup.find_spec", lambda name: object())
    monkeypatch.setattr(LatentModel, "num_trainable", COMPILED_FROM)
    assert not compiles(auto, model) and not slow(auto, model)
    monkeypatch.setattr(LatentModel, "device", torch.device("cuda"))
    assert compiles(auto, model)
    assert not compiles(TrainingConfig(steps=1, compile=False), model)
    monkeypatch.setattr(LatentModel, "num_trainable", COMPILED_FROM - 1)
    assert not compiles(auto, model) and compiles(TrainingConfig(steps=1, compile=True), model)
