"""How latents decode: with noise on them, on the way of a sample from noise to data, and near each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths import times
from ..maths.solvers import ending_clean, find_solver
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..sampling import guided_denoiser
from ..types import Batch, Conditioning, count, move, take

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
def trajectory(model: LatentModel, num: int, seed: int = 0) -> tuple[Trajectory, list[Any]]:
    """Draw `num` samples with the model's own settings; return how their estimates settle, and the decoded estimates at
    evenly spaced evaluations, each `num` rows of Data on the CPU."""
    settings = model.config.sampling
    streams = Streams(("sample", seed), range(num), model.device)
    values = move(model.conditions.parse(num, {}), model.device)
    layout = model.modality.sample_layout(streams, values).to(model.device)
    latents = model.latent_layout(layout)
    cond = model.conditions(values) if values else model.conditions.null(num)
    denoise = guided_denoiser(model, cond, model.conditions.null(num, values), latents, settings, Counter())
    found: list[tuple[float, Tensor]] = []

    def watched(z: Tensor, t: float, _: Conditioning | None = None) -> Tensor:
        estimate = denoise(z, t)
        found.append((t, latents.blank(estimate)))
        return estimate

    def noise() -> Tensor:
        return model.latent_noise(streams, latents.num_tokens).to(model.device)

    grid = times.grid(settings.num_inference_steps, settings.time_shift)
    solver = find_solver(settings.solver)
    solver = ending_clean(solver) if settings.denoise_to_zero else solver
    last = latents.blank(solver(watched, noise(), grid, model.path, noise))
    size = last.square().sum((1, 2))
    distance = [float(((e - last).square().sum((1, 2)) / size).mean()) for _, e in found]
    steps = [0.0, *(float(((b - a).square().sum((1, 2)) / size).mean()) for (_, a), (_, b) in zip(found, found[1:]))]  # noqa: B905, RUF007
    shown = torch.linspace(0, len(found) - 1, min(COLUMNS, len(found))).round().int().tolist()
    columns = [move(model.decode(found[i][1], layout, seed=seed), "cpu") for i in shown]
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
