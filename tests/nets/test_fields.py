"""Fields of a token: one linear field is one Linear, periodic fields have period 1, every field has an effect."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from unilatent.nets.fields import TokenField, any_exact, token_input

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


def test_which_fields_are_exact() -> None:
    linear, smooth, periodic = TokenField(4), TokenField(3, "smooth"), TokenField(3, "periodic")
    assert [field.exact for field in (linear, smooth, periodic)] == [False, True, True]
    assert any_exact([linear, smooth]) and not any_exact([linear, linear])


@pytest.mark.parametrize("form", ["autocast", "half", "bfloat16"])
@pytest.mark.parametrize(("kind", "shift"), [("smooth", 1e-3), ("periodic", 2e-4)])
def test_low_precision_does_not_round_coordinates(kind: str, shift: float, form: str) -> None:
    """A step far below those of bfloat16 (0.03 at 5, 0.004 at 0.8) moves the embedding as in float32."""
    torch.manual_seed(0)
    network = token_input([TokenField(4), TokenField(3, kind)], 64)
    place = 5.0 if kind == "smooth" else 0.8
    x = torch.full((1, 3, 7), place)
    moved = x.clone()
    moved[..., 4] += shift
    assert torch.equal(x.bfloat16(), moved.bfloat16())
    want = network(moved, POSITIONS) - network(x, POSITIONS)
    if form != "autocast":
        getattr(network, form)()  # rounds the weights, by up to 0.4 %
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        step = network(moved, POSITIONS) - network(x, POSITIONS)
    assert step.dtype == torch.float32
    assert (step - want).norm() < 0.02 * want.norm()


def test_one_hot_fields_stay_in_the_compute_type() -> None:
    network = token_input([TokenField(4)], 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.eye(4)[None], POSITIONS).dtype == torch.bfloat16
