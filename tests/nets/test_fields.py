"""Fields of a token: one linear field is one Linear, periodic fields have period 1, every field has an effect."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from unilatent.nets.fields import TokenField, token_input

POSITIONS = torch.arange(3.0)[None, :, None]


def test_one_linear_field_is_a_linear_layer_with_the_same_state_keys() -> None:
    torch.manual_seed(0)
    layer = token_input([TokenField(5)], 8)
    torch.manual_seed(0)
    plain = torch.nn.Linear(5, 8)
    x = torch.randn(2, 3, 5)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer(x, POSITIONS), plain(x))


def test_only_periodic_fields_have_period_one() -> None:
    torch.manual_seed(0)
    network = token_input([TokenField(4), TokenField(3, "smooth"), TokenField(2, "periodic")], 16)
    x = torch.randn(2, 3, 9)
    h = network(x, POSITIONS)
    assert h.shape == (2, 3, 16)
    for span, same in ((slice(0, 4), False), (slice(4, 7), False), (slice(7, 9), True)):
        moved = x.clone()
        moved[..., span] += 1.0
        assert torch.allclose(network(moved, POSITIONS), h, atol=1e-4) is same
    half = x.clone()
    half[..., 7:] += 0.5
    assert not torch.allclose(network(half, POSITIONS), h, atol=1e-2)


def test_tokens_with_equal_values_differ_by_position() -> None:
    torch.manual_seed(0)
    network = token_input([TokenField(4), TokenField(3, "smooth")], 16)
    h = network(torch.ones(1, 3, 7), POSITIONS)
    assert F.pdist(h[0]).min() > 0.1
