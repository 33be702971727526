"""Weights that are cast together: the same numbers, in fewer operations, for every pass of a micro-batch."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from building import batch_of, model_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unilatent.methods.base import LatentModel
from unilatent.nets import branches, casts
from unilatent.nets.casts import cast_together, narrow
from unilatent.nets.layers import CastLinear, Repeated
from unilatent.nets.transformer import Block, PlainTransformer, Transformer
from unilatent.processes import Processes
from unilatent.training import parts
from unilatent.training.config import RunConfig, TrainingConfig
from unilatent.training.state import TrainingState
from unilatent.training.step import OptimiserStep
from unilatent.types import Conditioning, grid_layout

D, LAYOUT, BF16 = 16, grid_layout((2, 2)), torch.bfloat16


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas of a GPU."""
    monkeypatch.setattr(branches, "on_cpu", lambda x: False)


class Both(nn.Module):
    """An adaptive and a plain transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adaptive, self.plain = Transformer(D, 2, 2, D), PlainTransformer(D, 2, 2, 2 * D)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape) + (p.ndim == 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.adaptive(x, LAYOUT, torch.tensor([0.2, 0.9]), Conditioning(normals(2, D, seed=3))))


class Operations(TorchDispatchMode):
    """Counts operations by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def groups(model: nn.Module) -> list[list[Tensor]]:
    return [module.narrow_weights() for module in model.modules() if isinstance(module, Repeated)]


def two_passes(model: Both, context: AbstractContextManager[object]) -> tuple[list[Tensor], Counter[str]]:
    """Outputs of two passes and the gradients of all weights, summed over two backward passes; operations."""
    model.zero_grad()
    outputs = []
    with Operations() as operations, torch.autocast("cpu", enabled=False), context:
        for seed in (1, 2):
            with torch.autocast("cpu", BF16):
                outputs.append(model(normals(2, 4, D, seed=seed)))
            (outputs[-1].float() * normals(2, 4, D, seed=7)).sum().backward()
    return [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)], operations.counts


def test_same_numbers_from_fewer_operations():
    model = Both()
    alone, before = two_passes(model, nullcontext())
    together, after = two_passes(model, cast_together(groups(model), BF16))
    assert len(together) == 2 + len(list(model.parameters()))
    assert all(map(torch.equal, alone, together))
    weights = sum(map(len, groups(model)))
    assert weights == 2 * (5 * 2 + 5) + 2 * (4 * 2 + 2 * 2)
    assert after["_foreach_copy_"] == 4 + 2 * 4  # each block, and the gradients of each block in each pass
    assert before["_to_copy"] - after["_to_copy"] > 3 * weights  # matrices once and norms twice, gradients twice


def test_frozen_weights_get_no_gradient():
    model = Both()
    model.adaptive.requires_grad_(False)
    model.plain.blocks[0].up.weight.requires_grad_(False)
    alone, _ = two_passes(model, nullcontext())
    together, _ = two_passes(model, cast_together(groups(model), BF16))
    assert len(together) == len(alone) < 2 + len(list(model.plain.parameters()))
    assert all(map(torch.equal, alone, together))


def test_where_copies_are_read():
    """In autocast inside the context, and neither in float32, nor in compiled code, nor afterwards."""
    layer = CastLinear(3, 2)
    with cast_together([[layer.weight]], BF16):
        assert narrow(layer.weight) is layer.weight
        with torch.autocast("cpu", BF16):
            assert narrow(layer.weight).dtype == BF16 and narrow(layer.bias) is layer.bias
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                assert narrow(layer.weight) is layer.weight
            with cast_together([[layer.bias]], BF16):
                assert narrow(layer.bias).dtype == BF16
            assert narrow(layer.bias) is layer.bias and narrow(layer.weight).dtype == BF16
    with torch.autocast("cpu", BF16):
        assert narrow(layer.weight) is layer.weight and not casts._copies


def test_gradients_of_a_block_are_complete_when_backward_has_gone_through_it():
    """So that sums over processes travel during the rest of the pass."""
    model, arrived = Both(), list[str]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name.split(".")[0]))
    with torch.autocast("cpu", enabled=False), cast_together(groups(model), BF16):
        with torch.autocast("cpu", BF16):
            out = model(normals(2, 4, D))
        out.float().sum().backward()
    assert arrived == ["plain"] * arrived.count("plain") + ["adaptive"] * arrived.count("adaptive")


def test_a_pass_without_gradients_may_come_first_and_unused_weights_are_not_cast():
    layer, other = CastLinear(3, 2), CastLinear(3, 2)
    with cast_together([[layer.weight, layer.bias], [other.weight]], BF16), torch.autocast("cpu", BF16):
        with torch.no_grad():
            assert layer(normals(1, 3)).requires_grad is False
        layer(normals(1, 3)).sum().backward()
        assert set(casts._copies) == {layer.weight, layer.bias}
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_nothing_is_left_of_a_context_that_fails():
    """Copies that outlive a change of the weights would be silent."""
    layer = CastLinear(3, 2)

    def failing():
        yield [layer.weight]
        raise MemoryError

    with pytest.raises(MemoryError), cast_together(failing(), BF16):
        pass
    with pytest.raises(RuntimeError), cast_together([[layer.weight, normals(2)]], BF16), torch.autocast("cpu", BF16):
        assert narrow(layer.weight).dtype == BF16
        raise RuntimeError
    assert not casts._copies and not casts._waiting


@pytest.mark.parametrize("recompute", [False, True])
def test_steps_of_a_run_have_the_same_weights(recompute: bool, monkeypatch: pytest.MonkeyPatch):
    """Two steps of two micro-batches of UNITE in bf16, with weights that change between them."""

    def trained(context: Any) -> tuple[list[Tensor], Counter[str]]:
        torch.manual_seed(0)
        part = model_config("image", "unite")
        model = LatentModel.build(part)
        config = RunConfig(
            modality=part.modality, conditions=part.conditions, method=part.method,
            data=model.modality.DataConfig.small(), training=TrainingConfig(steps=2, batch_size=4, micro_batch_size=2),
        ).computing_in("bf16")  # fmt: skip
        for module in model.modules():
            if isinstance(module, Repeated):
                module.recompute = recompute
        state = TrainingState(model, config.training)
        step = OptimiserStep(state, config, Processes("cpu"), 10, measure_gradients=False)
        with monkeypatch.context() as patch, Operations() as operations:
            patch.setattr(parts, "cast_together", context)
            for number in range(2):
                starts = (4 * number, 4 * number + 2)
                assert step([(range(i, i + 2), batch_of("image", 2, i)) for i in starts]).finite
                state.step += 1
        assert not casts._copies and not casts._waiting
        return [p.detach().clone() for p in model.parameters()], operations.counts

    alone, before = trained(lambda groups, dtype: nullcontext())
    together, after = trained(cast_together)
    assert all(map(torch.equal, alone, together))
    assert after["_foreach_copy_"] > 8 and after["_to_copy"] < before["_to_copy"]


def test_neither_on_a_cpu_nor_for_compiled_blocks(monkeypatch: pytest.MonkeyPatch):
    block = Block(D, 2)
    assert len(block.narrow_weights()) == len(list(block.parameters()))
    block.compile(backend="eager")
    assert not block.narrow_weights()
    monkeypatch.undo()
    with cast_together([list(block.parameters())], BF16):
        assert not casts._copies


def test_weights_without_storage_are_left_alone() -> None:
    """What `plan` and counts of collectives run on, in bf16 too: autocast does not know the device `meta`."""
    weight = torch.nn.Parameter(torch.empty(3, 3, device="meta"))
    with cast_together([[weight]], torch.bfloat16):
        assert narrow(weight) is weight
