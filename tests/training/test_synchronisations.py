"""How often an optimiser step makes the host wait for the device: once, to read loss, norm and counts together.

Counted on a CPU, with the formulas of a GPU: every operation that would copy a value to the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import batch_of, condition_config, model_config, splits_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unilatent.methods.base import LatentModel
from unilatent.nets import branches
from unilatent.processes import Processes
from unilatent.registry import available
from unilatent.training.config import RunConfig, TrainingConfig
from unilatent.training.state import TrainingState
from unilatent.training.step import OptimiserStep
from unilatent.types import encode_texts

WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave",
           "equal", "is_nonzero"}  # fmt: skip


class Waits(TorchDispatchMode):
    """Lists the operations that wait; `tolist` is one that does not pass through the dispatcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.found: list[str] = []
        plain = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: self.found.append("tolist") or plain(tensor))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
        )
        if name in WAITING or by_mask:
            self.found.append(name)
        return op(*args, **(kwargs or {}))


def step_of(modality: str, method: str, **conditions: Any) -> OptimiserStep:
    torch.manual_seed(0)
    model_settings = model_config(modality, method)
    if conditions:
        model_settings = model_settings.model_copy(update={"conditions": conditions})
    training = TrainingConfig(steps=1, batch_size=4, micro_batch_size=2)
    data = splits_of(modality)
    model = LatentModel.build(model_settings)
    config = RunConfig(
        modality=model_settings.modality, conditions=model_settings.conditions, method=model_settings.method,
        data=model.modality.DataConfig.small(), training=training,
    ).computing_in("fp32")  # fmt: skip
    assert data.train
    state = TrainingState(model, config.training)
    return OptimiserStep(state, config, Processes("cpu"), 10, measure_gradients=True)


def waits(step: OptimiserStep, modality: str, monkeypatch: pytest.MonkeyPatch, measure: bool = False) -> list[str]:
    conditions = step.state.model.conditions
    micro = []
    for start in (0, 2):
        batch = batch_of(modality, 2, start)
        values = {**conditions.example(2), **{k: v for k, v in batch.values.items() if k in conditions.arguments}}
        if "prompts" in values:
            values["prompts"] = encode_texts(["a small red circle", ""])
        micro.append((range(start, start + 2), type(batch)(batch.data, values)))
    step(micro)  # states of the optimizers are made in the first step
    monkeypatch.setattr(branches, "on_cpu", lambda x: False)
    with Waits(monkeypatch) as found:
        step(micro, measure=measure, count=lambda: {"bad_samples": 0})
    return found.found


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("modality", ["image", "molecule", "crystal"])
@pytest.mark.parametrize("method", available("methods"))
def test_a_step_waits_once(method: str, modality: str, measure: bool, monkeypatch: pytest.MonkeyPatch):
    assert waits(step_of(modality, method), modality, monkeypatch, measure) == ["tolist"]


@pytest.mark.parametrize("condition", available("conditions"))
def test_conditions_wait_for_nothing(condition: str, monkeypatch: pytest.MonkeyPatch):
    config = condition_config(condition, splits_of("image").train.facts) if condition == "class_label" else None
    if config is None:
        from unilatent.registry import find

        config = find("conditions", condition).Config.small()
    assert waits(step_of("image", "unite", **{condition: config}), "image", monkeypatch) == ["tolist"]


def test_a_wait_is_found(monkeypatch: pytest.MonkeyPatch):
    x = torch.tensor([1.0, 0.0])
    with Waits(monkeypatch) as found:
        bool(x.sum() > 0), x[x > 0], x.sum().item(), x.nonzero(), float(x[0]), x.tolist()
    assert len(found.found) == 6
