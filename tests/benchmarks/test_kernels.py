"""Kernels and bytes of small graphs whose numbers are known: of eager code, and scheduled by torch's compiler."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from unilatent.nets.layers import Repeated, silu_times

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kernels import Counted
from scheduled import Kernel, scheduling

ROWS, WIDTH = 4096, 64
HALF = 4 * ROWS * WIDTH
"""Bytes of half of the input, float32."""
LAYER = 4 * (WIDTH + 1) * WIDTH
"""Bytes of a layer's weight and bias."""


class Gated(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        return silu_times(x)


class Product(Repeated):
    """Of a view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.chunk(2, dim=-1)[0])


class Scaled(Repeated):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (2 * WIDTH,), self.weight, 1e-6)


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def count(module: nn.Module, compiled: bool) -> tuple[Counted, list[list[Kernel]]]:
    """Count a forward and a backward pass; also return the kernels of each compiled graph."""
    counted, graphs = Counted(), list[list[Kernel]]()

    def called(kernels: list[Kernel], graph: object, inputs: list[Tensor]) -> object:
        graphs.append(kernels)
        return counted.graph(kernels, graph, inputs)  # type: ignore[arg-type]

    x = torch.empty(ROWS, 2 * WIDTH, requires_grad=True)
    with scheduling(called):
        if compiled:
            module.compile(fullgraph=True)
        with counted:
            out = module(x)
            grad = torch.empty_like(out)
            out.backward(grad)
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
    return counted, graphs


def test_eager_code_is_one_launch_an_operation():
    """Both derivatives of silu(a) b and the product; the gradient times both derivatives."""
    counted, graphs = count(Gated(), compiled=False)
    assert not graphs
    assert sum(counted.launches.values()) == 3 + 1
    assert sum(counted.bytes.values()) == (3 + 2 + 3 + 5) * HALF


def test_compiled_code_is_one_kernel_each_way():
    counted, graphs = count(Gated(), compiled=True)
    assert graphs == [[Kernel("", 3 * HALF)], [Kernel("", 5 * HALF)]]
    assert counted.launches == Counter(compiled=2) and counted.bytes == Counter(compiled=8 * HALF)


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_those_of_a_library(compiled: bool):
    """Forward, and the gradients of weight and input: inputs and outputs, and not what they are views of."""
    counted, graphs = count(Product(), compiled)
    assert counted.launches["matrix products"] == 3
    assert counted.bytes["matrix products"] == 6 * HALF + 3 * LAYER - 2 * 4 * WIDTH  # two without the bias
    names = [[kernel.name for kernel in graph if kernel.name] for graph in graphs]
    assert names == ([["addmm"], ["mm", "mm"]] if compiled else [])


def test_long_sums_are_two_kernels():
    """The gradient of the weight is 128 sums over 4,096 rows: too few for a GPU of 132 processors in one kernel."""
    _, (forward, backward) = count(Scaled(), compiled=True)
    weight, rows = 4 * 2 * WIDTH, 4 * ROWS  # and one root mean square a row
    assert forward == [Kernel("", 4 * HALF + weight + rows)]
    assert len(backward) == 3 and Kernel("", 6 * HALF + weight + rows) in backward
    partial, total = (kernel.size for kernel in backward if kernel.size < 6 * HALF)
    assert 4 * HALF + rows < partial < 4.1 * HALF and total < 0.1 * HALF


def test_a_compiled_graph_stands_for_its_kernels():
    """Its operations are run, and not counted; attention's backward pass is three launches."""
    counted, x = Counted(), torch.empty(3)
    attention = Kernel("_scaled_dot_product_flash_attention_for_cpu_backward", 7)
    with counted:
        out = counted.graph([attention, Kernel("", 5), Kernel("max_pool2d_with_indices", 3)], torch.neg, [x])
    assert out.shape == x.shape
    assert counted.launches == {"attention": 3, "compiled": 2} and counted.bytes == {"attention": 7, "compiled": 8}
