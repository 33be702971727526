"""Small layers, weights that Muon trains, and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from unilatent.nets.layers import (
    ExactLinear,
    Repeated,
    RMSNorm,
    SwiGLU,
    add_gated,
    exact_products,
    linear,
    modulate,
    muon_parameters,
    use_muon,
    zero_init,
)
from unilatent.nets.transformer import PlainTransformer, Transformer


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_equals_torchs():
    ours, theirs = RMSNorm(8), nn.RMSNorm(8, eps=1e-6)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(normals(3, 5, 8)), theirs(normals(3, 5, 8)))


def test_rms_norm_squares_in_float32_and_returns_the_input_type():
    x = (normals(3, 8) * 1e3).bfloat16()
    out = RMSNorm(8)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().square().mean(-1), torch.ones(3), rtol=0.02, atol=0)


def test_modulate_and_add_gated():
    x, shift, scale, residual = normals(2, 3, 4), normals(2, 4, seed=1), normals(2, 4, seed=2), normals(2, 3, 4, seed=3)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(add_gated(residual, x, scale), residual + scale[:, None] * x)
    zero = torch.zeros(2, 4)
    assert torch.equal(modulate(x, zero, zero), x) and torch.equal(add_gated(residual, x, zero), residual)


def test_swiglu():
    layer = SwiGLU(4, 6)
    x = normals(2, 3, 4)
    a, b = layer.w12(x)[..., :6], layer.w12(x)[..., 6:]
    torch.testing.assert_close(layer(x), layer.w3(a * torch.sigmoid(a) * b))


def test_linear_initialisation():
    layer = linear(100, 50)
    bound = (6 / 150) ** 0.5
    assert layer.bias.abs().max() == 0 and 0.95 * bound < layer.weight.abs().max() <= bound
    assert linear(100, 50, xavier=False).bias.abs().max() > 0
    assert zero_init(nn.Linear(3, 3)).weight.abs().max() == 0


def names_of_muon(model: nn.Module) -> set[str]:
    chosen = {id(p) for p in muon_parameters(model)}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_muon_trains_the_matrices_inside_a_transformer():
    model = Transformer(8, 1, 2, 5, in_context_tokens=2)
    block = {f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "modulation")}
    assert names_of_muon(model) == block | {"time.hidden.weight", "time.out.weight"}


def test_muon_trains_the_matrices_inside_a_plain_transformer():
    want = {f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn.qkv", "attn.proj", "up", "down")}
    assert names_of_muon(PlainTransformer(8, 2, 2, 16)) == want


def test_muon_parameters_are_tagged_trainable_weights():
    model = nn.ModuleList(
        [linear(3, 4), nn.Linear(3, 4), use_muon(nn.Embedding(5, 3)), linear(3, 3).requires_grad_(False)]
    )
    assert [p.shape for p in muon_parameters(model)] == [(4, 3), (5, 3)]


class Doubling(Repeated):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor, power: int = 1) -> torch.Tensor:
        self.calls += 1
        return F.gelu(self.layer(x)) ** power


@pytest.mark.parametrize("make", [Doubling, lambda: PlainTransformer(8, 2, 2, 16), lambda: Transformer(8, 2, 2, 4)])
def test_recomputing_changes_no_gradient(make):
    from unilatent.types import Conditioning, Layout

    torch.manual_seed(0)
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    gradients = []
    for recompute in (False, True):
        for module in model.modules():
            if isinstance(module, Repeated):
                module.recompute = recompute
        x = normals(2, 5, 8 if not isinstance(model, Doubling) else 4).requires_grad_()
        if isinstance(model, Transformer):
            layout = Layout(torch.arange(5.0)[None, :, None])
            out = model(x, layout, torch.tensor([0.1, 0.9]), Conditioning(normals(2, 8, seed=1)))
        else:
            out = model(x)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_recomputing_runs_forward_twice_only_with_gradients():
    block = Doubling()
    block.recompute = True
    block(normals(2, 4), power=2).sum().backward()
    assert block.calls == 2
    with torch.no_grad():
        block(normals(2, 4))
    assert block.calls == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_linear_is_a_linear_in_float32(dtype: torch.dtype):
    """Same numbers, gradients and state keys, and of a model in float64 its type."""
    exact, plain = ExactLinear(6, 5).to(dtype), nn.Linear(6, 5).to(dtype)
    plain.load_state_dict(exact.state_dict())
    found = []
    for layer in (exact, plain):
        x = normals(3, 6).to(dtype).requires_grad_()
        layer(x).square().sum().backward()
        found.append([layer(x), x.grad, layer.weight.grad, layer.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].dtype == dtype


def test_an_exact_linear_rounds_nothing():
    layer, x = ExactLinear(6, 5), 5 + normals(3, 6)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(x)
        made.sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(made, want) and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    low = ExactLinear(6, 5).bfloat16()
    wide = ExactLinear(6, 5)
    wide.load_state_dict(low.state_dict())
    assert torch.equal(low(x), wide(x)) and not torch.equal(low(x), low(x.bfloat16()))


def test_exact_products_use_no_tf32_on_a_gpu():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with FakeTensorMode():
            x = torch.empty(2, device="cuda")
        with exact_products(x):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
