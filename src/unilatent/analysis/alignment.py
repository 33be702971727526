"""How alike a model's two passes are, layer by layer: making latents of data, and denoising them (UNITE, Sec. 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths.similarity import LinearCKA, cknna, gram, hsic
from ..maths.streams import Streams
from ..methods.base import LatentModel, LatentPass
from ..nets.activations import record
from ..types import Batch, Layout, count

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels t (0 clean, 1 noise) at which latents are denoised."""
NEIGHBOURS = 10
MOST = 2000
"""CKNNA compares at most so many samples: its kernels have their square."""


@dataclass(frozen=True)
class Alignment:
    """Similarity of the activations of the latents in both passes, over samples.

    levels: noise levels t of the denoised latents. cka: at each level, linear CKA of each block of the tokenise pass
    (rows) with each of the denoise pass (columns). cknna: at each level, CKNNA of block i with block i. shared: whether
    both passes are of the same weights.
    """

    samples: int
    neighbours: int
    levels: tuple[float, ...]
    cka: list[list[list[float]]]
    cknna: list[list[float]]
    shared: bool

    @property
    def mean_cka(self) -> list[float]:
        """At each level, the mean over blocks i of the CKA of block i with block i."""
        return [sum(_diagonal(level)) / len(_diagonal(level)) for level in self.cka]


def _diagonal(matrix: Sequence[Sequence[float]]) -> list[float]:
    return [row[i] for i, row in enumerate(matrix) if i < len(row)]


@torch.no_grad()
def alignment(
    model: LatentModel, batches: Iterable[Batch], seed: int = 0, levels: Sequence[float] = LEVELS
) -> Alignment | None:
    """Compare both passes on the same samples; None if their blocks have no tokens in common (`LatentModel.passes`).

    CKA is of the activations of a sample's latents, one after the other, or of their mean where samples have different
    numbers of them; CKNNA of their mean. The denoise pass is unconditional and reads z_t = alpha z + sigma eps. Batches
    of fewer than four samples are refused by `hsic`.
    """
    ckas: list[list[list[LinearCKA]]] = []
    kept: list[tuple[list[Tensor], list[list[Tensor]]]] = []  # of CKNNA: means over latents
    done = shared = 0
    for batch in batches:
        layout = model.modality.pack(batch.data).layout.to(model.device)
        both = model.passes(layout)
        if both is None:
            return None
        shared = both[0].blocks[0] is both[1].blocks[0]
        made, denoised = _features(model, batch, layout, both, range(done, done + count(batch.data)), seed, levels)
        first, second = [_Gram.of(h) for h in made], [[_Gram.of(h) for h in level] for level in denoised]
        ckas = ckas or [[[LinearCKA() for _ in level] for _ in first] for level in second]
        for table, level in zip(ckas, second, strict=True):
            for row, a in zip(table, first, strict=True):
                for cka, b in zip(row, level, strict=True):
                    cka.add(a.values, b.values, a.own, b.own)
        if done < MOST:
            kept.append(([h.mean for h in made], [[h.mean for h in level] for level in denoised]))
        done += count(batch.data)
    if not kept:
        raise ValueError("data: no samples to analyse; give --data with held-out samples")
    used = min(done, MOST)
    neighbours = min(NEIGHBOURS, used - 1)
    blocks = min(len(kept[0][0]), len(kept[0][1][0]))

    def joined(block: int, level: int | None) -> Tensor:
        parts = [made[block] if level is None else denoised[level][block] for made, denoised in kept]
        return torch.cat(parts)[:MOST]

    near = [[cknna(joined(i, None), joined(i, k), neighbours) for i in range(blocks)] for k in range(len(levels))]
    values = [[[cka.value for cka in row] for row in table] for table in ckas]
    return Alignment(done, neighbours, tuple(levels), values, near, bool(shared))


@dataclass(frozen=True)
class _Features:
    """Activations of a block: all of a sample's (n, D), and their mean over its latents (n, H)."""

    all: Tensor
    mean: Tensor


@dataclass(frozen=True)
class _Gram:
    """The kernel of a batch's features, and its HSIC with itself."""

    values: Tensor
    own: Tensor

    @classmethod
    def of(cls, features: _Features) -> _Gram:
        values = gram(features.all).cpu()
        return cls(values, hsic(values, values))


def _features(
    model: LatentModel, batch: Batch, layout: Layout, both: tuple[LatentPass, LatentPass], rows: range, seed: int,
    levels: Sequence[float],
) -> tuple[list[_Features], list[list[_Features]]]:  # fmt: skip
    """Return the features of each block of the first pass, and at each level of each block of the second."""
    names = {id(module): name for name, module in model.named_modules()}
    latents = model.latent_layout(layout)
    k = latents.num_tokens
    streams = Streams(("alignment", seed), rows, model.device)

    def of(which: LatentPass, activations: dict[str, list[Tensor]]) -> list[_Features]:
        found = [which.latents_of(activations[names[id(block)]][-1], k) for block in which.blocks]
        return [_flat(h.float(), latents) for h in found]

    with record(model, *(names[id(block)] for block in both[0].blocks)) as activations:
        z = model.encode_clean(batch.data, streams)
    made = of(both[0], activations)
    eps, cond = model.latent_noise(streams, k).to(z), model.conditions.null(len(rows))
    denoised = []
    for t in levels:
        with record(model, *(names[id(block)] for block in both[1].blocks)) as activations:
            model.denoise(model.path.add_noise(z, eps, t), t, cond, latents)
        denoised.append(of(both[1], activations))
    return made, denoised


def _flat(h: Tensor, layout: Layout) -> _Features:
    """(B, K, H) to features of a sample; both are the mean where samples have different numbers of latents."""
    mean = layout.mean(h)
    return _Features(h.flatten(1) if layout.mask is None else mean, mean.cpu())
