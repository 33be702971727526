"""Kernels that torch's compiler makes of the graphs it compiles, counted instead of generated, on any machine.

Graphs go through the compiler's own passes to its scheduler for Triton, the language of its GPU code. The scheduler is
given the size of an H100, which decides into how many kernels a sum is split. Its tensors are a CPU's, so the few
fusions that it makes for GPUs alone are left out: of two reductions of one tensor along different axes into one kernel,
and of matrix products with what follows them. Each shape is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config, ir
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

H100 = DeviceProperties(
    type="cpu", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip
"""What the scheduler asks about the processor."""


class Kernel(NamedTuple):
    """name: that of the operation of a library, such as "mm"; "" if the compiler generates the kernel. size: bytes of
    its inputs and outputs."""

    name: str
    size: int


Graph = Callable[..., Any]


@contextmanager
def scheduling(called: Callable[[list[Kernel], Graph, list[Any]], Any]) -> Iterator[None]:
    """Replace the code generation of `torch.compile`: each call of a graph becomes called(its kernels, graph, inputs),
    which returns the graph's outputs."""
    backend = partial(compile_fx.compile_fx, inner_compile=partial(_compiled, called))
    torch._dynamo.reset()
    with (
        mock.patch.object(compile_fx, "compile_fx", backend),
        mock.patch.object(DeviceProperties, "create", lambda device: H100),
        config.patch(cpu_backend="triton", fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(automatic_dynamic_shapes=False),  # sizes are those of one graph
    ):
        yield
    torch._dynamo.reset()


def _compiled(called: Any, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Graph:
    """In place of `compile_fx.compile_fx_inner`."""
    with _disable_current_modes(), DebugContext():
        kernels = scheduled(graph, inputs, bool(options.get("is_backward")), bool(options.get("is_inference")))
    return make_boxed_func(lambda *inputs: called(kernels, graph.forward, list(inputs)))


def scheduled(graph: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool, inference: bool) -> list[Kernel]:
    """The kernels of a graph, in the order in which they run; the compiler's steps up to its scheduler."""
    compile_fx.view_to_reshape(graph)
    with torch.no_grad():
        fake = compile_fx.fake_tensor_prop(graph, list(inputs))
    compile_fx._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake):
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=backward, is_inference=inference)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering._update_scheduler()
            return [kernel for node in lowering.scheduler.nodes for kernel in _kernels(node)]


def _kernels(node: BaseSchedulerNode) -> list[Kernel]:
    """One kernel; none of what computes nothing, such as one of several results of an operation."""
    if isinstance(node, NopKernelSchedulerNode):
        return []
    if not isinstance(node, ExternKernelSchedulerNode):
        return [Kernel("", node.get_read_write_buffers_sizes())]
    made = node.node
    if isinstance(made, ir.MultiOutput):
        return []
    operation = getattr(made, "op_overload", None)
    name = made.python_kernel_name.rpartition(".")[2] if operation is None else operation.overloadpacket.__name__
    users = [user.node for output in node.get_outputs() for user in output.users]
    results = [user.node for user in users if isinstance(getattr(user, "node", None), ir.MultiOutput)] or [made]
    return [Kernel(name, sum(map(_bytes, [*tree_leaves(made.inputs), *results])))]


def _bytes(node: Any) -> int:
    """Of a tensor of the graph, whatever it is a view of."""
    return int(V.graph.sizevars.optimization_hint(ir.sympy_product(node.get_size()))) * node.get_dtype().itemsize
