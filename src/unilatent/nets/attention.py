"""Self-attention, with the only call of scaled_dot_product_attention, and masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Conditioning
from . import branches
from .casts import narrow
from .embeddings import by_halves, frequencies, halves, rotate, rotate_halves
from .layers import RMSNorm, linear

FAINT = 0.1
"""Factor on the initial query and key weights of the heads that `look_ahead` sets."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k / sqrt(d)) v over (B, heads, N, d); keys where mask (B, N) is False are ignored.

    bfloat16 and float16 on a CPU are computed in float32, where the backward pass is up to four times faster.
    """
    keys = None if mask is None else mask[:, None, None, :]
    if branches.on_cpu(q) and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=keys).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection.

    qk_norm: apply RMSNorm to the queries and keys of each head, before the rotation.
    xavier: initialisation, see `linear`.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, xavier: bool):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by heads {heads}")
        self.heads = heads
        self.qkv = linear(dim, 3 * dim, xavier)
        self.proj = linear(dim, dim, xavier)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, d)
        if rotation is not None and by_halves(qkv):
            pairs = qkv.unflatten(-1, (-1, 2)).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in pairs)  # (B, heads, N, d / 2, 2) each
            q, k = (self._half_rotated(x, norm, rotation) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
            v = v.flatten(-2)
        else:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, d) each
            q, k = self.q_norm(q), self.k_norm(k)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def _half_rotated(self, pairs: Tensor, norm: nn.Module, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Normalise and rotate pairs of channels (B, heads, N, d / 2, 2); (B, heads, N, d) in the order of `halves`."""
        x = halves(pairs)  # contiguous, as a fused norm needs it
        if isinstance(norm, RMSNorm):
            x = norm(x, halves(narrow(norm.weight).unflatten(-1, (-1, 2)), x.dtype))
        return rotate_halves(x, rotation)

    @torch.no_grad()
    def look_ahead(self, offset: int, reach: int) -> None:
        """Initialise half of the heads so that each token attends to the one at rotary position (of one axis) `offset`
        higher, and less to that one's neighbours among `reach`, whatever the tokens' values.

        Biases of queries and keys, in channel pairs that rotate by a radian or more over `reach`, match at that
        distance only; the weights of these heads are scaled by `FAINT`.
        """
        dim, num_local = self.qkv.in_features, self.heads // 2
        speeds = frequencies(dim // self.heads // 2, self.qkv.weight)  # radians per position, (d / 2,)
        used = (speeds * reach >= 1).float()
        angle = -offset * speeds
        query = torch.stack([used, torch.zeros_like(used)], -1).flatten()  # (d,)
        key = torch.stack([used * angle.cos(), used * angle.sin()], -1).flatten()
        self.qkv.weight.view(3, self.heads, -1, dim)[:2, :num_local] *= FAINT
        self.qkv.bias.view(3, self.heads, -1)[:2, :num_local] = torch.stack([query, key])[:, None]


def join_masks(first: Tensor | None, second: Tensor | None, k: int, n: int) -> Tensor | None:
    """Concatenate the masks of k and n tokens; None stands for a mask without padding."""
    if first is None and second is None:
        return None
    given = second if first is None else first
    assert given is not None
    ones = torch.ones(len(given), 1, dtype=torch.bool, device=given.device)
    return torch.cat(
        [ones.expand(-1, k) if first is None else first, ones.expand(-1, n) if second is None else second], 1
    )


def trim(cond: Conditioning) -> Conditioning:
    """Drop condition tokens that are padding in every row, if this needs no wait for a device; it changes no result."""
    return cond.trimmed() if cond.mask is not None and branches.can_read(cond.mask) else cond
