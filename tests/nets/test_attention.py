"""Attention compared with the formula; masks; bfloat16 on a CPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import unilatent
from unilatent.nets.attention import Attention, attend
from unilatent.nets.embeddings import rotary, rotate


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()


@pytest.mark.parametrize("mask", [None, MASK])
def test_attend_is_the_formula(mask):
    q, k, v = normals(3, 2, 4, 5, 8).unbind(0)
    torch.testing.assert_close(attend(q, k, v, mask), formula(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_masked_keys_have_no_effect():
    q, k, v = normals(3, 2, 4, 5, 8).unbind(0)
    masked = (~MASK)[:, None, :, None]
    again = attend(q, k + 1e3 * masked, v - 1e3 * masked, MASK)
    torch.testing.assert_close(again, attend(q, k, v, MASK), rtol=0, atol=1e-6)
    alone = attend(*(part[1:, :, MASK[1]] for part in (q, k, v)))
    torch.testing.assert_close(attend(q, k, v, MASK)[1:, :, MASK[1]], alone)


def test_bfloat16_on_a_cpu_inside_autocast_too():
    q, k, v = normals(3, 2, 4, 5, 8).bfloat16().requires_grad_().unbind(0)
    want = formula(q.float(), k.float(), v.float(), MASK)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attend(q, k, v, MASK)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), want, rtol=0.01, atol=0.01)
    out.sum().backward()


@pytest.mark.parametrize("rotation", [None, rotary(torch.arange(5.0)[None, :, None], 8)])
def test_attention_layer(rotation):
    from unilatent.nets.embeddings import rotate

    layer = Attention(16, 2, qk_norm=True, xavier=True)
    x = normals(2, 5, 16)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    want = layer.proj(formula(q, k, v, MASK).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(layer(x, rotation, MASK), want, rtol=1e-4, atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 3"):
        Attention(10, 3, qk_norm=False, xavier=False)


def test_this_is_the_only_call_of_scaled_dot_product_attention():
    root = Path(unilatent.__file__).parent
    calls = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and "scaled_dot_product_attention" in (getattr(node, "attr", ""), getattr(node, "id", ""))
    }
    assert calls == {"nets/attention.py"}


@pytest.mark.parametrize(("width", "heads", "n"), [(96, 4, 16), (128, 4, 29), (64, 4, 4), (384, 6, 64)])
def test_look_ahead_initialises_half_of_the_heads(width, heads, n):
    """2 n tokens: with any values, each of the first n attends most to the one n positions later."""
    torch.manual_seed(0)
    layer = Attention(width, heads, qk_norm=True, xavier=True)
    layer.look_ahead(n, n)
    x, cos_sin = normals(8, 2 * n, width), rotary(torch.arange(2.0 * n)[None, :, None], width // heads)
    q, k, _ = layer.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = rotate(layer.q_norm(q), cos_sin), rotate(layer.k_norm(k), cos_sin)
    attention = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)[:, :, :n]  # (8, heads, n, 2n)
    hits = attention.argmax(-1) == n + torch.arange(n)
    assert hits[:, : heads // 2].float().mean() > 0.9
    assert hits[:, heads // 2 :].float().mean() < 0.2
