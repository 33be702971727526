"""Positions in a `ViT` and in the transformer levels of a `UViT`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unilatent.nets.backbones import UViTConfig, ViTConfig, make_backbone, make_encoder
from unilatent.types import Conditioning, Layout, grid_layout

B, C, D = 2, 6, 32
TIME = torch.tensor([0.2, 0.9])
COND = Conditioning(torch.randn(B, D, generator=torch.Generator().manual_seed(9)))


def randomised(model: nn.Module) -> nn.Module:
    """Random weights everywhere, as after training."""
    stream = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=stream) / max(1, p.shape[-1]) ** 0.5 + (p.ndim == 1)
    return model


def vit(**fields: object) -> nn.Module:
    return randomised(make_backbone(ViTConfig(width=D, depth=2, heads=2, **fields), C, 3))


def values(n: int) -> torch.Tensor:
    return torch.randn(B, n, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [(5, 1, 1), (1, 5, 1), (1, 1, 5), (1, 5)], ids=str)
@pytest.mark.parametrize("absolute", [False, True])
def test_axes_of_one_cell_take_no_channels(grid: tuple[int, ...], absolute: bool):
    """Five frames of one token each have all channel pairs for time, as five tokens in a row have."""
    net = vit(absolute_positions=absolute)
    row = net(values(5), grid_layout((5,)), TIME, COND)
    torch.testing.assert_close(net(values(5), grid_layout(grid), TIME, COND), row)
    square = net(values(4), grid_layout((2, 2)), TIME, COND)
    assert not torch.allclose(net(values(4), grid_layout((4,)), TIME, COND), square)


def test_a_transformer_level_takes_no_channels_for_axes_of_one_cell():
    """Three axes, one of them flat, are two."""

    def net(axes: int) -> nn.Module:
        config = UViTConfig(channels=(D,), blocks=(2,), transformers=1, patch=1, strides=(), heads=2, dropout=0.0)
        return randomised(make_backbone(config, C, axes))

    flat, plane = net(3), net(2)
    state = plane.state_dict()
    plane.load_state_dict({key: value.reshape(state[key].shape) for key, value in flat.state_dict().items()})
    expected = plane(values(6), grid_layout((3, 2)), TIME, COND)
    torch.testing.assert_close(flat(values(6), grid_layout((3, 1, 2)), TIME, COND), expected, rtol=1e-3, atol=1e-4)


def test_one_token_keeps_its_axes():
    assert grid_layout((1, 1, 1)).varying.shape == (1, 1, 3)
    assert Layout(torch.zeros(1, 4, 3)).varying.shape == (1, 4, 3)  # a set: no axis is known to be flat
    assert grid_layout((1, 4, 2)).varying.tolist() == grid_layout((4, 2)).positions.tolist()


@pytest.mark.parametrize("absolute", [False, True])
def test_only_absolute_positions_tell_where_the_first_token_is(absolute: bool):
    net, here = vit(absolute_positions=absolute), grid_layout((5,))
    there = Layout(here.positions + 7, grid=here.grid)
    same = torch.allclose(net(values(5), here, TIME, COND), net(values(5), there, TIME, COND), rtol=1e-4, atol=1e-4)
    assert same != absolute


def test_an_encoder_can_have_absolute_positions():
    outputs = []
    for absolute in (False, True):
        config = ViTConfig(width=D, depth=1, heads=2, absolute_positions=absolute)
        outputs.append(randomised(make_encoder(config, C, 3, 1))(values(5), grid_layout((5,))))
    assert outputs[0].shape == (B, 5, 3)
    assert not torch.allclose(*outputs)
