"""Small parts: normalisation, modulation, SwiGLU, and the tag of weights that Muon trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..devices import float32_products
from . import branches
from .casts import narrow

M = TypeVar("M", bound=nn.Module)


def use_muon(module: M) -> M:
    """Tag a module whose 2-D `weight` Muon trains; AdamW trains all other weights."""
    module.uses_muon = True  # type: ignore[assignment]
    return module


def muon_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the trainable weights tagged with `use_muon`, in module order."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "uses_muon", False) and isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield weight


class CastLinear(nn.Linear):
    """A Linear whose input is cast to the type of its weight, outside autocast.

    Numbers that come from outside a network are float32, whatever type its weights have been cast to.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = in_compute_dtype(x, self.weight) if x.dtype != self.weight.dtype else x
        return F.linear(x, narrow(self.weight), None if self.bias is None else narrow(self.bias))


class ExactLinear(nn.Linear):
    """A Linear in float32, whatever autocast, the type of the input and that of the weights; float64 weights stay so.

    For numbers whose small differences matter where they enter and leave a network: bfloat16 has steps of 0.03 at 5.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with exact_products(x):
            return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Compute products on the device of x in their own type inside this context: neither in autocast's nor in TF32."""
    with no_autocast(x), nullcontext() if branches.on_cpu(x) else float32_products():
        yield


class LayerNorm(nn.LayerNorm):
    """Torch's layer norm, computed in float32; the output has the type of x, inside autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        if branches.on_cpu(x):
            return super().forward(x)
        weight, bias = (narrow(parameter).to(x.dtype) for parameter in (self.weight, self.bias))
        with no_autocast(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the type of the input and of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if parameter is None else parameter.float() for parameter in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Float32RMSNorm(nn.RMSNorm):
    """Torch's RMS norm in float32, whatever the type of the input and of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def linear(in_features: int, out_features: int, xavier: bool = True, exact: bool = False) -> nn.Linear:
    """Return a Linear trained by Muon: Xavier-uniform weight and zero bias, or torch's default initialisation."""
    layer = use_muon((ExactLinear if exact else CastLinear)(in_features, out_features))
    if xavier:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def add_known(h: Tensor, layer: nn.Linear, known: Tensor | None) -> Tensor:
    """Return h (B, N, H) plus what a layer makes of what is given of each token (B, N, C): of nothing, as of zeros, its
    bias."""
    return h + (layer.bias.to(h.dtype) if known is None else layer(known))


def zero_init(layer: M) -> M:
    """Set weight and bias of a layer to zero and return it."""
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, times a learned weight; the mean is at least float32.

    The output has the type of x, inside autocast too.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """weight: used instead of the learned one, for channels of x in another order."""
        weight = self.weight if weight is None else weight
        if branches.on_eager_cpu(x):
            return EagerRMSNorm.apply(x, weight, self.eps)
        return fused_rms_norm(x, narrow(weight), self.eps)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's RMS norm in the type of x: one kernel on CUDA.

    Autocast on CUDA would convert x to float32 and return float32. A weight of another type than x would disable the
    fused kernel.
    """
    with no_autocast(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class EagerRMSNorm(torch.autograd.Function):
    """RMS norm with a hand-written backward pass: two to four times fewer passes over memory than torch's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()  # (..., 1), at least float32
        unit = x * scale.to(x.dtype)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        weight_grads = (grad * unit).flatten(0, -2)  # of each row
        unit_grad = grad * weight.to(grad.dtype)
        radial = torch.linalg.vecdot(unit_grad, unit).unsqueeze(-1) / unit.shape[-1]  # (..., 1)
        return (
            torch.addcmul(unit_grad, unit, radial.to(unit.dtype), value=-1).mul_(scale.to(unit.dtype)),
            weight_grads.sum(0, dtype=scale.dtype).to(weight.dtype),
            None,
        )


def in_compute_dtype(x: Tensor, weight: Tensor) -> Tensor:
    """Return x in autocast's type inside an autocast block, in the type of a network's weight outside.

    At the input of a network this puts the residual stream, and all elementwise operations, in that type.
    """
    return x.to(torch.get_autocast_dtype(x.device.type) if branches.in_autocast(x) else weight.dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast for the device of x."""
    return torch.autocast(x.device.type, enabled=False) if branches.in_autocast(x) else nullcontext()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift; x (B, N, D), shift and scale (B, D)."""
    return affine(x, 1 + scale[:, None], shift[:, None])


def add_gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Return residual + gate x; residual and x (B, N, D), gate (B, D)."""
    return affine(x, gate[:, None], residual)


def affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return x factor + offset; factor and offset are broadcast to the shape of x."""
    if branches.on_eager():
        return EagerAffine.apply(x, factor, offset)
    return torch.addcmul(offset, x, factor)


class EagerAffine(torch.autograd.Function):
    """`affine` with a hand-written backward pass: torch's multiplies the whole of x by one first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.offset_shape = offset.shape
        return torch.addcmul(offset, x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, factor = ctx.saved_tensors
        of_x, of_factor, of_offset = ctx.needs_input_grad
        return (
            grad * factor if of_x else None,
            (grad * x).sum_to_size(factor.shape) if of_factor else None,
            grad.sum_to_size(ctx.offset_shape) if of_offset else None,
        )


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = linear(dim, 2 * hidden)
        self.w3 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(silu_times(self.w12(x)))


def silu_times(x: Tensor) -> Tensor:
    """Return silu(a) b of the halves a, b of the last axis of x."""
    if branches.on_eager():
        return EagerSiLUTimes.apply(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


class EagerSiLUTimes(torch.autograd.Function):
    """`silu_times` with a hand-written backward pass: one product with the derivatives, all that is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        if not ctx.needs_input_grad[0]:
            return F.silu(a).mul_(b)
        slopes = x.new_empty(2, *a.shape)  # by a, by b
        torch.ops.aten.silu_backward.grad_input(b, a, grad_input=slopes[0])
        torch.ops.aten.silu.out(a, out=slopes[1])
        ctx.save_for_backward(slopes)
        return slopes[1] * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        out = grad.new_empty(*grad.shape[:-1], 2, grad.shape[-1])
        torch.mul(grad, slopes, out=out.movedim(-2, 0))
        return out.flatten(-2)


class Repeated(nn.Module):
    """A block that a network repeats: the unit of compilation, sharding and activation checkpointing.

    recompute: store only the block's input for the backward pass (activation checkpointing).
    """

    recompute = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)

    def narrow_weights(self) -> list[Tensor]:
        """Return the weights that eager code computes with in autocast's type, for `cast_together`."""
        if self._compiled_call_impl is not None:
            return []
        layers = [module for module in self.modules() if isinstance(module, CastLinear | RMSNorm | LayerNorm)]
        return [weight for layer in layers for weight in layer.parameters(recurse=False)]
