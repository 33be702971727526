"""Linear probes: how well ridge regression predicts known properties from latents, and from the tokens themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..maths.streams import Streams, generator
from ..methods.base import LatentModel
from ..modalities.base import Dataset, Stream
from ..types import Batch, Layout, count

FEWEST = 20
"""Fewest samples with a known value for which a probe is fitted."""
FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Candidate ridge penalties per training sample, for standardised features."""
COLUMN = "column."
"""Prefix of a column's name in the keys of a batch's values."""


@dataclass(frozen=True)
class Probe:
    """How well ridge regression predicts a property, by cross-validation: each sample from a fit to the other folds.

    name: column or condition. measure: "R^2" for numbers, "accuracy" (the share with the highest score on the true
    class) for classes. The other fields hold the measure for different features: latents: mean and sum of a sample's
    latents over its tokens. tokens: the same of the tokens that the encoder reads (for atoms: the count of each
    element). size: the number of tokens. constant: no features (0, or the share of the most frequent class).
    """

    name: str
    measure: str
    samples: int
    latents: float
    tokens: float
    size: float
    constant: float


class WithColumns(Dataset):
    """A data set that returns each sample's known numbers as values, under their names prefixed with `column.`."""

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
    """Return the data set with its columns as values, or unchanged if it has none or is a stream."""
    return WithColumns(dataset) if dataset.columns and not isinstance(dataset, Stream) else dataset


@torch.no_grad()
def probes(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> list[Probe]:
    """Return a probe for each column or class that at least 20 samples have and that is not constant over them.

    Folds are random, and a function of the seed.
    """
    latents, tokens, sizes, done = [], [], [], 0
    values: dict[str, list[Tensor]] = {}
    for batch in batches:
        wanted = _probed(batch.values)
        if not wanted:
            return []
        streams = Streams(("latents", seed), range(done, done + count(batch.data)), model.device)
        packed = model.modality.pack(batch.data)
        z = model.encode_clean(batch.data, streams)
        latents.append(_pooled(z, model.latent_layout(packed.layout)))
        tokens.append(_pooled(packed.values, packed.layout))
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
    """Return columns and class labels; a number that the model is conditioned on only where there are no columns."""
    rows = {key: value for key, value in values.items() if value.ndim == 1}
    columns = any(key.startswith(COLUMN) for key in rows)
    return {
        key: value for key, value in rows.items()
        if key.startswith(COLUMN) or not value.is_floating_point() or not columns
    }  # fmt: skip


def _pooled(values: Tensor, layout: Layout) -> Tensor:
    """Pool (B, K, D) to mean and sum over real tokens (B, 2 D); without padding to the mean alone (B, D)."""
    layout = layout.to("cpu")
    mean = layout.mean(values.double().cpu())
    return mean if layout.mask is None else torch.cat([mean, mean * layout.mask.sum(1, keepdim=True)], 1)


def _probe(name: str, value: Tensor, features: dict[str, Tensor]) -> Probe | None:
    known = value.isfinite() if value.is_floating_point() else torch.ones(len(value), dtype=torch.bool)
    value = value[known]
    if len(value) < FEWEST or len(value.unique()) < 2:
        return None
    of_classes = not value.is_floating_point()
    columns = torch.nn.functional.one_hot(value.unique(return_inverse=True)[1]) if of_classes else value[:, None]
    target = columns.double().numpy()
    shares = {}
    for source, x in features.items():
        predicted, means = cross_predictions(x[known].numpy(), target)
        shares[source] = _accuracy(target, predicted) if of_classes else r_squared(target, predicted, means)
        shares["constant"] = _accuracy(target, means) if of_classes else 0.0
    return Probe(name, "accuracy" if of_classes else "R^2", len(value), **shares)


def cross_predictions(x: np.ndarray, y: np.ndarray, folds: int = FOLDS) -> tuple[np.ndarray, np.ndarray]:
    """Predict y (N, T) from features x (N, F) by ridge regressions fitted to the other folds; sample i is in fold
    i mod `folds`. Return the predictions and, as their baseline, the mean of y over the other folds; both (N, T).

    Features and targets are standardised; the penalty minimises the leave-one-out error on the training folds.
    """
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted, means = np.empty_like(y), np.empty_like(y)
    for fold in range(folds):
        test = np.arange(len(x)) % folds == fold
        penalties = [penalty * np.sum(~test) for penalty in PENALTIES]
        ridge = make_pipeline(StandardScaler(), RidgeCV(penalties))
        model = TransformedTargetRegressor(ridge, transformer=StandardScaler())
        predicted[test] = model.fit(x[~test], y[~test]).predict(x[test])
        means[test] = y[~test].mean(0)
    return predicted, means


def r_squared(y: np.ndarray, predicted: np.ndarray, means: np.ndarray) -> float:
    """R^2 over all targets, 1 - sum (y - predicted)^2 / sum (y - means)^2: 0 is no better than the mean, 1 is exact."""
    total = float(np.square(y - means).sum())
    return 1 - float(np.square(y - predicted).sum()) / total if total else 0.0


def _accuracy(target: np.ndarray, scores: np.ndarray) -> float:
    return float((scores.argmax(1) == target.argmax(1)).mean())
