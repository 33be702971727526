"""Rate of the latents in bits, loss by noise level, and how much the decoder uses its latents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..maths.coding import rates
from ..maths.streams import Streams, generator
from ..methods.base import Costs, LatentModel
from ..types import Batch, count, take

LEVELS = 20
"""Number of bins of log-SNR."""
FEW_BITS = 0.1
SMALL_RATIO = 1.2
"""Thresholds of a collapse: fewer bits per latent dimension, or a smaller ratio of the decoder's losses with another
sample's latents and with the right ones. (The paper's collapsed ablation, Table 6 B, still had 0.064 bits.)"""


@dataclass(frozen=True)
class MeanWithError:
    """A mean over samples and its standard error, None of a single value."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.error is None else f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Curve:
    """Loss in nats per unit of log-SNR, in bins of log-SNR.

    logsnr, mean, error, count: one per non-empty bin. error: of the mean, None in a bin with a single value.
    """

    logsnr: list[float]
    mean: list[float]
    error: list[float | None]
    count: list[int]


@dataclass(frozen=True)
class RateReport:
    """The rate of a model's latents and the loss of its decoder.

    draws: noise levels per sample. nats: rate per sample. bits: the rate per unit ("bits_per_pixel", ...), all samples'
    bits divided by all their units. base_bits: the same under the second stage's prior. decoder, shuffled: the
    decoder's loss in nats with the right latents, and with another sample's. use: shuffled / decoder. latents, data,
    data_shuffled: loss by noise level of the prior, and of the decoder with the right and with another sample's
    latents.
    """

    samples: int
    draws: int
    nats: MeanWithError
    bits: dict[str, MeanWithError]
    base_bits: dict[str, MeanWithError] | None
    decoder: MeanWithError
    shuffled: MeanWithError
    use: float
    latents: Curve | None
    data: Curve | None
    data_shuffled: Curve | None

    def warnings(self) -> list[str]:
        """Return signs of collapse, each with what to do. A decoder in one pass has no bias to raise."""
        warnings = []
        more = "a larger loss factor" if self.data is None else "a larger loss factor, or a higher bias"
        bits = self.bits["bits_per_latent_dimension"].mean
        if bits < FEW_BITS:
            warnings.append(
                f"collapse: the latents carry {bits:.3g} bits per dimension (below {FEW_BITS}), almost no "
                f"information; weight the decoder's loss more: {more}"
            )
        if self.use < SMALL_RATIO:
            warnings.append(
                f"collapse: with another sample's latents the decoder's loss is {self.use:.2f} times that with the "
                f"right ones (below {SMALL_RATIO}), so it hardly uses them; try {more}, or longer training"
            )
        return warnings


def rate_report(
    model: LatentModel, data: Batch, draws: int = 4, seed: int = 0, batch_size: int = 64
) -> RateReport | None:
    """Compute rates and losses at `draws` noise levels per sample; None for a model whose latents have no rate.

    data: at least two samples. All numbers are functions of (samples, seed) up to rounding, except `shuffled`, which
    also depends on the batches: samples of a batch exchange their latents. The samples are shuffled for each draw, so
    that in sorted data the other sample is any, not one of the same class.
    """
    parts: list[Costs] = []
    places: list[Tensor] = []
    n = count(data.data)
    for draw in range(draws):
        order = torch.randperm(n, generator=generator("lenders", seed, draw))
        for rows in in_batches(n, batch_size):
            indices = order[rows]
            places.append(draw * n + indices)
            streams = Streams(("costs", seed), places[-1].tolist(), model.device)
            batch = Batch(take(data.data, indices), {key: value[indices] for key, value in data.values.items()})
            costs = model.costs(batch.to(model.device), streams)
            if costs is None:
                return None
            parts.append(costs)
    order = torch.cat(places).argsort()
    by_draw = {name: _joined(parts, name, order) for name in (field.name for field in fields(Costs))}
    pieces = [unit_counts(model, Batch(take(data.data, rows), {})) for rows in in_batches(n, batch_size)]
    counts = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    averaged = {name: value.reshape(draws, -1).mean(0) for name, value in by_draw.items() if value is not None}
    decoder, shuffled = _mean(averaged["decoder"]), _mean(averaged["shuffled"])
    return RateReport(
        samples=len(averaged["rate"]),
        draws=draws,
        nats=_mean(averaged["rate"]),
        bits=_bits(averaged["rate"], counts),
        base_bits=_bits(averaged["base_rate"], counts) if "base_rate" in averaged else None,
        decoder=decoder,
        shuffled=shuffled,
        use=shuffled.mean / decoder.mean if decoder.mean > 0 else math.inf,
        latents=_curve(by_draw["latent_logsnr"], by_draw["latent_density"]),
        data=_curve(by_draw["data_logsnr"], by_draw["data_density"]),
        data_shuffled=_curve(by_draw["data_logsnr"], by_draw["shuffled_density"]),
    )


def in_batches(n: int, size: int, least: int = 2) -> Iterator[slice]:
    """Yield slices of `size` rows; the last one has at least `least`, so that fewer last rows join the slice before."""
    starts = list(range(0, n, max(size, least)))
    if n - starts[-1] < least and len(starts) > 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        yield slice(start, stop)


def by_level(logsnr: Tensor, values: Tensor, levels: int = LEVELS) -> Curve:
    """Average values (n,) by noise level (n,), in bins of equal width from the lowest to the highest."""
    low, high = float(logsnr.min()), float(logsnr.max())
    width = (high - low) / levels or 1.0
    place = ((logsnr - low) / width).floor().long().clamp(0, levels - 1)
    middles: list[float] = []
    means: list[float] = []
    errors: list[float | None] = []
    counts: list[int] = []
    for level in range(levels):
        in_bin = values[place == level].double()
        if len(in_bin):
            mean = _mean(in_bin)
            middles.append(low + (level + 0.5) * width)
            means.append(mean.mean)
            errors.append(mean.error)
            counts.append(len(in_bin))
    return Curve(middles, means, errors, counts)


def _curve(logsnr: Tensor | None, values: Tensor | None) -> Curve | None:
    return None if logsnr is None or values is None else by_level(logsnr, values)


def _joined(costs: list[Costs], name: str, order: Tensor) -> Tensor | None:
    parts = [getattr(part, name) for part in costs]
    return None if parts[0] is None else torch.cat([part.double().cpu() for part in parts])[order]


def unit_counts(model: LatentModel, batch: Batch) -> dict[str, Tensor]:
    """Return how many units of a rate each sample of a batch has, by the unit's name: (B,) float64."""
    layout = model.modality.pack(batch.data).layout
    dimensions = model.latent_layout(layout).real_tokens * model.latent_channels
    units = {**model.modality.units(layout), "latent_dimension": dimensions}
    n = count(batch.data)
    return {name: torch.as_tensor(value, dtype=torch.float64).cpu().expand(n) for name, value in units.items()}


def _bits(nats: Tensor, counts: dict[str, Tensor]) -> dict[str, MeanWithError]:
    """The bits of all samples per unit of all samples, by the unit's name; nats and counts (n,).

    The standard error is that of a ratio: of each sample's bits minus those that its units would have at the ratio.
    """
    bits = {}
    for (name, rate), each in zip(rates(nats, **counts).items(), counts.values(), strict=True):
        excess = nats / math.log(2) - rate * each
        bits[name] = MeanWithError(float(rate), _mean(excess / each.mean()).error)
    return bits


def _mean(values: Tensor) -> MeanWithError:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return MeanWithError(float(values.mean()), error)
