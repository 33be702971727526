"""Networks on grids: shapes, initial outputs, receptive fields, errors, and the paper's sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unilatent.nets.convnet import (
    CONVS,
    ConvEncoder,
    UViT,
    coarser,
    gather_patches,
    nearest,
    pool,
    scatter_patches,
)
from unilatent.nets.layers import Repeated, muon_parameters
from unilatent.nets.vit import ViT
from unilatent.types import Conditioning, Layout, grid_layout

B, D, LATENT = 2, 16, 4
TIME = torch.tensor([0.2, -0.9])


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


COND = Conditioning(normals(B, D, seed=9))


def randomised(model: nn.Module) -> nn.Module:
    """Set random weights everywhere, as after training."""
    stream = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=stream) / max(1, math.prod(p.shape[1:])) ** 0.5 + (p.ndim == 1)
    return model.eval()


def encoder(strides: list[tuple[int, ...]], patch: tuple[int, ...] = (2, 2)) -> ConvEncoder:
    levels = len(strides) + 1
    return ConvEncoder(3, LATENT, [8, 16, 24, 24][:levels], [1] * (levels - 1) + [2], patch, strides)


def decoder(strides: list[tuple[int, ...]], patch: tuple[int, ...] = (2, 2), **fields) -> UViT:
    levels = len(strides) + 1
    fields = {"cond_dim": D, "heads": 2, "context_channels": LATENT} | fields
    return UViT(3, [8, 16, 24, 24][-levels:], [1] * levels, 1, patch, strides, **fields)


def base(**fields) -> UViT:
    return UViT(LATENT, [8, 16], [2, 3], 2, (1, 1), [(2, 2)], cond_dim=D, heads=2, **fields)


TWO = [(2, 2)] * 3
SIZES = [
    (TWO[:2], (2, 2), (16, 24), (2, 3)),  # 8x
    (TWO, (2, 2), (32, 48), (2, 3)),  # 16x
    (TWO, (4, 4), (64, 32), (2, 1)),  # 32x
    (TWO[:1], (1, 1), (8, 8), (4, 4)),
    ([(2, 2, 2), (2, 2, 2)], (1, 2, 2), (8, 16, 24), (2, 2, 3)),  # 4 x 8 x 8
    ([(1, 2, 2)], (1, 1, 1), (3, 4, 6), (3, 2, 3)),
]
every_size = pytest.mark.parametrize(("strides", "patch", "grid", "coarse"), SIZES)


@every_size
def test_shapes_of_encoder_and_decoder(strides, patch, grid, coarse):
    layout, n, k = grid_layout(grid), math.prod(grid), math.prod(coarse)
    enc, dec = randomised(encoder(strides, patch)), randomised(decoder(strides, patch))
    latents = enc.latent_layout(layout)
    assert latents.grid == coarse and latents.positions.shape == (1, k, len(grid)) and latents.mask is None
    x = normals(B, n, 3)
    z = enc(x, layout)
    assert z.shape == (B, k, LATENT) and z.std() > 0.01
    out = dec(x, layout, TIME, COND, z)
    assert out.shape == (B, n, 3) and out.isfinite().all() and out.std() > 0.01


@pytest.mark.parametrize("grid", [(6, 1, 1), (1, 4, 4), (1, 1, 1), (5, 4, 3), (1, 7), (1, 1)])
def test_axes_of_one_cell_change_no_convolution(grid):
    axes = len(grid)
    ours = CONVS[axes](5, 7, 3, padding=1).double()
    plain = {2: nn.Conv2d, 3: nn.Conv3d}[axes](5, 7, 3, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x = normals(B, 5, *grid).double()
    outputs = [module(x) for module in (ours, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(output.square().sum(), list(module.parameters()))
        for output, module in zip(outputs, (ours, plain), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_kernels_of_axes_of_one_cell_cost_their_centre_only():
    conv = CONVS[3](4, 4, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        conv(normals(1, 4, 6, 1, 1))
    assert counter.get_total_flops() == 2 * 6 * 3 * 4 * 4  # 3 of 27 taps


@every_size
def test_a_new_decoder_returns_zeros_and_a_new_encoder_does_not(strides, patch, grid, coarse):
    layout, x = grid_layout(grid), normals(B, math.prod(grid), 3)
    assert (decoder(strides, patch)(x, layout, TIME, COND, normals(B, math.prod(coarse), LATENT)) == 0).all()
    assert encoder(strides, patch)(x, layout).std() > 0.01


@every_size
def test_samples_of_a_batch_are_independent(strides, patch, grid, coarse):
    layout, x, z = grid_layout(grid), normals(B, math.prod(grid), 3), normals(B, math.prod(coarse), LATENT, seed=1)
    enc, dec = randomised(encoder(strides, patch)), randomised(decoder(strides, patch))
    alone = dec(x[:1], layout, TIME[:1], Conditioning(COND.vector[:1]), z[:1])
    torch.testing.assert_close(dec(x, layout, TIME, COND, z)[:1], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(enc(x, layout)[:1], enc(x[:1], layout), rtol=1e-4, atol=1e-4)


def outputs(module: nn.Module) -> list[torch.Tensor]:
    """Return a list to which each output of the module is appended."""
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, args, out: seen.append(out))
    return seen


def test_tokens_fill_the_grid_in_row_major_order():
    """A change in the last columns of the first rows reaches the cells there and their neighbours only."""
    enc, grid = encoder(TWO[:1]), (8, 16)  # new blocks are the identity, so only the other convolutions act
    seen = outputs(enc.down[0])
    x = normals(1, 8 * 16, 3)
    other = x.view(1, 8, 16, 3).clone()
    other[:, :2, -2:] += 5
    enc(x, grid_layout(grid))
    enc(other.view(1, -1, 3), grid_layout(grid))
    moved = (seen[1] - seen[0]).abs().sum(1)[0] > 1e-6
    assert moved.shape == (2, 4) and moved[0, 3] and not moved[:, :2].any()
    first = outputs(enc.patch_in)
    enc(x, grid_layout(grid))
    enc(other.view(1, -1, 3), grid_layout(grid))
    moved = (first[1] - first[0]).abs().sum(1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]


def test_patches_and_pooling_are_inverted():
    for patch, h in (((2, 3), normals(2, 5, 4, 9)), ((1, 2, 2), normals(2, 3, 3, 4, 6))):
        gathered = gather_patches(h, patch)
        assert gathered.shape[1] == h.shape[1] * math.prod(patch)
        assert torch.equal(scatter_patches(gathered, patch), h)
        torch.testing.assert_close(pool(nearest(h, patch), patch), h)
        means = gathered.unflatten(1, (h.shape[1], -1)).mean(2)
        torch.testing.assert_close(pool(h, patch), means)


@every_size
def test_convolutions_read_channels_last(strides, patch, grid, coarse):
    """Else a GPU copies the input of each one."""
    form = torch.channels_last if len(grid) == 2 else torch.channels_last_3d
    seen = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=form))

    x, latents = normals(B, math.prod(grid), 3), normals(B, math.prod(coarse), LATENT)
    for net, rest in ((encoder(strides, patch), ()), (decoder(strides, patch), (TIME, COND, latents))):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_pre_hook(look)
        net(x, grid_layout(grid), *rest)
    assert len(seen) > 8 and all(seen)


@pytest.mark.parametrize("make", [decoder, lambda s: base(context_channels=LATENT)], ids=["decoder", "base"])
def test_gradients_reach_context_time_and_condition(make):
    model, grid = randomised(make(TWO[:1])), (8, 8)
    channels, k = 3 if model.patch == (2, 2) else LATENT, math.prod(coarser(grid, [model.patch, *model.strides]))
    inputs = [normals(B, 64, channels), TIME.clone(), COND.vector.clone(), normals(B, k, LATENT, seed=1)]
    for tensor in inputs:
        tensor.requires_grad_()
    x, time, vector, z = inputs
    out = model(x, grid_layout(grid), time, Conditioning(vector), z)
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient.isfinite().all() and (gradient.abs() > 0).all()


def test_each_latent_reaches_the_finest_level_at_its_position():
    """One of 2 x 3 latents over 8 x 12 patches of 16 x 24 tokens reaches its own patches and their neighbours."""
    model, grid = decoder(TWO[:2]), (16, 24)
    seen = outputs(model.patch_in)
    x, z = normals(1, 16 * 24, 3), normals(1, 6, LATENT, seed=1)
    other = z.clone()
    other[:, 2] += 3
    for context in (z, other):
        model(x, grid_layout(grid), TIME[:1], Conditioning(COND.vector[:1]), context)
    moved = (seen[1] - seen[0]).abs().sum(1)[0] > 1e-6
    assert moved.shape == (8, 12) and moved[:5, 7:].all() and not moved[5:].any() and not moved[:, :7].any()


def test_levels_that_change_nothing_are_the_identity():
    """New blocks are the identity, so h passes the U unchanged but for the biases of its convolutions."""
    model = decoder(TWO[:2])
    for up in model.up:
        nn.init.zeros_(up.bias)
    seen = []
    model.out_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.patch_in.register_forward_hook(lambda _, args, out: seen.append(out))
    nn.init.zeros_(model.context_coarse.weight)
    model(normals(B, 384, 3), grid_layout((16, 24)), TIME, COND, normals(B, 6, LATENT))
    torch.testing.assert_close(seen[1], seen[0])


def test_indivisible_sizes_are_refused_with_the_nearest_valid_ones():
    with pytest.raises(
        ValueError, match=r"\[500, 512\] tokens is not a multiple of \[16, 16\].*\[496, 512\] or \[512, 51"
    ):
        encoder(TWO).latent_layout(grid_layout((500, 512)))
    with pytest.raises(ValueError, match=r"crop or resize the data to \[16, 16\]"):
        encoder(TWO)(normals(1, 64, 3), grid_layout((8, 8)))
    with pytest.raises(ValueError, match="not a multiple"):
        base()(normals(B, 15, LATENT), grid_layout((3, 5)), TIME, COND)


def test_sets_and_grids_with_other_numbers_of_axes_are_refused():
    for model in (encoder(TWO[:1]), base()):
        for layout, words in (
            (Layout(torch.zeros(1, 16, 2)), "a set, but a convolution needs a grid"),
            (grid_layout((4, 2, 2)), r"\[4, 2, 2\] has 3 axes, this network has 2"),
        ):
            args = () if isinstance(model, ConvEncoder) else (TIME, COND)
            with pytest.raises(ValueError, match=words):
                model(normals(B, 16, model.patch_in.in_channels // math.prod(model.patch)), layout, *args)


def test_context_that_does_not_fit_is_refused():
    for context in (None, normals(B, 3, LATENT)):
        with pytest.raises(ValueError, match="context: expected 4 tokens"):
            decoder(TWO[:1])(normals(B, 64, 3), grid_layout((8, 8)), TIME, COND, context)
        with pytest.raises(ValueError, match="context: expected 64 tokens"):
            ViT(3, 16, 1, 2, context_channels=LATENT)(normals(B, 64, 3), grid_layout((8, 8)), TIME, COND, context)


def test_levels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="describe 3, 2 and 3 levels"):
        ConvEncoder(3, 4, [8, 8, 8], [1, 1], (2, 2), TWO[:2])
    with pytest.raises(ValueError, match="transformers 3"):
        UViT(3, [8, 8], [1, 1], 3, (2, 2), TWO[:1], 16)
    with pytest.raises(ValueError, match="head width"):
        UViT(3, [8, 20], [1, 1], 1, (2, 2), TWO[:1], 16, heads=8)


@pytest.mark.parametrize("tokens", [0, 16])
def test_a_transformer_takes_any_layout_with_the_same_signature(tokens: int):
    model = randomised(ViT(LATENT, D, 2, 2, context_channels=LATENT if tokens else None))
    mask = torch.tensor([[True] * 16, [True] * 9 + [False] * 7])
    layout = Layout(grid_layout((4, 4)).positions, mask)
    x, z = normals(B, 16, LATENT), normals(B, 16, LATENT, seed=1) if tokens else None
    out = model(x, layout, TIME, COND, z)
    assert out.shape == x.shape
    x[1, 9:] = 50
    torch.testing.assert_close(model(x, layout, TIME, COND, z)[1, :9], out[1, :9], rtol=0, atol=1e-5)
    if z is not None:
        assert (model(x, layout, TIME, COND, z + 1) - out).abs().max() > 1e-2
    assert (ViT(LATENT, D, 2, 2)(x, layout, TIME, COND) == 0).all()


def test_dropout_acts_in_transformer_levels_in_training_only():
    torch.manual_seed(0)
    for model, x in ((base(dropout=0.5), normals(B, 64, LATENT)), (ViT(LATENT, D, 2, 2, 0.5), normals(B, 64, LATENT))):
        randomised(model)
        args = (x, grid_layout((8, 8)), TIME, COND)
        assert torch.equal(model(*args), model(*args))
        model.train()
        assert (model(*args) - model(*args)).abs().max() > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_gradient(dropout: float):
    model = randomised(decoder(TWO[:1], dropout=dropout)).train()
    gradients = []
    blocks = [module for module in model.modules() if isinstance(module, Repeated)]
    assert len(blocks) == 3, "each block is a unit of compilation and recomputation"
    for recompute in (False, True):
        for block in blocks:
            block.recompute = recompute
        torch.manual_seed(5)
        x, z = normals(B, 64, 3).requires_grad_(), normals(B, 4, LATENT, seed=1).requires_grad_()
        out = model(x, grid_layout((8, 8)), TIME, COND, z)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, z, *model.parameters()]))
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_low_precision_stays_close():
    enc, dec, layout = randomised(encoder(TWO[:1])), randomised(decoder(TWO[:1])), grid_layout((8, 8))
    x = normals(B, 64, 3)
    exact = dec(x, layout, TIME, COND, enc(x, layout))
    with torch.autocast("cpu", torch.bfloat16):
        z = enc(x, layout)
        rough = dec(x, layout, TIME, COND, z)
    assert z.dtype == rough.dtype == torch.bfloat16
    assert (rough.float() - exact).std() < 0.1 * exact.std()


def test_muon_trains_matrices_only():
    model = decoder(TWO[:1])
    chosen = {id(p) for p in muon_parameters(model)}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert all(p.ndim == 2 for p in muon_parameters(model))
    assert {"context_fine.weight", "middle.blocks.0.attn.qkv.weight", "up_levels.0.0.film.weight"} <= names
    assert not names & {"out.weight", "patch_in.weight", "out_modulation.weight"}
    assert not list(muon_parameters(encoder(TWO)))


def million(model: nn.Module, parts: tuple[str, ...] = ("",)) -> float:
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts)) / 1e6


def test_sizes_of_unified_latents():
    """All parameters, and those of attention and MLPs, which match the paper's sizes."""
    blocks = (".attn.", ".mlp.")
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        enc = ConvEncoder(3, 32, [128, 256, 512, 512], [2, 2, 2, 3], (2, 2), TWO)
        prior = ViT(32, 1024, 8, 16)
        dec = UViT(3, [128, 256, 512, 1024], [2, 2, 2, 8], 1, (2, 2), TWO, 1024, 16, 0.1, 32)
        two_levels = UViT(32, [512, 1024], [6, 16], 2, (1, 1), [(2, 2)], 1024, 16, 0.1)
        cond, z = Conditioning(torch.zeros(1, 1024)), torch.zeros(1, 1024, 32)
        assert two_levels(z, grid_layout((32, 32)), torch.zeros(1), cond).shape == z.shape
    assert million(enc) == pytest.approx(30.6, abs=0.05)
    assert (million(prior), million(prior, blocks)) == (pytest.approx(154.9, abs=0.05), pytest.approx(100.7, abs=0.05))
    assert (million(dec), million(dec, blocks)) == (pytest.approx(197.7, abs=0.05), pytest.approx(100.7, abs=0.05))
    assert million(two_levels) == pytest.approx(363.7, abs=0.05)
    assert million(two_levels, blocks) == pytest.approx(239.3, abs=0.05)
    assert counter.get_total_flops() / 2e9 == pytest.approx(105.6, abs=0.1), "multiply-adds for 32 x 32 latents"


def test_a_layout_keeps_its_grid():
    layout = grid_layout((2, 3))
    assert layout.positions[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout.grid == layout.repeat(2).grid == layout.to("cpu").grid == (2, 3)
    assert Layout(torch.zeros(1, 6, 2)).grid is None
