"""Self-attention; the only call of scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .embeddings import frequencies, rotate
from .layers import RMSNorm, linear

FAINT = 0.1
"""How much tokens add to what `look_ahead` begins with."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v over (B, heads, N, d); keys where mask (B, N) is False are not seen.

    On a CPU in bfloat16 the product runs in float32: its bfloat16 backward pass is two to three times slower there.
    """
    keys = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=keys).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection.

    qk_norm: RMSNorm of each head's queries and keys, before the rotation.
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
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def look_ahead(self, offset: int, reach: int) -> None:
        """Have half of the heads begin by attending to the token `offset` rotary positions (of one axis) behind each,
        and less to its neighbours among `reach`, whatever the tokens hold.

        Biases of queries and keys, in channel pairs that turn by a radian or more over `reach`, agree at that distance
        alone; what the tokens add to them is made small.
        """
        dim, chosen = self.qkv.in_features, self.heads // 2
        turns = frequencies(dim // self.heads // 2, self.qkv.weight)
        used = (turns * reach >= 1).float()
        angle = -offset * turns
        query = torch.stack([used, torch.zeros_like(used)], -1).flatten()  # (d,)
        key = torch.stack([used * angle.cos(), used * angle.sin()], -1).flatten()
        self.qkv.weight.view(3, self.heads, -1, dim)[:2, :chosen] *= FAINT
        self.qkv.bias.view(3, self.heads, -1)[:2, :chosen] = torch.stack([query, key])[:, None]


def join_masks(first: Tensor | None, second: Tensor | None, k: int, n: int) -> Tensor | None:
    """Masks of k and n tokens as one; None only when neither pads."""
    if first is None and second is None:
        return None
    some = second if first is None else first
    assert some is not None
    ones = torch.ones(len(some), 1, dtype=torch.bool, device=some.device)
    return torch.cat(
        [ones.expand(-1, k) if first is None else first, ones.expand(-1, n) if second is None else second], 1
    )
