"""Judges that need no download: they know the real pictures' pixels, never the model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...maths.frechet import frechet_distance_of
from ...maths.streams import generator
from ..base import Evidence, Metric, Row
from .render import to_uint8

MAX_VALUES = 3072
"""Largest C * H * W (32 x 32 RGB) at which distances between raw pixels still say something."""
MAX_JUDGED_VALUES = 1024
"""Largest C * H * W (32 x 32 grey) that the kernel classifier is asked about: natural pictures are beyond it."""
MAX_TRAINING = 5_000
"""Most training pictures that it is fitted to."""
NOISE = 0.2


class Reconstruction(Metric):
    """PSNR of held-out pictures through the tokenizer, beside predicting the training pictures' mean for each."""

    def __call__(self, evidence: Evidence) -> list[Row]:
        held_out = evidence.held_out[0]
        if len(held_out) == 0:
            return []
        mean = evidence.train[0].float().mean(0, keepdim=True)
        beside = {"training mean picture": float(psnr(mean.expand_as(held_out), held_out).mean())}
        value = psnr(evidence.reconstructions, held_out).mean()
        return [Row("PSNR of held-out reconstructions", float(value), "dB", "higher", beside)]


class Judge(Metric):
    """Generated pictures against real ones: a classifier, spread, distances. Silent where pixels cannot tell."""

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, held_out, samples = (_flat(part[0]) for part in (evidence.train, evidence.held_out, evidence.samples))
        if train.shape[1] > MAX_VALUES or min(len(train), len(held_out), len(samples)) < 2:
            return []
        if not samples.isfinite().all():
            raise ValueError("samples: some hold NaN or infinity; the model that made them has diverged")
        labels = [_labels(part[1]) for part in (evidence.train, evidence.held_out, evidence.samples)]
        train_labels, held_out_labels, asked = labels
        rows = []
        if train_labels is not None and held_out_labels is not None and asked is not None:
            small = len(train) <= MAX_TRAINING and train.shape[1] <= MAX_JUDGED_VALUES
            if small and len(train_labels.unique()) > 1:
                rows += recognition(train, train_labels, held_out, held_out_labels, samples, asked)
            rows += spread(train, train_labels, samples, asked)
        rows.append(_frechet_row(train, train_labels, held_out, samples, asked))
        rows.append(_nearest_row(train, held_out, samples))
        pairs = {"held-out real": float(identical_pairs(held_out))}
        rows.append(Row("identical pairs among samples", float(identical_pairs(samples)), "", "lower", pairs))
        return rows


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) of each picture (B, C, H, W), in dB, (B,); identical pictures get 100."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def recognition(
    train: Tensor, train_labels: Tensor, held_out: Tensor, held_out_labels: Tensor, samples: Tensor, asked: Tensor
) -> list[Row]:
    """What a support vector machine, fitted to real training pixels (N, D), says of held-out and generated ones."""
    from sklearn.svm import SVC

    judge = SVC(C=10, kernel="rbf", gamma="scale").fit(train.numpy(), train_labels.numpy())
    real = 100 * float((judge.predict(held_out.numpy()) == held_out_labels.numpy()).mean())
    agreed = 100 * float((judge.predict(samples.numpy()) == asked.numpy()).mean())
    return [
        Row("judge accuracy on held-out real", real, "%"),
        Row("recognised as the class asked for", agreed, "%", "higher", {"held-out real": real}),
    ]


def spread(train: Tensor, train_labels: Tensor, samples: Tensor, asked: Tensor) -> list[Row]:
    """How much samples of one class differ, relative to real ones; no row where no class has two of both."""
    classes = [c for c in asked.unique() if (asked == c).sum() > 1 and (train_labels == c).sum() > 1]
    real = within_class_std(train, train_labels, classes) if classes else 0.0
    if real == 0:
        return []
    value = 100 * within_class_std(samples, asked, classes) / real
    return [Row("within-class std / real", value, "%", "same", {"real": 100.0})]


def within_class_std(pixels: Tensor, labels: Tensor, classes: list[Tensor]) -> float:
    """Mean over classes of the root mean square, over pixels, of the std over a class's samples (N, D)."""
    return float(torch.stack([pixels[labels == c].double().var(0).mean().sqrt() for c in classes]).mean())


def identical_pairs(pixels: Tensor) -> int:
    """How many pairs of rows (N, D) are the same picture once written with 8 bits."""
    levels = torch.from_numpy(to_uint8(pixels[:, None, None])[:, 0, :, 0].copy())
    counts = levels.unique(dim=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def nearest_distance(pixels: Tensor, others: Tensor) -> float:
    """Mean over rows (N, D) of the Euclidean distance to the nearest row of `others`, in float64."""
    others = others.double()
    nearest = [torch.cdist(part.double(), others).amin(1) for part in pixels.split(256)]
    return float(torch.cat(nearest).mean())


def _frechet_row(
    train: Tensor, train_labels: Tensor | None, held_out: Tensor, samples: Tensor, asked: Tensor | None
) -> Row:
    """Generated and three stand-ins of as many pictures, each against held-out real ones."""
    some = train[torch.randperm(len(train), generator=generator("judge", "subset"))[: len(samples)]]
    noise = torch.randn(some.shape, generator=generator("judge", "noise"))
    beside = {"real train vs real": frechet_distance_of(some, held_out)}
    if train_labels is not None and asked is not None and torch.isin(asked, train_labels).all():
        means = {int(c): train[train_labels == c].mean(0) for c in asked.unique()}
        copies = torch.stack([means[int(c)] for c in asked])
        beside["class means"] = frechet_distance_of(copies, held_out)
    beside[f"train + noise {NOISE}"] = frechet_distance_of(some + NOISE * noise, held_out)
    return Row("Frechet distance (raw pixels)", frechet_distance_of(samples, held_out), "", "lower", beside)


def _nearest_row(train: Tensor, held_out: Tensor, samples: Tensor) -> Row:
    beside = {"held-out real": nearest_distance(held_out, train)}
    return Row("nearest training picture, distance", nearest_distance(samples, train), "", "same", beside)


def _flat(data: Tensor) -> Tensor:
    return data.detach().float().cpu().flatten(1)  # (B, D)


def _labels(values: dict[str, Tensor]) -> Tensor | None:
    return values["labels"].detach().cpu() if "labels" in values else None
