"""The rate is an upper bound: for latents of known information the measured bits are never fewer, and few more once the
prior is trained."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from unilatent.maths import weightings
from unilatent.maths.paths import NoisePath
from unilatent.maths.streams import Streams, generator
from unilatent.methods.unified_latents import UnifiedLatents, UnifiedLatentsConfig
from unilatent.modalities.image import ImageConfig
from unilatent.model_config import ModelConfig
from unilatent.nets.backbones import ViTConfig
from unilatent.training.config import OptimizerConfig
from unilatent.training.optimizer import Optimizers
from unilatent.types import Batch, Conditioning, Layout, Tokens

TOKENS, CHANNELS, KINDS, STD = 4, 4, 8, 0.25
ALPHA, SIGMA = (1 + math.exp(-5)) ** -0.5, (1 + math.exp(5)) ** -0.5


class Measured(NamedTuple):
    """A mean in nats and its standard error."""

    mean: float
    error: float


class Identity(nn.Module):
    """An encoder without parameters that returns the data."""

    def latent_layout(self, layout: Layout) -> Layout:
        return layout

    def forward(self, values: Tensor, layout: Layout) -> Tensor:
        return values


def mixture(scale: float = 1.0, std: float = STD) -> MixtureSameFamily:
    """A mixture of eight Gaussians with different weights, over the latents of a sample."""
    means = torch.randn(KINDS, TOKENS * CHANNELS, generator=generator("means"), dtype=torch.float64)
    shares = torch.linspace(1, 2, KINDS, dtype=torch.float64)
    return MixtureSameFamily(Categorical(shares), Independent(Normal(scale * means, std), 1))


def draw(n: int, *key: int | str) -> Tensor:
    """Draw clean latents (n, K, D) from the mixture."""
    stream, distribution = generator("mixture", *key), mixture()
    kind = torch.multinomial(distribution.mixture_distribution.probs, n, replacement=True, generator=stream)
    noise = torch.randn(n, TOKENS * CHANNELS, generator=stream).double()
    z = distribution.component_distribution.mean[kind] + STD * noise
    return z.reshape(n, TOKENS, CHANNELS).float()


def information(n: int = 200_000) -> Measured:
    """I(z; z_0) = H(z_0) - H(z_0 | z): the first by Monte Carlo from the known density of z_0, the second exactly."""
    z = draw(n, "information").flatten(1).double()
    z_0 = ALPHA * z + SIGMA * torch.randn(z.shape, generator=generator("information noise")).double()
    surprise = -mixture(ALPHA, math.sqrt(ALPHA**2 * STD**2 + SIGMA**2)).log_prob(z_0)
    noise = TOKENS * CHANNELS / 2 * math.log(2 * math.pi * math.e * SIGMA**2)
    return Measured(float(surprise.mean()) - noise, float(surprise.std()) / math.sqrt(n))


class OptimalPrior(nn.Module):
    """E[z | z_t] of the mixture, in closed form."""

    def __init__(self, path: NoisePath):
        super().__init__()
        self.path = path

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditioning, layout: Layout) -> Tensor:
        distribution, z = mixture(), z_t.flatten(1).double()[:, None]  # (B, 1, K D)
        alpha, sigma = (f(t.double())[:, None, None] for f in (self.path.alpha, self.path.sigma))
        means, variance = distribution.component_distribution.mean, alpha**2 * STD**2 + sigma**2
        fit = -(z - alpha * means).square().sum(-1) / (2 * variance[..., 0])  # (B, kinds)
        share = (distribution.mixture_distribution.probs.log() + fit).softmax(-1)[..., None]
        return (share * (means + alpha * STD**2 / variance * (z - alpha * means))).sum(1).reshape_as(z_t).float()


def make(**fields: Any) -> UnifiedLatents:
    tiny = ViTConfig(width=8, depth=1, heads=1)
    settings = {"prior": ViTConfig(width=64, depth=2, heads=4), "path": "linear", "latent_min_logsnr": -8.0, **fields}
    method = UnifiedLatentsConfig(latent_channels=CHANNELS, encoder=tiny, decoder=tiny, **settings)
    torch.manual_seed(0)
    model = UnifiedLatents(ModelConfig(modality=ImageConfig(size=4, patch_size=2, channels=1), method=method))
    model.encoder = Identity()  # type: ignore[assignment]
    return model


def batch(model: UnifiedLatents, z: Tensor) -> Batch:
    """Data that encode to z."""
    layout = model.modality.sample_layout(Streams(("layout",), [0]))
    return Batch(model.modality.unpack(Tokens(model._natural(z), layout)), {})


def rate(model: UnifiedLatents, n: int = 16_384, size: int = 2048) -> Measured:
    """The method's rate of n new samples, from the bits that it logs."""
    bits = []
    with torch.no_grad():
        for start in range(0, n, size):
            streams = Streams(("measure",), range(start, start + size))
            part = next(iter(model.loss(batch(model, draw(size, "measure", start)), streams)))
            bits.append(part.monitors["bits_per_latent_dimension"].double())
    nats = torch.stack(bits) * TOKENS * CHANNELS * math.log(2)
    return Measured(float(nats.mean()), float(nats.std()) / math.sqrt(len(nats)))


def train(model: UnifiedLatents, steps: int, size: int) -> None:
    """Train the prior alone on the method's loss; it ends with EMA weights."""
    weights = list(model.prior.parameters())
    optimizers = Optimizers(model.prior, OptimizerConfig(learning_rate=1e-2))  # type: ignore[arg-type]
    ema_weights = [p.detach().clone() for p in weights]
    for step in range(steps):
        streams = Streams(("train", 0), range(step * size, (step + 1) * size))
        next(iter(model.loss(batch(model, draw(size, step)), streams))).value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizers.set_factor(min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizers.step()
        optimizers.zero_grad()
        for ema_weight, p in zip(ema_weights, weights, strict=True):
            ema_weight.lerp_(p.detach(), 1 - min(0.98, (step + 1) / (step + 10)))
    for ema_weight, p in zip(ema_weights, weights, strict=True):
        p.data.copy_(ema_weight)


def is_bound(measured: Measured, truth: Measured) -> bool:
    """Whether the measured rate is at least the true information, within four standard errors."""
    return measured.mean >= truth.mean - 4 * math.hypot(measured.error, truth.error)


@pytest.mark.parametrize(("path", "end"), [("linear", -8.0), ("cosine", -8.0), ("cosine", -12.0)])
def test_the_optimal_prior_s_rate_is_the_true_information(path: str, end: float):
    """The closed-form optimal prior recovers 20.68 nats (known to 0.006) within sampling error, on every noise path."""
    truth, model = information(), make(path=path, latent_min_logsnr=end)
    model.prior = OptimalPrior(model.path)  # type: ignore[assignment]
    measured = rate(model)
    assert truth.error < 0.01 and measured.error < 0.02 * truth.mean
    assert abs(measured.mean - truth.mean) < 4 * math.hypot(measured.error, truth.error)


def test_a_discounted_rate_is_no_bound(monkeypatch: pytest.MonkeyPatch):
    """Why w = 1 is mandatory: with the decoder's weight the same prior measures less than the true information."""
    truth, model = information(), make()
    model.prior = OptimalPrior(model.path)  # type: ignore[assignment]
    monkeypatch.setattr(weightings, "elbo", lambda t, path: weightings.sigmoid(t, path, 2.0))
    assert not is_bound(rate(model), truth)


def test_an_untrained_prior_has_a_higher_rate():
    truth, model = information(), make()
    before = rate(model, 65_536)
    train(model, 60, size=64)
    after = rate(model, 65_536)
    assert is_bound(before, truth) and is_bound(after, truth)
    assert truth.mean < after.mean < before.mean - 4 * before.error


@pytest.mark.slow
def test_a_trained_prior_comes_within_a_tenth_of_the_true_information():
    truth, model = information(), make()
    train(model, 600, size=192)
    measured = rate(model, 65_536)
    print(f"information {truth.mean:.3f} +- {truth.error:.3f} nats, rate {measured.mean:.3f} +- {measured.error:.3f}")
    assert is_bound(measured, truth) and measured.mean < 1.1 * truth.mean
