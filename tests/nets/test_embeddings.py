"""Rotary and sinusoidal position embeddings, and time embeddings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unilatent.nets.embeddings import TimeEmbedding, frequencies, rotary, rotate, sincos


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One vector (d,) at one position (A,)."""
    return rotate(x[None, None, None], rotary(position[None, None], len(x)))[0, 0, 0]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_products_depend_on_differences_of_positions(axes: int):
    q, k = normals(24), normals(24, seed=1)
    a, b, moved = 5 * normals(3, axes, seed=2)
    product = rotated(q, a) @ rotated(k, b)
    torch.testing.assert_close(rotated(q, a + moved) @ rotated(k, b + moved), product, rtol=1e-4, atol=1e-4)
    assert (rotated(q, a + moved) @ rotated(k, b) - product).abs() > 1e-2


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_is_a_rotation_and_the_identity_at_position_zero(axes: int):
    x = normals(2, 3, 4, 24)
    positions = 10 * normals(2, 4, axes, seed=1)
    out = rotate(x, rotary(positions, 24))
    pairs = (2, 3, 4, 12, 2)
    torch.testing.assert_close(out.reshape(pairs).norm(dim=-1), x.reshape(pairs).norm(dim=-1))
    assert torch.equal(rotate(x, rotary(torch.zeros(1, 4, axes), 24)), x)


def test_rotary_rotates_neighbouring_channels_by_position_times_frequency():
    x = normals(8)
    out = rotated(x, torch.tensor([3.0]))
    for i, frequency in enumerate((1.0, 0.1, 0.01, 0.001)):
        a, b, angle = x[2 * i], x[2 * i + 1], 3 * frequency
        want = [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
        assert out[2 * i : 2 * i + 2].tolist() == pytest.approx([float(w) for w in want], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotary_and_its_gradients_agree_in_all_precisions(dtype: torch.dtype):
    """float32 on a CPU uses complex products, other types use real ones."""
    qkv, rotation = normals(2, 5, 3, 2, 8), rotary(10 * normals(2, 5, 2, seed=1), 8)
    weight = normals(2, 2, 5, 8, seed=2)
    found = []
    for x in (qkv.clone().requires_grad_(), qkv.to(dtype).requires_grad_()):
        out = rotate(x.permute(2, 0, 3, 1, 4)[1], rotation)  # strided, as attention cuts it
        (out.float() * weight).sum().backward()
        found.append((out.float(), x.grad.float()))
    tolerance = 1e-6 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)


def test_each_axis_has_its_own_channels():
    x = normals(12)
    for axis in range(3):
        position = torch.zeros(3)
        position[axis] = 2.0
        changed = (rotated(x, position) != x).nonzero().flatten().tolist()
        assert changed == list(range(4 * axis, 4 * axis + 4))


def test_rotary_shapes_and_a_shared_layout():
    cos, sin = rotary(torch.zeros(1, 7, 2), 16)
    assert cos.shape == sin.shape == (1, 1, 7, 16)
    assert rotate(normals(3, 2, 7, 16).bfloat16(), (cos, sin)).dtype == torch.bfloat16


@pytest.mark.parametrize(("axes", "width"), [(1, 7), (2, 6), (3, 16)])
def test_channels_that_axes_do_not_divide_encode_nothing(axes: int, width: int):
    shared = width // (2 * axes) * 2 * axes
    positions = torch.arange(1.0, 1 + 3 * axes).view(3, axes)
    waves = sincos(positions, width)
    assert waves.shape == (3, width) and (waves[:, shared:] == 0).all()
    torch.testing.assert_close(waves[:, :shared], sincos(positions, shared) if shared else waves[:, :0])
    if width % 2:
        with pytest.raises(ValueError, match=f"head width {width} is odd"):
            rotary(positions[None], width)
        return
    cos, sin = rotary(positions[None], width)
    assert cos.shape == sin.shape == (1, 1, 3, width)
    assert (cos[..., shared:] == 1).all() and (sin[..., shared:] == 0).all()


def test_sincos_on_one_axis():
    out = sincos(torch.tensor([[0.0], [2.5]]), 6)
    angles = [2.5 * 10_000 ** (-i / 3) for i in range(3)]
    assert out[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert out[1].tolist() == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], rel=1e-5)


def test_sincos_on_the_grid_of_an_image_puts_the_column_first():
    """The convention of ViT's fixed 2-D embedding: first half of the channels for the column, second for the row."""
    dim, height, width = 16, 3, 5
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def one_axis(index: np.ndarray) -> np.ndarray:
        angles = np.outer(index.reshape(-1), 1 / 10_000 ** (np.arange(dim // 4) / (dim // 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    want = np.concatenate([one_axis(columns), one_axis(rows)], axis=1)
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    np.testing.assert_allclose(sincos(positions, dim).numpy(), want, rtol=1e-5, atol=1e-6)


def test_frequencies_fall_from_one():
    assert frequencies(4, torch.zeros(1)).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_time_embedding():
    torch.manual_seed(0)
    embed = TimeEmbedding(8, num_frequencies=16)
    t = torch.tensor([0.0, 0.3, 1.0])
    out = embed(t)
    assert out.shape == (3, 8)
    angles = 2 * math.pi * t[:, None] * embed.frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(out, embed.out(torch.nn.functional.silu(embed.hidden(features))))
    assert "frequencies" in embed.state_dict() and "frequencies" not in dict(embed.named_parameters())
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert embed(t.bfloat16()).dtype == torch.float32
