"""How latents are spread, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..maths.coding import histogram_entropy
from ..maths.spread import Spread
from ..maths.streams import Streams, generator
from ..methods.base import LatentModel
from ..types import Batch, count, move, take

BINS = 80
"""Of a histogram."""
VALUES = 2**20
"""Of a batch, at most a 64th of so many values is kept for the histogram and the entropies."""


@dataclass(frozen=True)
class LatentStatistics:
    """Of clean latents (n, K, D). std, rms, rank: as `maths.spread` has them. channel_std: (D,), of each channel over
    samples. channel_entropy: (D,), bits of each channel's values in bins of a 16th of the latents' size (rms). edges
    (BINS + 1,) and shares (BINS,): histogram of all values."""

    samples: int
    tokens: int
    channels: int
    std: float
    rms: float
    rank: float
    channel_std: list[float]
    channel_entropy: list[float]
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
        real = (z.flatten(0, 1) if mask is None else z[mask]).float().cpu()
        chosen = torch.randperm(len(real), generator=generator("histogram", seed, done))
        kept.append(real[chosen[: max(1, VALUES // 64 // real.shape[1])]])
        done, most = done + len(z), max(most, z.shape[1])
    if not done:
        raise ValueError("data: no samples to analyse; give --data with some")
    latents = torch.cat(kept)
    values = latents.flatten()
    reach = max(float(values.abs().max()), 1e-6)
    shares = torch.histc(values, BINS, -reach, reach) / len(values)
    numbers = {key: float(value) for key, value in spread.numbers().items()}
    return LatentStatistics(
        samples=done, tokens=most, channels=model.latent_channels, std=numbers["latent_std"],
        rms=numbers["latent_rms"], rank=numbers["latent_rank"],
        channel_std=spread.covariance().diagonal().clamp(min=0).sqrt().tolist(),
        channel_entropy=histogram_entropy(latents, max(numbers["latent_rms"] / 16, 1e-6)).tolist(),
        edges=torch.linspace(-reach, reach, BINS + 1).tolist(), shares=shares.tolist(),
    )  # fmt: skip


def same_layouts(model: LatentModel, data: Any) -> list[tuple[int, int]]:
    """Pairs of different samples with the same tokens real; all that follow each other where there is no padding."""
    mask = model.modality.pack(data).layout.mask
    waiting: dict[bytes, int] = {}
    pairs = []
    for row in range(count(data)):
        key = b"" if mask is None else mask[row].cpu().numpy().tobytes()
        if key in waiting:
            pairs.append((waiting.pop(key), row))
        else:
            waiting[key] = row
    return pairs


@torch.no_grad()
def interpolations(
    model: LatentModel, data: Any, steps: int = 8, seed: int = 0, most: int | None = None
) -> list[Any]:  # fmt: skip
    """For samples 0 and 1, 2 and 3, ..., or where samples have sizes of their own for each two that follow each other
    among those of a size: the first, `steps` decoded from the line between their clean latents, the second, as data of
    steps + 2 samples. All noise, of z_0 and of the decoder, is the same along a line. most: so many lines."""
    found = same_layouts(model, data)[:most]
    pairs = len(found)
    if not pairs:
        return []
    data = take(data, torch.tensor(found).flatten())
    layout = model.modality.pack(take(data, slice(0, None, 2))).layout.to(model.device)
    z = model.encode_clean(data, Streams((("latents", seed, i) for i in range(2 * pairs)), model.device))
    a, b = z[::2], z[1::2]
    eps = Streams((("line", seed, i) for i in range(pairs)), model.device).normal(*z.shape[1:])
    columns = []
    for w in torch.linspace(0, 1, steps).tolist():
        z_0 = model.path.add_noise(model.finish_latents(a + w * (b - a)), eps, 0.0)
        z_0 = model.latent_layout(layout).blank(z_0)
        columns.append(move(model.decode(z_0, layout, seed), "cpu"))
    own = [[take(data, slice(i, i + 1)) for i in range(2 * pair, 2 * pair + 2)] for pair in range(pairs)]
    lines = [[take(column, slice(pair, pair + 1)) for column in columns] for pair in range(pairs)]
    return [model.modality.join([first, *line, last]) for (first, last), line in zip(own, lines, strict=True)]
