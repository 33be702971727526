"""Kernels and bytes of small graphs whose numbers are known: eager, and as torch's compiler schedules them for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from unilatent.nets.layers import Repeated

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels
from kernels import Counted
from scheduled import Kernel, scheduling

ROWS, WIDTH = 4096, 64
HALF = 4 * ROWS * WIDTH
"""Bytes of a float32 tensor (ROWS, WIDTH)."""


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


class Gated(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x[:, :WIDTH]) * x[:, WIDTH:]


class Scaled(Repeated):
    """RMS norm with a weight: sums along both axes in its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (2 * WIDTH,), self.weight, 1e-6)


def counted(module: nn.Module, compiled: bool) -> tuple[Counted, list[list[Kernel]]]:
    """Count a forward and a backward pass; the kernels of each compiled graph."""
    graphs: list[list[Kernel]] = []
    counter = Counted()

    def called(kernels: list[Kernel], graph: object, inputs: list[Tensor]) -> object:
        graphs.append(kernels)
        return counter.graph(kernels, graph, inputs)

    x = torch.empty(ROWS, 2 * WIDTH, requires_grad=True)
    with scheduling(called):
        if compiled:
            module.compile(fullgraph=True)
        with counter:
            out = module(x)
            out.backward(torch.empty_like(out))
    assert x.grad is not None and x.grad.shape == x.shape
    return counter, graphs


def test_draft():
    for module in (Gated(), nn.Sequential(nn.Linear(2 * WIDTH, WIDTH)), Scaled()):
        for compiled in (False, True):
            c, g = counted(module, compiled)
            print(type(module).__name__, compiled, dict(c.launches), {k: v / HALF for k, v in c.bytes.items()})
            for graph in g: print("   ", [(k.name, k.size / HALF) for k in graph])
