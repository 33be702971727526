"""Bits of the latents, loss by noise level, and whether the decoder looks at its latents at all."""

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
"""Bins of log-SNR."""
FEW_BITS = 0.1
SMALL_RATIO = 1.2
"""Fewer bits for each latent dimension, or a decoder that loses less without its latents, are a collapse. (The paper's
collapsed ablation, Table 6 B, still had 0.064.)"""


@dataclass(frozen=True)
class Mean:
    """Over samples, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Curve:
    """Nats for each unit of log-SNR, in bins of it that hold samples. logsnr, mean, error, count: one for each bin."""

    logsnr: list[float]
    mean: list[float]
    error: list[float]
    count: list[int]


@dataclass(frozen=True)
class RateReport:
    """nats: a sample's. bits: the same by its three normalisers ("bits_per_pixel", ...); base_bits: under the second
    stage's network. decoder, shuffled: the decoder's loss in nats, given a sample's own latents and another's; use: the
    second over the first. latents, data, data_shuffled: loss by noise level. draws: noise levels for each sample."""

    samples: int
    draws: int
    nats: Mean
    bits: dict[str, Mean]
    base_bits: dict[str, Mean] | None
    decoder: Mean
    shuffled: Mean
    use: float
    latents: Curve | None
    data: Curve | None
    data_shuffled: Curve | None

    def warnings(self) -> list[str]:
        """Signs of collapse, each with what to do about it; a decoder in one pass has no bias to raise."""
        found = []
        more = "a larger loss factor" if self.data is None else "a larger loss factor, or a higher bias"
        bits = self.bits["bits_per_latent_dimension"].mean
        if bits < FEW_BITS:
            found.append(
                f"collapse: the latents carry {bits:.3g} bits a dimension (below {FEW_BITS}), next to nothing of a "
                f"sample; weigh the decoder's loss more: {more}"
            )
        if self.use < SMALL_RATIO:
            found.append(
                f"collapse: with another sample's latents the decoder loses {self.use:.2f} times as much as with the "
                f"right ones (below {SMALL_RATIO}), so it hardly looks at them; try {more}, "
                "or longer training"
            )
        return found


def rate_report(
    model: LatentModel, data: Batch, draws: int = 4, seed: int = 0, batch_size: int = 64
) -> RateReport | None:
    """Every sample at `draws` noise levels of its own; None for a model whose latents have no rate.

    data: at least two samples. Every number is a function of (samples, seed), rounding aside, but `shuffled`, where
    batch mates lend each other their latents: they meet in an order drawn anew for each draw, so that in sorted data
    a lender is any other sample and not one of the same kind.
    """
    found: list[Costs] = []
    places: list[Tensor] = []
    n = count(data.data)
    for draw in range(draws):
        order = torch.randperm(n, generator=generator("lenders", seed, draw))
        for rows in in_batches(n, batch_size):
            own = order[rows]
            places.append(draw * n + own)
            streams = Streams((("costs", seed, i) for i in places[-1].tolist()), model.device)
            batch = Batch(take(data.data, own), {key: value[own] for key, value in data.values.items()})
            costs = model.costs(batch.to(model.device), streams)
            if costs is None:
                return None
            found.append(costs)
    order = torch.cat(places).argsort()
    both = {name: _joined(found, name, order) for name in (field.name for field in fields(Costs))}
    kinds = {**model.modality.units, "latent_dimension": model.max_latents * model.latent_channels}
    whole = {name: value.reshape(draws, -1).mean(0) for name, value in both.items() if value is not None}
    decoder, shuffled = _mean(whole["decoder"]), _mean(whole["shuffled"])
    return RateReport(
        samples=len(whole["rate"]),
        draws=draws,
        nats=_mean(whole["rate"]),
        bits=_bits(whole["rate"], kinds),
        base_bits=_bits(whole["base_rate"], kinds) if "base_rate" in whole else None,
        decoder=decoder,
        shuffled=shuffled,
        use=shuffled.mean / decoder.mean if decoder.mean > 0 else math.inf,
        latents=_curve(both["latent_logsnr"], both["latent_density"]),
        data=_curve(both["data_logsnr"], both["data_density"]),
        data_shuffled=_curve(both["data_logsnr"], both["shuffled_density"]),
    )


def in_batches(n: int, size: int) -> Iterator[slice]:
    """Rows of parts of at least two samples: a last one alone joins the part before."""
    starts = list(range(0, n, max(size, 2)))
    if n - starts[-1] < 2 and len(starts) > 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        yield slice(start, stop)


def by_level(logsnr: Tensor, values: Tensor, levels: int = LEVELS) -> Curve:
    """Values (n,) by noise level (n,), in bins of equal width from the least to the greatest."""
    low, high = float(logsnr.min()), float(logsnr.max())
    width = (high - low) / levels or 1.0
    place = ((logsnr - low) / width).floor().long().clamp(0, levels - 1)
    middles, means, errors, counts = [], [], [], []
    for level in range(levels):
        own = values[place == level].double()
        if len(own):
            mean = _mean(own)
            middles.append(low + (level + 0.5) * width)
            means.append(mean.mean)
            errors.append(mean.error)
            counts.append(len(own))
    return Curve(middles, means, errors, counts)


def _curve(logsnr: Tensor | None, values: Tensor | None) -> Curve | None:
    return None if logsnr is None or values is None else by_level(logsnr, values)


def _joined(costs: list[Costs], name: str, order: Tensor) -> Tensor | None:
    parts = [getattr(part, name) for part in costs]
    return None if parts[0] is None else torch.cat([part.double().cpu() for part in parts])[order]


def _bits(nats: Tensor, kinds: dict[str, int]) -> dict[str, Mean]:
    return {name: _mean(value) for name, value in rates(nats, **kinds).items()}


def _mean(values: Tensor) -> Mean:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(float(values.mean()), error)
