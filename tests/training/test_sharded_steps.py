"""Optimiser steps of blocks sharded over processes (FSDP2, gloo), at sizes that the processes do not divide."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from building import batch_of, model_config, splits_of
from gloo_ranks import run_in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from unilatent.config import ConfigError
from unilatent.methods.base import LatentModel
from unilatent.nets.layers import Repeated
from unilatent.processes import Processes
from unilatent.sharding import Mode, full, is_sharded, shard, shards_of
from unilatent.training.config import OptimizerConfig, RunConfig, TrainingConfig
from unilatent.training.muon import Muon
from unilatent.training.state import TrainingState
from unilatent.training.step import OptimiserStep

BATCH, STEPS = 12, 4
ODD = {"decoder": {"width": 32, "depth": 2, "heads": 2, "mlp_width": 33}}
"""33 rows are divided by no 2, 32 by no 3."""


NEW = hasattr(dist, "all_gather_single")
GATHER = "all_gather_single" if NEW else "all_gather_into_tensor"
REDUCE = "reduce_scatter_single" if NEW else "reduce_scatter_tensor"
"""The collectives that FSDP calls, by torch's version."""


class Sent:
    """Counts the collectives of FSDP by name and type."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()
        for name in (GATHER, REDUCE):
            self._watch(name)

    def _watch(self, name: str) -> None:
        call = getattr(dist, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            tensor = next(x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor))
            self.calls[name, tensor.dtype] += 1
            return call(*arguments, **named)

        setattr(dist, name, counted)


def trained(processes: Processes, method: str, mode: Mode, precision: str, sent: Sent | None = None) -> dict[str, Any]:
    """Take steps with Muon in float32, two micro-batches each. Losses, gradient norms, weights, blocks, collectives."""
    torch.manual_seed(0)
    settings = model_config("image", method, **(ODD if method == "unite" else {}))
    training = TrainingConfig(
        steps=STEPS, batch_size=BATCH, shard=mode, optimizer=OptimizerConfig(muon_precision="fp32", learning_rate=1e-3)
    )
    model = LatentModel.build(settings)
    config = RunConfig(
        modality=settings.modality, conditions=settings.conditions, method=settings.method,
        data=model.modality.DataConfig.small(), training=training,
    ).computing_in(precision)  # fmt: skip
    assert splits_of("image").train
    if processes.world > 1 and mode:
        shard(model, processes.device, mode, precision)
    step = OptimiserStep(TrainingState(model, config.training), config, processes, 10, measure_gradients=False)
    losses, norms = [], []
    for number in range(STEPS):
        if sent is not None:
            sent.calls.clear()
        mine = range(number * BATCH + processes.rank, (number + 1) * BATCH, processes.world)
        half = (len(mine) + 1) // 2
        micro = []
        for positions in (mine[:half], mine[half:]):
            whole = batch_of("image", BATCH)
            rows = torch.tensor([p % BATCH for p in positions])
            values = {name: value[rows] for name, value in whole.values.items()}
            micro.append((positions, type(whole)(whole.data[rows], values)))
        result = step(micro)
        assert result.finite
        step.state.advance()
        losses.append(float(result.logs["loss/total"]))
        norms.append(result.grad_norm)
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    blocks = [m for m in model.modules() if isinstance(m, Repeated) and any(p.requires_grad for p in m.parameters())]
    counts = dict(sent.calls) if sent is not None else {}
    uneven = [p for p in model.parameters() if is_sharded(p) and p.shape[0] % processes.world]
    return {"losses": losses, "norms": norms, "weights": weights, "blocks": len(blocks), "sent": counts,
            "uneven": len(uneven)}  # fmt: skip


def sharded(processes: Processes) -> dict[str, Any]:
    mode: Mode = "hybrid" if shards_of("hybrid", processes.world) < processes.world else True
    sent = Sent()
    found = {method: trained(processes, method, mode, "fp32", sent) for method in ("unite", "unified_latents")}
    return {**found, "bf16": trained(processes, "unite", mode, "bf16", sent)}


def hybrid(processes: Processes) -> dict[str, Any]:
    """Steps, and Muon alone with shards of unequal and of no rows beside replicated matrices."""
    from test_muon import SETTINGS, set_gradients, weights

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    cut = (0, 3, 4, 5, 8)
    parameters = weights()
    for i in cut:
        placed = distribute_tensor(parameters[i].detach(), mesh, [Replicate(), Shard(0)])
        parameters[i] = torch.nn.Parameter(placed)
    optimizer = Muon(parameters, **SETTINGS, precision="fp32")
    for step in range(3):
        plain = weights()
        set_gradients(plain, step)
        for i, p in enumerate(parameters):
            g = plain[i].grad
            p.grad = distribute_tensor(g, mesh, [Replicate(), Shard(0)]) if i in cut else g
        optimizer.step()
    return {**sharded(processes), "muon": [full(p.detach()) for p in parameters]}


def check(ranks: list[Any]) -> None:
    """Losses, norms and weights are those of one process; each block is reduced once a step, in float32."""
    for method in ("unite", "unified_latents"):
        one = trained(Processes("cpu"), method, False, "fp32")
        for found in (rank[method] for rank in ranks):
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert found["norms"] == pytest.approx(one["norms"], rel=1e-4)
            for name, weight in one["weights"].items():
                torch.testing.assert_close(found["weights"][name], weight, atol=1e-4, rtol=0)
            assert found["sent"][REDUCE, torch.float32] == found["blocks"]
            assert not found["sent"].get((GATHER, torch.bfloat16))
    assert ranks[0]["unite"]["uneven"]
    narrow = trained(Processes("cpu"), "unite", False, "bf16")
    for found in (rank["bf16"] for rank in ranks):
        assert found["losses"] == pytest.approx(narrow["losses"], rel=0.02)
        assert found["sent"][REDUCE, torch.float32] == found["blocks"]
        kinds = {dtype for name, dtype in found["sent"] if name == GATHER}
        assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_sharded_steps_with_muon_are_those_of_one_process(tmp_path: Path, world: int) -> None:
    check(run_in_ranks("test_sharded_steps:sharded", world, tmp_path))


@pytest.mark.faults
def test_hybrid_steps_with_muon_are_those_of_one_process(tmp_path: Path) -> None:
    """Two machines of two processes: each holds a copy. Muon's weights are bitwise those of one process."""
    from test_muon import SETTINGS, set_gradients, weights

    ranks: Any = run_in_ranks("test_sharded_steps:hybrid", 4, tmp_path, local=2)
    alone = weights()
    optimizer = Muon(alone, **SETTINGS, precision="fp32")
    for step in range(3):
        set_gradients(alone, step)
        optimizer.step()
    for rank in ranks:
        assert all(torch.equal(a, b) for a, b in zip(rank["muon"], alone, strict=True))
    check(ranks)


def test_machines_that_cannot_be_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [shards_of(mode, 1) for mode in (False, True, "hybrid")] == [1, 1, 1]
    for local, world, words in ((None, 4, "sets it"), ("1", 4, "at least two"), ("3", 4, "equally many")):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with pytest.raises(ConfigError, match=words):
            shards_of("hybrid", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (shards_of("hybrid", 6), shards_of(True, 6), shards_of(False, 6)) == (2, 6, 1)
