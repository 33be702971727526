"""Muon: momentum whose matrices are orthogonalised by five Newton-Schulz iterations (Jordan et al., 2024).

The formula is that of `torch.optim.Muon` with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"`. Torch iterates
one matrix at a time, always in bfloat16, and all of them in every process. Here matrices of one shape are iterated
together, in the fastest precision of the device, and every process has its share.

Why no package: heavyball 3.2 has other coefficients and rounds at random. pytorch-optimizer 4.1 iterates in bfloat16
only, does not expose the smallest norm, and gathers each sharded matrix by itself, in all processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..devices import prefers_bf16
from ..sharding import Owners, local

_Precision = Literal["auto", "fp32", "bf16"]
Shape = tuple[int, int]

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the published iteration: X becomes A X + (B G + C G G) X with G = X X^T."""
ITERATIONS = 5
LARGEST_STACK = 2**24
"""Numbers in one stack, roughly: temporaries stay below 0.3 GB, and a stack of this size fills a GPU."""
NARROW_ON_CPU = 96
"""On a CPU that multiplies bfloat16 faster, matrices with a shorter side below this are iterated in float32.

Measured on a Zen 4 core: 64 rows take 0.8 to 1.3 times as long in float32 as in bfloat16, 96 rows 1.4 to 1.7 times,
256 rows and more twice as long.
"""


class Muon(Optimizer):
    """Muon for 2-D parameters, plain or sharded over processes; all processes step together.

    The step of one matrix W (m, n) with gradient g, momentum buffer b, learning rate r and weight decay w:

        b <- momentum b + (1 - momentum) g;   u = (1 - momentum) g + momentum b
        W <- (1 - r w) W - 0.2 r sqrt(max(m, n)) orthogonalised(u)

    The factor 0.2 sqrt(max(m, n)) gives updates the root mean square of AdamW's (Liu et al., 2025, arXiv 2502.16982).

    eps: smallest Frobenius norm by which a matrix is divided before the first iteration.
    precision: of the iterations. "auto": see `Muon.compute_dtype`.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
        eps: float = 1e-7, precision: _Precision = "auto",
    ):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})
        self.precision: _Precision = precision

    @cached_property
    def device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    @cached_property
    def _fast_bf16(self) -> bool:
        return prefers_bf16(self.device)

    def compute_dtype(self, shape: Shape) -> torch.dtype:
        """Return the type in which matrices of a shape are iterated.

        "auto": bfloat16 on a device that multiplies it faster (`prefers_bf16`), except small matrices on a CPU
        (`NARROW_ON_CPU`).
        """
        large = self.device.type != "cpu" or min(shape) >= NARROW_ON_CPU
        narrow = self.precision == "bf16" or (self.precision == "auto" and large and self._fast_bf16)
        return torch.bfloat16 if narrow else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; which ones do is the same in all processes."""
        group = self.param_groups[0]
        matrices = [p for p in group["params"] if p.grad is not None]
        if not matrices:
            return
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [local(p) for p in matrices]
        gradients = [local(p.grad) for p in matrices]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in matrices]
        momentum, rate = group["momentum"], group["lr"]

        def directions(which: Sequence[int]) -> list[Tensor]:
            of = [gradients[i] for i in which], [momenta[i] for i in which]
            return list(torch._foreach_lerp(*of, momentum)) if which else []

        def add(stack: Stack, updates: list[Tensor] | tuple[Tensor, ...]) -> None:
            scale = -0.2 * rate * math.sqrt(max(stack.shape))
            torch._foreach_add_([weights[i] for i in stack.members], updates, alpha=scale)

        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        owners = Owners(matrices)
        plan = stacks(tuple((p.shape[0], p.shape[1]) for p in matrices), owners.world)
        if owners.world == 1:
            for stack in plan:
                x = self._orthogonalised(stack, directions(stack.members))
                add(stack, x.to(weights[0].dtype).unbind())
            return
        self._step_together(owners, plan, directions, add)

    def _step_together(
        self, owners: Owners, plan: Sequence[Stack], directions: Callable[[Sequence[int]], list[Tensor]],
        add: Callable[[Stack, list[Tensor]], None],
    ) -> None:  # fmt: skip
        """Orthogonalise this process's stacks, with at most three collectives: shards in, shards and whole ones out."""
        dtypes = {self.compute_dtype(stack.shape) for stack in plan}
        wire = dtypes.pop() if len(dtypes) == 1 else torch.float32  # bfloat16 goes through float32 unchanged
        owners.assign({i: stack.owner for stack in plan for i in stack.members})
        whole = owners.collect(dict(zip(owners.sharded, directions(owners.sharded), strict=True)), wire)
        results: dict[int, Tensor] = {}
        for stack in plan:
            if stack.owner == owners.rank:
                replicated = [i for i in stack.members if i not in whole]
                inputs = whole | dict(zip(replicated, directions(replicated), strict=True))
                x = self._orthogonalised(stack, [inputs[i] for i in stack.members])
                results |= dict(zip(stack.members, x.unbind(), strict=True))
        updates = owners.distribute(results, wire)
        for stack in plan:
            add(stack, [updates[i] for i in stack.members])

    def _orthogonalised(self, stack: Stack, matrices: list[Tensor]) -> Tensor:
        x = torch.empty(len(matrices), *stack.shape, device=self.device, dtype=self.compute_dtype(stack.shape))
        torch._foreach_copy_(list(x.unbind()), matrices)
        matrices.clear()  # frees them
        return orthogonalise_(x, self.param_groups[0]["eps"])

    def temporary_bytes(self, world: int, sharded: Callable[[Tensor], bool]) -> int:
        """Return about how many bytes one of `world` processes allocates and frees again in a step.

        sharded: whether a parameter is going to be sharded over them.
        """
        matrices = [p for p in self.param_groups[0]["params"] if p.requires_grad]
        if not matrices:
            return 0
        most, wire = 0, 2
        for stack in stacks(tuple((p.shape[0], p.shape[1]) for p in matrices), 1):
            width = self.compute_dtype(stack.shape).itemsize
            wire = max(wire, width)
            count, short = len(stack.members), min(stack.shape)
            size, gram = count * math.prod(stack.shape), count * short**2
            most = max(most, (4 + width) * size, width * 2 * (size + gram))
        if world == 1:
            return most
        cut = sum(p.numel() for p in matrices if sharded(p))
        copied = sum(p.numel() for p in matrices) - cut
        return most + wire * copied + (2 * wire * copied + (8 + 3 * wire) * cut) // world

    def flop(self, world: int) -> int:
        """Return the floating-point operations of the iterations, in the one of `world` processes that has most."""
        load = [0] * world
        for stack in stacks(tuple((p.shape[0], p.shape[1]) for p in self.param_groups[0]["params"]), world):
            load[stack.owner] += 2 * ITERATIONS * stack.cost
        return max(load)


def orthogonalise_(x: Tensor, eps: float) -> Tensor:
    """Return approximately U V^T for each U S V^T of a stack (S, m, n), in its precision; overwrites the stack.

    Singular values become 0.7 to 1.2, those far below the largest one less. eps: smallest norm to divide by.
    """
    tall, short = x.shape[1] > x.shape[2], min(x.shape[1:])
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=eps))
    other, gram = torch.empty_like(x), x.new_empty(len(x), short, short)
    polynomial = torch.empty_like(gram)
    for _ in range(ITERATIONS):
        torch.bmm(*(x.mT, x) if tall else (x, x.mT), out=gram)
        torch.baddbmm(gram, gram, gram, beta=B, alpha=C, out=polynomial)
        torch.baddbmm(x, *(x, polynomial) if tall else (polynomial, x), beta=A, out=other)
        x, other = other, x
    return x


@dataclass(frozen=True)
class Stack:
    """Matrices that are iterated together: their positions among all matrices, their shape, and who iterates them."""

    members: tuple[int, ...]
    shape: Shape
    owner: int

    @property
    def cost(self) -> int:
        """Multiplications of one iteration."""
        short, long = sorted(self.shape)
        return len(self.members) * short**2 * (2 * long + short)


@lru_cache
def stacks(shapes: tuple[Shape, ...], world: int) -> tuple[Stack, ...]:
    """Divide matrices of these shapes into stacks, and the stacks over `world` processes by cost.

    The stacks do not depend on the number of processes, and neither does any result.
    """
    members = defaultdict[Shape, list[int]](list)
    for i, shape in enumerate(shapes):
        members[shape].append(i)
    found: list[Stack] = []
    for shape, of in members.items():
        parts = min(len(of), math.ceil(len(of) * math.prod(shape) / LARGEST_STACK))
        cuts = [len(of) * part // parts for part in range(parts + 1)]
        found += [Stack(tuple(of[a:b]), shape, 0) for a, b in pairwise(cuts)]
    load = [0] * world
    shared: list[Stack] = []
    for stack in sorted(found, key=lambda stack: (-stack.cost, stack.members)):
        owner = load.index(min(load))
        load[owner] += stack.cost
        shared.append(Stack(stack.members, stack.shape, owner))
    return tuple(shared)
