"""A toy problem for every modality: eight samples of each of two kinds, memorised in seconds, and its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from building import batch_of, flat, pick, splits_of, tensors

from unilatent.maths.frechet import frechet_distance_of
from unilatent.maths.streams import Streams, generator
from unilatent.methods.base import LatentModel
from unilatent.sampling import sample_batches
from unilatent.training.config import OptimizerConfig
from unilatent.training.ema import EMA
from unilatent.training.optimizer import Optimizers, clip_gradients
from unilatent.types import Batch

KINDS, EACH, SAMPLES = 2, 8, 256


def toy_of(modality: str) -> tuple[Batch, str | None]:
    """Return samples of two kinds, and the condition argument that distinguishes them (None if the data has none)."""
    everything = batch_of(modality, min(400, len(splits_of(modality).train)))
    argument = next(iter(everything.values), None)
    if argument is None:
        return pick(everything, slice(0, KINDS * EACH)), None
    kinds = everything.values[argument].unique(dim=0)[:KINDS]
    found = [(everything.values[argument] == kind).nonzero().flatten()[:EACH] for kind in kinds]
    return pick(everything, torch.cat(found)), argument


def train(model: LatentModel, data: Batch, steps: int, rate: float = 5e-3, size: int = 24) -> None:
    """Train with the method's own loss and optimisers, its tokenizer first; the model ends with EMA weights."""
    if (tokenizer := getattr(model, "tokenizer", None)) is not None:
        train(tokenizer.requires_grad_(True).train(), data, steps, rate, size)
        tokenizer.requires_grad_(False)
    optimizers, ema = Optimizers(model, OptimizerConfig(learning_rate=rate)), EMA(model, 0.98)
    count = len(tensors(data.data)[0])
    for step in range(steps):
        which = torch.randint(count, (size,), generator=generator("toy", step))
        for part in model.loss(pick(data, which), Streams(("toy", step), range(size))):
            part.value.backward()
            part.close()
        clip_gradients(model, 3.0)
        cooling = max(0.0, step / steps - 0.6) / 0.4
        optimizers.set_factor(min(1, (step + 1) / 30) * (0.525 + 0.475 * math.cos(math.pi * cooling)))
        optimizers.step()
        optimizers.zero_grad()
        ema.update(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(ema.weights[name])
    model.eval()


@dataclass
class Learned:
    """Metrics of a trained toy.

    reconstruction: squared error / variance of the data. distance: Frechet distance of samples from the data in token
    space; of_noise, of_means: baselines, that of the mean sample with noise and of class means. recognised: share of
    samples nearest to the mean of their own kind. latent_std: over samples.
    """

    reconstruction: float
    distance: float
    of_noise: float
    of_means: float | None
    recognised: float | None
    latent_std: float


def judged(model: LatentModel, data: Batch, argument: str | None) -> Learned:
    pack, real = model.modality.pack, flat(model.modality.pack(data.data))
    latents = model.encode(data.data)
    again = flat(pack(model.decode(latents, pack(data.data).layout)))
    settings: dict[str, Any] = {"num_inference_steps": 12, "solver": "heun", "time_shift": 2.0, "batch_size": SAMPLES}
    if argument is not None:
        settings[argument] = data.values[argument].unique(dim=0)
    parts = list(sample_batches(model, SAMPLES, **settings))
    made = flat(pack(parts[0].data))
    spread = real.std(0) * torch.randn(SAMPLES, real.shape[1], dtype=torch.float64, generator=generator("toy noise"))
    of_means, recognised = None, None
    if argument is not None:
        asked, kinds = parts[0].values[argument], data.values[argument].unique(dim=0)
        means = torch.stack([real[data.values[argument] == kind].mean(0) for kind in kinds])
        index = torch.stack([asked == kind for kind in kinds]).int().argmax(0)
        of_means = frechet_distance_of(means[index], real)
        recognised = float((torch.cdist(made, means).argmin(1) == index).double().mean())
    return Learned(
        reconstruction=float((again - real).square().mean() / real.var(0).mean()),
        distance=frechet_distance_of(made, real),
        of_noise=frechet_distance_of(real.mean(0) + spread, real),
        of_means=of_means,
        recognised=recognised,
        latent_std=float(latents.double().var(0).mean().sqrt()),
    )


def demand(learned: Learned, generates: bool = True) -> None:
    """Require much better metrics than a collapsed model can have.

    generates: False for a denoiser that is not meant to be sampled from; it must still beat class means.
    """
    assert learned.latent_std > 0.05, f"latents collapsed: {learned}"
    assert learned.reconstruction < 0.15, f"reconstructions are far from the data: {learned}"
    assert learned.distance < 0.4 * learned.of_noise, f"samples are no better than noise round the mean: {learned}"
    if learned.of_means is not None and learned.recognised is not None:
        most = 0.6 if generates else 1.0
        assert learned.distance < most * learned.of_means, f"samples are no better than class means: {learned}"
        assert learned.recognised > 0.9, f"samples are not of the class asked for: {learned}"
