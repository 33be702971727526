"""Weights of repeated blocks in autocast's type, made once for all passes of a micro-batch.

Autocast itself keeps one copy of a matrix, made by a kernel of its own, and none of the weights of norms; each backward
pass converts the gradient of each weight alone. A block has a dozen of them or more, so in eager code on a GPU a
quarter of all kernels were these conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import branches

_copies: dict[Tensor, Tensor] = {}
_waiting: dict[Tensor, tuple[Sequence[Tensor], torch.dtype]] = {}
"""Weights that were not read yet, each with its group and the type of its copy."""


def narrow(weight: Tensor) -> Tensor:
    """Return a weight's copy in autocast's type, if autocast is on and `cast_together` names it, else the weight."""
    if not (branches.on_eager() and (_copies or _waiting) and branches.in_autocast(weight)):
        return weight
    if weight in _waiting:
        group, dtype = _waiting[weight]
        with torch.enable_grad():  # a pass without gradients may be the first to read it, and not the last
            _copies.update(zip(group, CastTogether.apply(dtype, *group), strict=True))
        for other in group:
            del _waiting[other]
    return _copies.get(weight, weight)


@contextmanager
def cast_together(groups: Iterable[Sequence[Tensor]], dtype: torch.dtype) -> Iterator[None]:
    """Let `narrow` return copies of these weights inside this context; each group is cast at once, its gradients too.

    A group is cast when one of its weights is first read: weights of unused blocks are not, and gradients of a block
    are complete when the backward pass has gone through it, not at its end. Several backward passes may go through the
    copies. They do not follow changes of the weights. On a CPU, where nothing is launched, there are no copies.
    """
    before = dict(_copies), dict(_waiting)
    try:
        for group in (group for group in groups if group and not branches.on_cpu(group[0])):
            for weight in group:
                _copies.pop(weight, None)
                _waiting[weight] = group, dtype
        yield
    finally:
        _copies.clear()
        _copies.update(before[0])
        _waiting.clear()
        _waiting.update(before[1])


class CastTogether(torch.autograd.Function):
    """Copies of weights of one type in another: one launch on CUDA for all of them, and one for their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        ctx.mark_non_differentiable(
            *(copy for copy, needed in zip(copies, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=ctx.dtype) for grad in given]
        if given:
            torch._foreach_copy_(wide, given)
        of_given = iter(wide)
        return (None, *(None if grad is None else next(of_given) for grad in grads))
