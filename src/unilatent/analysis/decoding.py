"""How latents decode: with noise on them, on the way of a sample from noise to data, and near each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..sampling import Watch, computing, sample_batches
from ..types import Batch, count, move, take
from .latents import decode_clean

NOISES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Noise added to latents, as a multiple of their root mean square."""
COLUMNS = 8
"""Moments of a trajectory that are drawn."""
NEAREST = 5


@dataclass(frozen=True)
class Sensitivity:
    """Errors of reconstructions from latents with noise: z + noise rms eps, means over samples.

    noises: multiples of the root mean square of the sample's latents. errors: by `Modality.errors`, one value a noise.
    """

    samples: int
    noises: tuple[float, ...]
    errors: dict[str, list[float]]


@torch.no_grad()
def sensitivity(model: LatentModel, data: Any, seed: int = 0, batch_size: int = 64) -> Sensitivity:
    """Decode held-out samples' latents with more and more noise on them."""
    totals: dict[str, Tensor] = {}
    n = count(data)
    for start in range(0, n, batch_size):
        batch = take(data, slice(start, start + batch_size))
        layout = model.modality.pack(batch).layout.to(model.device)
        z = model.encode(batch, seed=seed, start=start)
        latents = model.latent_layout(layout)
        rms = latents.mean(z.square()).mean(1)[:, None, None].sqrt()  # of each sample's latents
        eps = Streams(("sensitivity", seed), range(start, start + len(z)), model.device).normal(*z.shape[1:]).to(z)
        for place, noise in enumerate(NOISES):
            made = move(model.decode(latents.blank(z + noise * rms * eps), layout, seed=seed, start=start), "cpu")
            for key, values in model.modality.errors(made, batch).items():
                totals.setdefault(key, torch.zeros(len(NOISES), dtype=torch.float64))[place] += sum(values)
    return Sensitivity(n, NOISES, {key: (total / n).tolist() for key, total in totals.items()})


@dataclass(frozen=True)
class Trajectory:
    """Clean estimates on the way from noise to latents: at times t, the mean over samples of |estimate - last|^2 /
    |last|^2, and how far each step moved the estimate in the same measure (0 at first)."""

    times: list[float]
    distance: list[float]
    moved: list[float]


@torch.no_grad()
def trajectory(
    model: LatentModel, num: int, seed: int = 0, *, start: int = 0, most: int = COLUMNS, precision: str = "auto",
    watch: Watch | None = None, **settings: Any,
) -> tuple[Trajectory, list[Any]]:  # fmt: skip
    """Draw samples `start` to `start + num` as `sample` does; return how their estimates settle, and the decoded
    estimates at up to `most` evenly spaced evaluations, each `num` rows of Data on the CPU. Of restarts only the
    steps that come lower than all before are shown.

    settings: as for `sample`; default: the model's own.
    """
    found: list[tuple[float, Tensor]] = []
    again = False  # since noise was added the last time, no step has come lower

    def note(t: float, estimate: Tensor) -> None:
        nonlocal again
        lowest = found[-1][0] if found else math.inf
        again = t > lowest or (again and t == lowest)
        if not again:
            found.append((t, estimate))
        if watch is not None:
            watch(t, estimate)

    batches = sample_batches(
        model, start + num, seed=seed, batch_size=num, start=start, precision=precision, watch=note, **settings
    )  # fmt: skip
    batch = next(batches)
    layout, last = batch.layout.to(model.device), batch.latents.to(model.device)
    size = last.square().sum((1, 2))
    distance = [float(((e - last).square().sum((1, 2)) / size).mean()) for _, e in found]
    steps = [0.0, *(float(((b - a).square().sum((1, 2)) / size).mean()) for (_, a), (_, b) in zip(found, found[1:]))]  # noqa: B905, RUF007
    eps = Streams(("trajectory", seed), range(start, start + num), model.device).normal(*last.shape[1:])
    columns = []
    for i in torch.linspace(0, len(found) - 1, min(most, len(found))).round().int().tolist():
        with computing(model, precision):
            columns.append(decode_clean(model, found[i][1], layout, eps, seed, start))
    return Trajectory([t for t, _ in found], distance, steps), columns


@torch.no_grad()
def nearest_latents(
    model: LatentModel, batch: Batch, queries: int, seed: int = 0, batch_size: int = 64
) -> list[Any]:  # fmt: skip
    """Return rows of Data: each of the first `queries` samples, then the samples of the batch whose latents are nearest
    to its own (Euclidean, the mean over a sample's latents where samples have different numbers of them)."""
    data = batch.data
    parts = []
    for start in range(0, count(data), batch_size):
        part = take(data, slice(start, start + batch_size))
        streams = Streams(("latents", seed), range(start, start + count(part)), model.device)
        z = model.encode_clean(part, streams).double()
        latents = model.latent_layout(model.modality.pack(part).layout.to(z.device))
        parts.append(z.flatten(1) if latents.mask is None else latents.mean(z))
    flat = torch.cat(parts)
    distance = torch.cdist(flat[:queries], flat)
    distance[torch.arange(len(distance)), torch.arange(len(distance))] = torch.inf
    nearest = distance.topk(min(NEAREST, len(flat) - 1), dim=1, largest=False).indices.cpu()
    rows = torch.cat([torch.arange(len(nearest))[:, None], nearest], dim=1)
    return [take(data, row) for row in rows]
