"""Backbones as denoisers: clean estimates in float32 from every kind of prediction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath
from unilatent.maths.predictions import from_clean
from unilatent.nets.convnet import UViT
from unilatent.nets.denoiser import Denoiser
from unilatent.nets.vit import ViT
from unilatent.types import Conditioning, Layout, grid_layout

B, C, D = 3, 4, 16
LAYOUT = grid_layout((4, 4))
PATHS = [LogSNRPath(5, -12), LogSNRPath(10, -10, "linear"), LinearPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, COND, T = normals(B, 16, C), Conditioning(normals(B, D, seed=1)), torch.tensor([0.0, 0.3, 1.0])
BACKBONES = [
    lambda: ViT(C, D, 2, 2),
    lambda: UViT(C, [8, D], [1, 2], 2, (1, 1), [(2, 2)], D, heads=2),
    lambda: UViT(C, [8, D], [1, 2], 1, (1, 1), [(2, 2)], D, heads=2, context_channels=2),
]


class Oracle(nn.Module):
    """Predicts exactly for a known clean sample, and records its inputs."""

    def __init__(self, x: torch.Tensor, kind: str, path: NoisePath):
        super().__init__()
        self.x, self.kind, self.path, self.inputs = x, kind, path, []

    def forward(self, values, layout, time, cond, context=None):
        self.inputs.append((layout, time, cond, context))
        t = torch.tensor([0.1, 0.5, 0.9])
        return from_clean(self.kind, self.x, values, t, self.path)


@every_path
@pytest.mark.parametrize("kind", ["clean", "noise", "velocity", "score"])
def test_any_prediction_becomes_the_clean_estimate(path: NoisePath, kind: str):
    x, t, context = normals(B, 16, C, seed=2), torch.tensor([0.1, 0.5, 0.9]), normals(B, 4, 2)
    oracle = Oracle(x, kind, path)
    estimate = Denoiser(oracle, path, kind)(path.add_noise(x, Z, t), t, COND, LAYOUT, context)
    torch.testing.assert_close(estimate, x, rtol=0, atol=2e-3 if kind == "noise" else 1e-3)
    layout, time, cond, received = oracle.inputs[0]
    assert layout is LAYOUT and cond is COND and received is context
    torch.testing.assert_close(time, 1 - t if isinstance(path, LinearPath) else 0.125 * path.logsnr(t))


@every_path
@pytest.mark.parametrize("make", BACKBONES)
def test_a_new_denoiser_predicts_zero_velocity(make, path: NoisePath):
    context = normals(B, 4, 2)
    estimate = Denoiser(make(), path)(Z, T, COND, LAYOUT, context)
    want = Z if isinstance(path, LinearPath) else path.alpha(T)[:, None, None] * Z
    torch.testing.assert_close(estimate, want)
    assert (Denoiser(make(), path, "clean")(Z, T, COND, LAYOUT, context) == 0).all()


@pytest.mark.parametrize("t", [0.4, torch.tensor(0.4), torch.full((B,), 0.4)])
def test_times_are_scalars_or_one_per_sample(t):
    model = Denoiser(BACKBONES[0](), PATHS[0])
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    whole = model(Z, torch.tensor([0.4, 0.4, 0.4]), COND, LAYOUT)
    assert torch.equal(model(Z, t, COND, LAYOUT), whole)
    torch.testing.assert_close(model(Z[1:2], 0.4, Conditioning(COND.vector[1:2]), LAYOUT), whole[1:2])


def test_estimates_are_float32_under_autocast_and_gradients_flow():
    torch.manual_seed(0)
    model = Denoiser(BACKBONES[2](), PATHS[0])
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z, context = Z.clone().requires_grad_(), normals(B, 4, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        estimate = model(z, 0.5, COND, LAYOUT, context)
    assert estimate.dtype == torch.float32
    estimate.square().sum().backward()
    assert z.grad.abs().min() > 0 and (context.grad.abs() > 0).all()


def test_the_state_of_a_denoiser_is_that_of_its_backbone():
    backbone = BACKBONES[0]()
    names = Denoiser(backbone, PATHS[0]).state_dict().keys()
    assert names == {f"backbone.{name}" for name in backbone.state_dict()}


def test_padding_has_no_effect_in_transformers():
    mask = torch.ones(B, 16, dtype=torch.bool)
    mask[:, 10:] = False
    model = Denoiser(BACKBONES[0](), PATHS[2])
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    layout, other = Layout(LAYOUT.positions, mask), Z.clone()
    other[:, 10:] = 7
    got = model(other, 0.5, COND, layout)[:, :10]
    torch.testing.assert_close(got, model(Z, 0.5, COND, layout)[:, :10])
