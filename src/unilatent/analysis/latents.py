"""How latents are spread, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..maths.spread import Spread
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..types import Batch, count, move, take

BINS = 80
"""Of a histogram."""
VALUES = 2**20
"""At most about so many values are kept for a histogram."""


@dataclass(frozen=True)
class LatentStatistics:
    """Of clean latents (n, K, D). std, rms, rank: as `maths.spread` has them. channel_std: (D,), of each channel over
    samples. edges (BINS + 1,) and shares (BINS,): histogram of all values."""

    samples: int
    tokens: int
    channels: int
    std: float
    rms: float
    rank: float
    channel_std: list[float]
    edges: list[float]
    shares: list[float]


@torch.no_grad()
def latent_statistics(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> LatentStatistics:
    """Of what the encoder gives for these samples, without the noise that `encode` may add."""
    spread = Spread(model.max_latents, model.latent_channels, model.device)
    kept, done, most = [], 0, 0
    for batch in batches:
        streams = Streams((("latents", seed, done + i) for i in range(count(batch.data))), model.device)
        z = model.encode_clean(batch.data, streams)
        mask = model.latent_layout(model.modality.pack(batch.data).layout.to(z.device)).mask
        spread.add(z, mask)
        values = (z if mask is None else z[mask]).flatten().float().cpu()
        kept.append(values[:: max(1, values.numel() // (VALUES // 64))])
        done, most = done + len(z), max(most, z.shape[1])
    if not done:
        raise ValueError("data: no samples to analyse; give --data with some")
    values = torch.cat(kept)
    reach = max(float(values.abs().max()), 1e-6)
    shares = torch.histc(values, BINS, -reach, reach) / len(values)
    numbers = {key: float(value) for key, value in spread.numbers().items()}
    return LatentStatistics(
        samples=done, tokens=most, channels=model.latent_channels, std=numbers["latent_std"],
        rms=numbers["latent_rms"], rank=numbers["latent_rank"],
        channel_std=spread.covariance().diagonal().clamp(min=0).sqrt().tolist(),
        edges=torch.linspace(-reach, reach, BINS + 1).tolist(), shares=shares.tolist(),
    )  # fmt: skip


@torch.no_grad()
def interpolations(model: LatentModel, data: Any, steps: int = 8, seed: int = 0) -> list[Any]:
    """For samples 0 and 1, 2 and 3, ...: the first, `steps` decoded from the line between their clean latents, the
    second, as data of steps + 2 samples. All noise, of z_0 and of the decoder, is the same along a line. Empty where
    samples have sizes of their own."""
    rows: list[Any] = []
    weights = torch.linspace(0, 1, steps).tolist()
    for pair in range(count(data) // 2):
        both = take(data, slice(2 * pair, 2 * pair + 2))
        layout = model.modality.pack(both).layout
        if layout.mask is not None:
            return []  # between samples of two sizes there is none
        streams = Streams((("latents", seed, i) for i in (2 * pair, 2 * pair + 1)), model.device)
        a, b = model.encode_clean(both, streams).split(1)
        eps = streams.normal(*a.shape[1:])[:1]
        made = [
            model.decode(model.path.add_noise(model.finish_latents(a + w * (b - a)), eps, 0.0), layout, seed, pair)
            for w in weights
        ]
        rows.append(
            model.modality.join(
                [move(part, "cpu") for part in (take(both, slice(0, 1)), *made, take(both, slice(1, 2)))]
            )
        )
    return rows
