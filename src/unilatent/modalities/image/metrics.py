"""Judges that need no download: they know the real pictures' pixels, never the model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...maths.frechet import frechet_distance_of
from ...maths.streams import generator
from ..base import Evidence, Metric, Row

MAX_VALUES = 3072
"""Largest C * H * W (32 x 32 RGB) at which distances between raw pixels still say something."""
MAX_JUDGED_VALUES = 1024
"""Largest C * H * W (32 x 32 grey) that the kernel classifier is asked about: natural pictures are beyond it."""
MAX_ROWS = 20_000
"""Most real pictures of a set that are compared pixel by pixel."""
MAX_SAMPLES = 5_000
"""Most generated ones."""
MAX_TRAINING = 5_000
"""Most training pictures that it is fitted to."""
NOISE = 0.2


class Reconstruction(Metric):
    """PSNR, SSIM and absolute error of held-out pictures through the tokenizer, beside predicting the training mean."""

    track = "reconstruction"
    gives = ("psnr", "ssim", "l1")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made = evidence.reconstructions
        if made is None or not len(made):
            return []
        beside = {}
        if evidence.train is not None and evidence.held_out is not None and "pixels" in evidence.train:
            mean = evidence.train.moments("pixels")[0] / 255  # (D,)
            held_out = evidence.held_out["pixels"].double() / 255
            beside = {"training mean picture": float((-10 * (held_out - mean).square().mean(1).log10()).mean())}
        rows = [
            Row("psnr", "PSNR of held-out reconstructions", 0.0, "dB", "higher", beside),
            Row("ssim", "SSIM of held-out reconstructions", 0.0, "", "higher"),
            Row("l1", "absolute error of held-out reconstructions", 0.0, "", "lower"),
        ]
        return [replace(row, value=float(made[row.key].double().mean())) for row in rows if row.key in made]


class Judge(Metric):
    """Generated pictures against real ones, in pixels: a classifier, spread, distances."""

    space = "pixels"
    gives = ("judge_accuracy", "recognised", "spread", "frechet_pixels", "nearest", "identical_pairs")
    most_samples = MAX_SAMPLES
    most_reference = MAX_ROWS

    def __call__(self, evidence: Evidence) -> list[Row]:
        sets = (evidence.train, evidence.held_out, evidence.samples)
        if any(rows is None or len(rows) < 2 or "pixels" not in rows for rows in sets):
            return []
        limits = (MAX_ROWS, MAX_ROWS, MAX_SAMPLES)
        some = [(rows, limit) for rows, limit in zip(sets, limits, strict=True) if rows is not None]
        train, held_out, samples = (rows.first("pixels", limit).float() / 255 for rows, limit in some)
        labels = [rows.first("labels", limit) if "labels" in rows else None for rows, limit in some]
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
        rows.append(
            Row("identical_pairs", "identical pairs among samples", float(identical_pairs(samples)), "", "lower", pairs)
        )
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

    def agreement(pixels: Tensor, labels: Tensor) -> float:
        parts = [torch.from_numpy(judge.predict(part.numpy())) for part in pixels.split(256)]  # it holds 45 votes a row
        return 100 * float((torch.cat(parts) == labels).double().mean())

    real, agreed = agreement(held_out, held_out_labels), agreement(samples, asked)
    return [
        Row("judge_accuracy", "judge accuracy on held-out real", real, "%"),
        Row("recognised", "recognised as the class asked for", agreed, "%", "higher", {"held-out real": real}),
    ]


def spread(train: Tensor, train_labels: Tensor, samples: Tensor, asked: Tensor) -> list[Row]:
    """How much samples of one class differ, relative to real ones; no row where no class has two of both."""
    classes = [c for c in asked.unique() if (asked == c).sum() > 1 and (train_labels == c).sum() > 1]
    real = within_class_std(train, train_labels, classes) if classes else 0.0
    if real == 0:
        return []
    value = 100 * within_class_std(samples, asked, classes) / real
    return [Row("spread", "within-class std / real", value, "%", "same", {"real": 100.0})]


def within_class_std(pixels: Tensor, labels: Tensor, classes: list[Tensor]) -> float:
    """Mean over classes of the root mean square, over pixels, of the std over a class's samples (N, D)."""
    return float(torch.stack([pixels[labels == c].double().var(0).mean().sqrt() for c in classes]).mean())


def identical_pairs(pixels: Tensor) -> int:
    """How many pairs of rows (N, D) are the same picture once written with 8 bits."""
    counts = (pixels * 255).round().to(torch.uint8).unique(dim=0, return_counts=True)[1]
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
    return Row(
        "frechet_pixels", "Frechet distance (raw pixels)", frechet_distance_of(samples, held_out), "", "lower", beside
    )


def _nearest_row(train: Tensor, held_out: Tensor, samples: Tensor) -> Row:
    beside = {"held-out real": nearest_distance(held_out, train)}
    value = nearest_distance(samples, train)
    return Row("nearest", "nearest training picture, distance", value, "", "same", beside)
