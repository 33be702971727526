"""What can be read off the latents by a linear map, beside what can be read off the sample without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths.ridge import explained, unseen_predictions
from ..maths.streams import Streams, generator
from ..methods.base import LatentModel
from ..modalities.base import Dataset, Stream
from ..types import Batch, count

FEWEST = 20
"""Samples that a probe needs."""
FOLDS = 5
COLUMN = "column."
"""Before the name of a column, among a batch's values."""


@dataclass(frozen=True)
class Probe:
    """How well a ridge regression predicts what is known of samples, of samples that it was not fitted to.

    measure: "R^2", or of classes "accuracy", the share whose highest score is right. latents: from each sample's
    latents, mean and sum over its tokens. tokens: the same from the sample's own tokens, as the encoder gets them (of
    atoms: how many of each element). size: from how many tokens it has. constant: without looking (0, or the share of
    the commonest class).
    """

    name: str
    measure: str
    samples: int
    latents: float
    tokens: float
    size: float
    constant: float


class WithColumns(Dataset):
    """A data set that gives the numbers that are known of each sample as values, `column.` before their names."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.facts, self.columns = dataset, dataset.facts, dataset.columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        sample, values = self.dataset[index]
        return sample, values | {f"{COLUMN}{name}": value for name, value in self.dataset.numbers_of(index).items()}

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint


def with_columns(dataset: Dataset) -> Dataset:
    """With its columns as values, where it has any."""
    return WithColumns(dataset) if dataset.columns and not isinstance(dataset, Stream) else dataset


@torch.no_grad()
def probes(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> list[Probe]:
    """Of every column and class that at least 20 of the samples have, and that is not the same for all of them.

    Folds are drawn anew, and are a function of the seed.
    """
    latents, tokens, sizes, done = [], [], [], 0
    values: dict[str, list[Tensor]] = {}
    for batch in batches:
        wanted = _probed(batch.values)
        if not wanted:
            return []
        streams = Streams((("latents", seed, done + i) for i in range(count(batch.data))), model.device)
        packed = model.modality.pack(batch.data)
        z = model.encode_clean(batch.data, streams)
        latents.append(_pooled(z, model.latent_layout(packed.layout.to(z.device)).mask))
        tokens.append(_pooled(packed.values, packed.layout.mask))
        real = packed.layout.mask
        sizes.append(real.sum(1) if real is not None else torch.full((len(z),), packed.layout.num_tokens))
        for key, value in wanted.items():
            values.setdefault(key, []).append(value)
        done += len(z)
    order = torch.randperm(done, generator=generator("folds", seed))
    size = torch.cat(sizes)[:, None].double().cpu()
    features = {"latents": torch.cat(latents)[order], "tokens": torch.cat(tokens)[order], "size": size[order]}
    found = [_probe(key.removeprefix(COLUMN), torch.cat(rows).cpu()[order], features) for key, rows in values.items()]
    return [probe for probe in found if probe is not None]


def _probed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers and classes; a number that samples can be asked for only where it is not among the columns."""
    rows = {key: value for key, value in values.items() if value.ndim == 1}
    columns = any(key.startswith(COLUMN) for key in rows)
    return {
        key: value for key, value in rows.items()
        if key.startswith(COLUMN) or not value.is_floating_point() or not columns
    }  # fmt: skip


def _pooled(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, K, D) to mean and sum over what is real, (B, 2 D); the mean alone where all have as many."""
    values = values.double().cpu()
    if mask is None:
        return values.mean(1)
    real = mask.cpu()[..., None]
    total = torch.where(real, values, 0.0).sum(1)
    return torch.cat([total / real.sum(1).clamp(min=1), total], 1)


def _probe(name: str, value: Tensor, features: dict[str, Tensor]) -> Probe | None:
    known = value.isfinite() if value.is_floating_point() else torch.ones(len(value), dtype=torch.bool)
    own = value[known]
    if len(own) < FEWEST or len(own.unique()) < 2:
        return None
    of_classes = not value.is_floating_point()
    target = torch.nn.functional.one_hot(own.unique(return_inverse=True)[1]) if of_classes else own[:, None]
    shares = {}
    for of, x in features.items():
        predicted, means = unseen_predictions(x[known], target.double(), FOLDS)
        shares[of] = _accuracy(target, predicted) if of_classes else explained(target, predicted, means)
        shares["constant"] = _accuracy(target, means) if of_classes else 0.0
    return Probe(name, "accuracy" if of_classes else "R^2", len(own), **shares)


def _accuracy(target: Tensor, scores: Tensor) -> float:
    return float((scores.argmax(1) == target.argmax(1)).double().mean())
