"""Both transformers: initialisation, padding, in-context tokens, precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unilatent.nets.transformer import Block, PlainTransformer, Transformer
from unilatent.types import Conditioning, Layout

B, N, D = 2, 6, 32
TIME = torch.tensor([0.2, 0.9])


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


COND = Conditioning(normals(B, D, seed=9))


def positions(n: int, axes: int = 2) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(4.0)] * axes).reshape(-1, axes)[None, :n]


def randomised(model: nn.Module) -> nn.Module:
    """Set random weights everywhere, as after training: at initialisation most branches are zero."""
    stream = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=stream) / max(1, p.shape[-1]) ** 0.5 + (p.ndim == 1)
    return model


def transformer(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**{"dim": D, "depth": 3, "heads": 4, "out_channels": 5} | fields)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_new_transformer_returns_zeros(tokens: int):
    out = transformer(in_context_tokens=tokens)(normals(B, N, D), Layout(positions(N)), TIME, COND)
    assert out.shape == (B, N, 5) and (out == 0).all()


def test_a_new_block_is_the_identity_up_to_its_norm():
    h = normals(B, N, D)
    from unilatent.nets.embeddings import rotary

    rotation = rotary(positions(N), 8)
    assert torch.equal(Block(D, 4, block_norm=False)(h, COND.vector, rotation, None), h)
    block = Block(D, 4)
    assert torch.equal(block(h, COND.vector, rotation, None), block.norm3(h))


@pytest.mark.parametrize(("tokens", "start"), [(0, 0), (3, 0), (3, 2)])
def test_in_context_tokens_have_an_effect_and_are_removed(tokens: int, start: int):
    model = randomised(transformer(in_context_tokens=tokens, in_context_start=start))
    h, layout = normals(B, N, D), Layout(positions(N))
    out = model(h, layout, TIME, COND)
    assert out.shape == (B, N, 5)
    if tokens:
        model.in_context.data += 1
        assert (model(h, layout, TIME, COND) - out).abs().max() > 1e-3


def test_in_context_tokens_must_start_at_a_block():
    with pytest.raises(ValueError, match="in_context_start 3 is not a block; depth is 3"):
        transformer(in_context_tokens=2, in_context_start=3)
    transformer(in_context_tokens=0, in_context_start=3)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("axes", [1, 2])
def test_padding_has_no_effect(tokens: int, axes: int):
    model = randomised(transformer(in_context_tokens=tokens, in_context_start=1))
    h = normals(B, N, D)
    where = (4 * normals(B, N, axes, seed=5)).round()
    out = model(h, Layout(where), TIME, COND)
    padded = torch.cat([h, 100 * normals(B, 5, D, seed=1)], dim=1)
    mask = torch.cat([torch.ones(B, N), torch.zeros(B, 5)], dim=1).bool()
    layout = Layout(torch.cat([where, 50 * normals(B, 5, axes, seed=2)], dim=1), mask)
    assert out.std() > 0.1
    assert (model(padded, layout, TIME, COND)[:, :N] - out).abs().max() < 1e-5


def test_padding_has_no_effect_in_the_plain_transformer():
    model = randomised(PlainTransformer(D, 3, 4, 64))
    x = normals(B, N, D)
    padded = torch.cat([x, 100 * normals(B, 5, D, seed=1)], dim=1)
    mask = torch.cat([torch.ones(B, N), torch.zeros(B, 5)], dim=1).bool()
    out = model(x)
    assert out.shape == (B, N, D) and out.std() > 0.1
    assert (model(padded, mask)[:, :N] - out).abs().max() < 1e-5


def test_without_the_mask_padding_has_an_effect():
    """So the two tests above fail if masks are ignored."""
    model = randomised(PlainTransformer(D, 3, 4, 64))
    x = normals(B, N, D)
    padded = torch.cat([x, 100 * normals(B, 5, D, seed=1)], dim=1)
    assert (model(padded)[:, :N] - model(x)).abs().max() > 1e-3


def test_order_has_an_effect_through_positions_only():
    model = randomised(transformer(in_context_tokens=2))
    h, order = normals(B, N, D), torch.tensor([3, 0, 5, 1, 4, 2])
    out = model(h, Layout(positions(N)), TIME, COND)
    again = model(h[:, order], Layout(positions(N)[:, order]), TIME, COND)
    torch.testing.assert_close(again, out[:, order], rtol=0, atol=1e-5)
    assert (model(h[:, order], Layout(positions(N)), TIME, COND) - out[:, order]).abs().max() > 1e-3


def test_rows_are_independent_and_time_and_condition_have_an_effect():
    model = randomised(transformer(in_context_tokens=2))
    h, layout = normals(B, N, D), Layout(positions(N))
    exact = copy.deepcopy(model).double()  # in float32, the order of sums depends on processor and batch
    both = exact(h.double(), layout, TIME.double(), Conditioning(COND.vector.double()))
    alone = exact(h[1:].double(), layout, TIME[1:].double(), Conditioning(COND.vector[1:].double()))
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-9)
    out = model(h, layout, TIME, COND)
    assert (model(h, layout, TIME + 0.01, COND) - out).abs().max() > 1e-3
    assert (model(h, layout, TIME, Conditioning(COND.vector + 0.1)) - out).abs().max() > 1e-3


def test_bfloat16_on_a_cpu():
    model = randomised(transformer(in_context_tokens=2))
    h = normals(B, N, D).requires_grad_()
    want = model(h, Layout(positions(N)), TIME, COND)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(h, Layout(positions(N)), TIME, COND)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).abs().mean() < 0.05 * want.abs().mean()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_is_trained():
    for model, args in (
        (transformer(in_context_tokens=2), (Layout(positions(N)), TIME, COND)),
        (PlainTransformer(D, 2, 4, 64), ()),
    ):
        randomised(model)(normals(B, N, D), *args).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
