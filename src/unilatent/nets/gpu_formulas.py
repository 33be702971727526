"""The formulas of a GPU on fake tensors of a CPU, so that any machine can count what a GPU would compute and hold.

Torch without CUDA has no fake tensors of a GPU: their backward pass needs its libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import branches

_counting = False


def counting() -> bool:
    """Whether the calling code is inside `gpu_formulas`."""
    return _counting


@torch.library.custom_op("unilatent::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError("fake tensors only")


@torch.library.custom_op("unilatent::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("fake tensors only")


_rms_norm.register_fake(lambda x, weight: torch.empty_like(x))
_rms_norm_backward.register_fake(lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight)))
_rms_norm.register_autograd(
    lambda ctx, grad: _rms_norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def gpu_formulas() -> Iterator[None]:
    """Take the formulas of a GPU (`branches`) on the CPU's fake tensors, with the norms that CUDA has.

    Frozen networks of losses are not loaded inside: `counting` tells them that only their shapes matter.
    """
    global _counting
    before = branches.on_cpu, F.rms_norm, F.layer_norm, F.group_norm

    def fused(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        """One kernel, after a copy of what is not contiguous, if the types agree; else, and compiled, the composite."""
        if weight.dtype != x.dtype or not branches.on_eager():
            return before[1](x, shape, weight, eps)
        return _rms_norm(x.contiguous(), weight)

    def wide(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Autocast of CUDA computes these norms in float32 and returns float32."""

        def called(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))  # type: ignore[assignment]
            return norm(x, shape, weight, bias, eps)

        return called

    branches.on_cpu, F.rms_norm = lambda x: False, fused  # type: ignore[assignment]
    F.layer_norm, F.group_norm = wide(before[2]), wide(before[3])
    _counting = True
    try:
        yield
    finally:
        _counting = False
        branches.on_cpu, F.rms_norm, F.layer_norm, F.group_norm = before
