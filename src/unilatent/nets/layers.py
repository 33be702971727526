"""Small parts: normalisation, modulation, SwiGLU, and the tags that say which optimizer a weight belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def use_muon(module: M) -> M:
    """Tag a module whose 2-D `weight` is a matrix that Muon should train; everything untagged is AdamW's."""
    module.uses_muon = True  # type: ignore[assignment]
    return module


def muon_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable weights tagged with `use_muon`, in module order."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "uses_muon", False) and isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield weight


def linear(in_features: int, out_features: int, xavier: bool = True) -> nn.Linear:
    """A Linear trained by Muon: xavier-uniform weight and zero bias, or torch's own initialisation."""
    layer = use_muon(nn.Linear(in_features, out_features))
    if xavier:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def zero_init(layer: M) -> M:
    """The layer with zero weight and bias."""
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, times a learned weight; the mean is taken in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        squares = x.float().square().mean(-1, keepdim=True)
        return (x * (squares + self.eps).rsqrt()).to(x.dtype) * self.weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same by hand, for eager CPU code: two to four times fewer passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()  # (..., 1), float32
        unit = x * scale.to(x.dtype)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        along = (grad * unit).flatten(0, -2)
        inner = grad * weight.to(grad.dtype)
        share = torch.linalg.vecdot(inner, unit).unsqueeze(-1) / unit.shape[-1]
        return (
            torch.addcmul(inner, unit, share.to(unit.dtype), value=-1).mul_(scale.to(unit.dtype)),
            along.sum(0, dtype=torch.float32).to(weight.dtype),
            None,
        )


def in_compute_dtype(x: Tensor) -> Tensor:
    """x as autocast computes: in its low precision inside an autocast block, as it is outside.

    At the entrance of a network this keeps the residual stream, and so everything elementwise, in that precision.
    """
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) times 1 + scale plus shift, both (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual + gate x, gate (B, D)."""
    return torch.addcmul(residual, gate[:, None], x)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b the halves of w12(x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = linear(dim, 2 * hidden)
        self.w3 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Repeated(nn.Module):
    """A block that a network repeats: the unit that is compiled, and recomputed to save memory.

    recompute: keep only the block's input for the backward pass (activation checkpointing).
    """

    recompute = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)
