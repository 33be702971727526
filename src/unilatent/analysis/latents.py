"""Statistics of latents, and interpolations between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths.coding import histogram_entropy
from ..maths.spread import Spread
from ..maths.streams import Streams, generator
from ..methods.base import LatentModel
from ..types import Batch, Layout, count, move, take

BINS = 80
"""Bins of the histogram."""
VALUES = 2**20
"""The histogram and the entropies use at most a 64th of this many values per batch."""


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of clean latents (n, K, D).

    std, rms, rank: `latent_std`, `latent_rms` and `latent_rank` of `maths.spread`. channel_std (D,): each channel over
    samples. channel_entropy (D,): bits per value of each channel, in bins of 1/16 of `rms`. edges (BINS + 1,), shares
    (BINS,): histogram of all values.
    """

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
    """Compute statistics of the encoder's output, without the noise that `encode` may add."""
    spread = Spread(model.max_latents, model.latent_channels, model.device)
    values_used, done, most = [], 0, 0
    for batch in batches:
        streams = Streams(("latents", seed), range(done, done + count(batch.data)), model.device)
        z = model.encode_clean(batch.data, streams)
        mask = model.latent_layout(model.modality.pack(batch.data).layout.to(z.device)).mask
        spread.add(z, mask)
        real = (z.flatten(0, 1) if mask is None else z[mask]).float().cpu()
        chosen = torch.randperm(len(real), generator=generator("histogram", seed, done))
        values_used.append(real[chosen[: max(1, VALUES // 64 // real.shape[1])]])
        done, most = done + len(z), max(most, z.shape[1])
    if not done:
        raise ValueError("data: no samples to analyse; give --data with held-out samples")
    latents = torch.cat(values_used)
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


@torch.no_grad()
def decode_clean(
    model: LatentModel, z: Tensor, layout: Layout, eps: Tensor, seed: int = 0, start: int = 0
) -> Any:  # fmt: skip
    """Decode clean latents (B, K, D), to Data on the CPU. eps: the noise (B, K, D) of z_0, which `decode` expects.

    layout: of the data tokens, on the model's device. seed, start: as for `LatentModel.decode`.
    """
    z_0 = model.latent_layout(layout).blank(model.path.add_noise(z, eps, 0.0))
    return move(model.decode(z_0, layout, seed=seed, start=start), "cpu")


def same_layouts(model: LatentModel, data: Any) -> list[tuple[int, int]]:
    """Return disjoint pairs of samples with equal masks; without padding, samples 0 and 1, 2 and 3, ..."""
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
    """Interpolate linearly between the clean latents of the pairs of `same_layouts`, at most `most` of them.

    Each row is Data of steps + 2 samples: the first, `steps` decoded interpolations, the second. The noise of z_0 and
    of the decoder is the same along a row.
    """
    indices = same_layouts(model, data)[:most]
    pairs = len(indices)
    if not pairs:
        return []
    data = take(data, torch.tensor(indices).flatten())
    layout = model.modality.pack(take(data, slice(0, None, 2))).layout.to(model.device)
    z = model.encode_clean(data, Streams(("latents", seed), range(2 * pairs), model.device))
    a, b = z[::2], z[1::2]
    eps = Streams(("line", seed), range(pairs), model.device).normal(*z.shape[1:])
    columns = []
    for w in torch.linspace(0, 1, steps).tolist():
        columns.append(decode_clean(model, model.finish_latents(a + w * (b - a)), layout, eps, seed))
    ends = [[take(data, slice(i, i + 1)) for i in range(2 * pair, 2 * pair + 2)] for pair in range(pairs)]
    lines = [[take(column, slice(pair, pair + 1)) for column in columns] for pair in range(pairs)]
    return [model.modality.join([first, *line, last]) for (first, last), line in zip(ends, lines, strict=True)]
