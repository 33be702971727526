"""Weights that are cast together: the same numbers, in fewer operations, for every pass of a micro-batch."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unilatent.nets import branches, casts
from unilatent.nets.casts import cast_together, narrow
from unilatent.nets.layers import CastLinear, Repeated
from unilatent.nets.transformer import Block, PlainTransformer, Transformer
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


def test_neither_on_a_cpu_nor_for_compiled_blocks(monkeypatch: pytest.MonkeyPatch):
    block = Block(D, 2)
    assert len(block.narrow_weights()) == len(list(block.parameters()))
    block.compile(backend="eager")
    assert not block.narrow_weights()
    monkeypatch.undo()
    with cast_together([list(block.parameters())], BF16):
        assert not casts._copies
