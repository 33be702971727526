"""What each layer of a model knows of its samples' classes: k nearest neighbours and linear probes, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maths.streams import Streams, generator
from ..methods.base import LatentModel
from ..nets.activations import record
from ..types import Batch, count
from .probes import cross_predictions

NEIGHBOURS = 10
NOISE = 0.1
"""Noise level at which latents are denoised: nearly clean ones."""
FEWEST = 50


@dataclass(frozen=True)
class LayerAccuracy:
    """Accuracy of classes read from each block's activations, the mean over a sample's latents.

    name: the condition. knn: share of samples whose 10 nearest others by cosine, weighted alike, are mostly of their
    class. linear: accuracy of ridge regressions by cross-validation (`probes`). Both for the blocks of the tokenise
    pass and of the denoise pass (unconditional, at t = 0.1). latents: the same of the latents. constant: the share
    of the most frequent class.
    """

    name: str
    samples: int
    knn: dict[str, list[float]]
    linear: dict[str, list[float]]
    latents: dict[str, float]
    constant: float


@torch.no_grad()
def layer_accuracy(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> LayerAccuracy | None:
    """Measure it; None without classes, with fewer than 50 samples, or without blocks (`LatentModel.passes`)."""
    features: dict[str, list[list[Tensor]]] = {"tokenise": [], "denoise": []}
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    name, done = "", 0
    for batch in batches:
        classes = {
            key: value for key, value in batch.values.items() if value.ndim == 1 and not value.is_floating_point()
        }
        layout = model.modality.pack(batch.data).layout.to(model.device)
        passes = model.passes(layout)
        if passes is None or not classes:
            return None
        name, values = next(iter(classes.items()))
        labels.append(values.cpu())
        names = {id(module): place for place, module in model.named_modules()}
        streams = Streams(("layers", seed), range(done, done + count(batch.data)), model.device)
        latent = model.latent_layout(layout)
        k = latent.num_tokens
        for kind, which in zip(features, passes, strict=True):
            with record(model, *(names[id(block)] for block in which.blocks)) as found:
                if kind == "tokenise":
                    z = model.encode_clean(batch.data, streams)
                else:
                    noisy = model.path.add_noise(z, model.latent_noise(streams, k).to(z), NOISE)
                    model.denoise(noisy, NOISE, model.conditions.null(len(z)), latent)
            outputs = [which.latents_of(found[names[id(block)]][-1], k).float() for block in which.blocks]
            features[kind].append([latent.mean(h).cpu() for h in outputs])
        latents.append(latent.mean(z.float()).cpu())
        done += len(z)
    y = torch.cat(labels) if labels else torch.zeros(0)
    if len(y) < FEWEST or len(y.unique()) < 2:
        return None
    order = torch.randperm(len(y), generator=generator("folds", seed))
    y = y[order]

    def accuracies(parts: list[Tensor]) -> tuple[float, float]:
        x = torch.cat(parts)[order]
        return knn_accuracy(x, y), linear_accuracy(x, y)

    by_block = {
        kind: [accuracies([batch[block] for batch in parts]) for block in range(len(parts[0]))]
        for kind, parts in features.items()
    }
    own = accuracies(latents)
    return LayerAccuracy(
        name, len(y), {kind: [a for a, _ in found] for kind, found in by_block.items()},
        {kind: [b for _, b in found] for kind, found in by_block.items()}, {"knn": own[0], "linear": own[1]},
        float(y.unique(return_counts=True)[1].max()) / len(y),
    )  # fmt: skip


def knn_accuracy(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of samples x (n, D) with the class y (n,) that most of their nearest others by cosine have."""
    x = F.normalize(x.double() - x.double().mean(0), dim=1)
    similar = (x @ x.T).fill_diagonal_(-torch.inf)
    nearest = similar.topk(min(neighbours, len(x) - 1), dim=1).indices  # (n, k)
    votes = F.one_hot(y.unique(return_inverse=True)[1])[nearest].sum(1)  # (n, classes)
    return float((votes.argmax(1) == y.unique(return_inverse=True)[1]).double().mean())


def linear_accuracy(x: Tensor, y: Tensor) -> float:
    """Return the accuracy of ridge regressions of classes y (n,) on x (n, D), by cross-validation."""
    target = F.one_hot(y.unique(return_inverse=True)[1]).double().numpy()
    predicted, _ = cross_predictions(x.double().numpy(), target)
    return float((predicted.argmax(1) == target.argmax(1)).mean())
