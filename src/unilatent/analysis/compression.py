"""How many bytes the weights of a model take by the entropy of their values (UNITE, Sec. 4), and how many bits its
latents can carry."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..maths.coding import description_bits, gaussian_bits, rates
from ..maths.paths import NoisePath
from ..maths.spread import Spread
from ..maths.streams import Streams, generator, seed_of
from ..methods.base import LatentModel
from ..sharding import full
from ..types import Batch, count
from .rates import MeanWithError, RateReport, unit_counts

GROUPS = ("attention and MLP", "normalisation", "rest")
MATRICES = re.compile(r"\.blocks\.\d+\.(attn|mlp|up|down)\.")
NORMS = re.compile(r"(norm|modulation|film)")


@dataclass(frozen=True)
class LatentBits:
    """How many bits latents can carry to the decoder, by what they are divided by ("bits_per_sample",
    "bits_per_latent_dimension", "bits_per_pixel", ...).

    Latents are real numbers, so their bits depend on a resolution: here the noise of z_t = alpha z + sigma eps at
    `time` (1 is noise), the most that the decoder was trained to decode. snr: alpha^2 / sigma^2 there.

    gaussian: an upper bound from the latents' covariance alone, `maths.coding.gaussian_bits` of the D channels, summed
        over the latents of a sample as if they were independent. The covariance is over samples at the same place.
    times, by_time: the same bound in bits per sample at other noise levels: what finer differences would add.
    prior: the bound that a method's own prior gives on the same information (`rates.RateReport.bits`); None for a
        method without one.
    """

    samples: int
    time: float
    snr: float
    gaussian: dict[str, float]
    times: tuple[float, ...]
    by_time: tuple[float, ...]
    prior: dict[str, MeanWithError] | None = None


TIMES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def latent_bits(
    model: LatentModel, batches: Iterable[Batch], rate: RateReport | None = None, seed: int = 0
) -> LatentBits | str:
    """Measure it on samples; or say why there is no resolution: the decoder was trained without noise on latents, or
    with noise that leaves nothing of them.

    rate: what `rates.rate_report` found.
    """
    time, *times = ((t, _snr(model.path, t)) for t in (model.decoder_noise, *TIMES))
    if time[1] == math.inf:
        return "the decoder was trained without noise on them: no resolution"
    if time[1] == 0:
        return f"at t = {time[0]:g}, the most noise that the decoder was trained with, nothing of them is left"
    spread, parts, done = Spread(model.max_latents, model.latent_channels, model.device), [], 0
    for batch in batches:
        streams = Streams(("latents", seed), range(done, done + count(batch.data)), model.device)
        z = model.encode_clean(batch.data, streams)
        spread.add(z, model.latent_layout(model.modality.pack(batch.data).layout.to(z.device)).mask)
        parts.append(unit_counts(model, batch))
        done += len(z)
    counts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    covariance = spread.covariance()
    latents = counts["latent_dimension"] / model.latent_channels  # (n,) of each sample
    counts["sample"] = torch.ones(done, dtype=torch.float64)
    nats = math.log(2) * gaussian_bits(covariance, time[1]) * latents
    bits = {name: float(value) for name, value in rates(nats, **counts).items()}
    by_time = tuple(gaussian_bits(covariance, snr) * float(latents.mean()) for _, snr in times)
    prior = None if rate is None else {**rate.bits, "bits_per_sample": _in_bits(rate.nats)}
    return LatentBits(done, *time, bits, tuple(t for t, _ in times), by_time, prior)


def _snr(path: NoisePath, t: float) -> float:
    """alpha^2 / sigma^2; infinite without noise."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(path.alpha(time)), float(path.sigma(time))
    return (alpha / sigma) ** 2 if sigma else math.inf


def _in_bits(nats: MeanWithError) -> MeanWithError:
    error = None if nats.error is None else nats.error / math.log(2)
    return MeanWithError(nats.mean / math.log(2), error)


@dataclass(frozen=True)
class Compression:
    """The description length of weights: each tensor's number of values times the entropy of its histogram
    (`maths.coding.description_bits`, 4,096 bins), in MB (10^6 bytes), by network and group.

    trained, initial: of this model, and of the same model as initialised from a seed. gaussian: of as many normal
    numbers, tensor by tensor: tensors that begin as zeros (AdaLN's modulations) take no bits as initialised, and the
    paper's random initialisation is not of zeros. parameters: number of values. latents: None without samples; or why
    they have no resolution.
    """

    trained: dict[str, dict[str, float]]
    initial: dict[str, dict[str, float]]
    gaussian: dict[str, dict[str, float]]
    parameters: dict[str, dict[str, int]]
    latents: LatentBits | str | None = None

    def total(self, of: dict[str, dict[str, float]]) -> float:
        """Return the MB of all networks and groups."""
        return sum(sum(groups.values()) for groups in of.values())


def compression(model: LatentModel, seed: int = 0) -> Compression:
    """Measure a model's trainable weights; the initial ones are of `seed`, with which no run need have begun."""
    before = torch.get_rng_state()
    try:
        torch.manual_seed(seed_of("init", seed))
        fresh = LatentModel.build(model.config)
    finally:
        torch.set_rng_state(before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Compression(
        _lengths(model, trainable),
        _lengths(fresh, trainable),
        _lengths(fresh, trainable, random=generator("gaussian weights", seed)),
        {network: {group: sum(sizes) for group, sizes in groups.items()} for network, groups in _sizes(model).items()},
    )


def group_of(name: str) -> str:
    """Return the group of a parameter by its name: matrices of attention and MLPs; everything that scales or shifts
    activations; the rest (inputs, outputs, embeddings)."""
    if NORMS.search(name):
        return GROUPS[1]
    return GROUPS[0] if MATRICES.search(f".{name}") else GROUPS[2]


def _lengths(
    model: LatentModel, names: set[str], random: torch.Generator | None = None
) -> dict[str, dict[str, float]]:  # fmt: skip
    """MB of these parameters; with `random`, of normal numbers in their place."""
    found: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        if name in names:
            groups = found.setdefault(name.partition(".")[0], dict.fromkeys(GROUPS, 0.0))
            if random is None:
                values = full(parameter.detach()).cpu()
            else:
                values = torch.randn(parameter.shape, generator=random)
            groups[group_of(name)] += description_bits(values) / 8e6
    return found


def _sizes(model: LatentModel) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups = found.setdefault(name.partition(".")[0], {group: [] for group in GROUPS})
            groups[group_of(name)].append(parameter.numel())
    return found
