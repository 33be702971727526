"""Floating-point operations of matrix products, convolutions and attention, counted from shapes, and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

OPS = torch.ops.aten
ATTENTION = OPS._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = OPS._scaled_dot_product_flash_attention_for_cpu_backward
FREE = ("detach", "device", "_unsafe_view")
"""Operations that launch nothing, besides views and new tensors without values."""


class StepCounter(TorchDispatchMode):
    """Counts what is computed while it is active, by torch's formulas.

    flop: a multiplication and an addition are two. launches: operations that compute or copy, about the kernels that
    eager code launches.

    `torch.utils.flop_counter.FlopCounterMode` follows modules, which keeps alive what activation checkpointing frees,
    and leaves out attention on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        name = packet.__name__
        self.launches += not (func.is_view or "empty" in name or name in FREE)
        if packet is ATTENTION:
            self.flop += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is ATTENTION_BACKWARD:
            self.flop += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **kwargs, out_val=out)
        return out
