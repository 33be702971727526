"""Metrics in pixels that need no pretrained network: PSNR, nearest neighbours, spread, an SVM fitted to real images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...maths.frechet import Factor
from ...maths.streams import generator
from ..base import Evidence, Metric, Row

MAX_VALUES = 3072
"""Largest C * H * W (32 x 32 RGB) at which distances between raw pixels are informative."""
MAX_SVM_VALUES = 1024
"""Largest C * H * W (32 x 32 grey) for the SVM, which cannot classify natural images."""
MAX_ROWS = 20_000
"""Largest number of real images per set that are compared pixel by pixel."""
MAX_SAMPLES = 5_000
"""Largest number of generated images that are compared."""
MAX_SVM_TRAINING = 5_000
"""Largest number of training images for the SVM; with more, it is left out."""
NOISE = 0.2
"""Standard deviation of the noise on real images in the noised-data baseline."""


class ImageReconstruction(Metric):
    """PSNR, SSIM and absolute error of held-out reconstructions. Baseline of PSNR: the mean training image."""

    track = "reconstruction"
    gives = ("psnr", "ssim", "l1")

    def __call__(self, evidence: Evidence) -> list[Row]:
        errors = evidence.reconstructions
        if errors is None or not len(errors):
            return []
        baselines = {}
        if evidence.train is not None and evidence.held_out is not None and "pixels" in evidence.train:
            mean = evidence.train.moments("pixels")[0] / 255  # (D,)
            held_out = evidence.held_out["pixels"].double() / 255
            baselines = {"training mean image": float((-10 * (held_out - mean).square().mean(1).log10()).mean())}
        rows = [
            Row("psnr", "PSNR of held-out reconstructions", 0.0, "dB", "higher", baselines),
            Row("ssim", "SSIM of held-out reconstructions", 0.0, "", "higher"),
            Row("l1", "absolute error of held-out reconstructions", 0.0, "", "lower"),
        ]
        return [replace(row, value=float(errors[row.key].double().mean())) for row in rows if row.key in errors]


class PixelMetrics(Metric):
    """Generated images compared with real ones in raw pixels: SVM accuracy, spread within classes, distances."""

    space = "pixels"
    gives = ("judge_accuracy", "recognised", "spread", "frechet_pixels", "nearest", "identical_pairs")
    most_samples = MAX_SAMPLES
    most_reference = MAX_ROWS

    def __call__(self, evidence: Evidence) -> list[Row]:
        sets = (evidence.train, evidence.held_out, evidence.samples)
        if any(rows is None or len(rows) < 2 or "pixels" not in rows for rows in sets):
            return []
        limits = (MAX_ROWS, MAX_ROWS, MAX_SAMPLES)
        limited = [(rows, limit) for rows, limit in zip(sets, limits, strict=True) if rows is not None]
        train, held_out, samples = (rows.first("pixels", limit).float() / 255 for rows, limit in limited)
        labels = [rows.first("labels", limit) if "labels" in rows else None for rows, limit in limited]
        train_labels, held_out_labels, requested = labels
        rows = []
        if train_labels is not None and held_out_labels is not None and requested is not None:
            small = len(train) <= MAX_SVM_TRAINING and train.shape[1] <= MAX_SVM_VALUES
            if small and len(train_labels.unique()) > 1:
                rows += recognition(train, train_labels, held_out, held_out_labels, samples, requested)
            rows += spread(train, train_labels, samples, requested)
        rows.append(_frechet_row(train, train_labels, held_out, samples, requested))
        rows.append(_nearest_row(train, held_out, samples))
        baselines = {"held-out real": float(identical_pairs(held_out))}
        value = float(identical_pairs(samples))
        rows.append(Row("identical_pairs", "identical pairs among samples", value, "", "lower", baselines))
        return rows


def recognition(
    train: Tensor, train_labels: Tensor, held_out: Tensor, held_out_labels: Tensor, samples: Tensor, requested: Tensor
) -> list[Row]:
    """Return the accuracy of a support vector machine, fitted to training pixels (N, D), on held-out images and on
    samples with their requested labels."""
    from sklearn.svm import SVC

    svm = SVC(C=10, kernel="rbf", gamma="scale").fit(train.numpy(), train_labels.numpy())

    def accuracy(pixels: Tensor, labels: Tensor) -> float:
        chunks = [torch.from_numpy(svm.predict(chunk.numpy())) for chunk in pixels.split(256)]  # bounds its memory
        return 100 * float((torch.cat(chunks) == labels).double().mean())

    real, recognised = accuracy(held_out, held_out_labels), accuracy(samples, requested)
    return [
        Row("judge_accuracy", "SVM accuracy on held-out real", real, "%"),
        Row("recognised", "recognised as the requested class", recognised, "%", "higher", {"held-out real": real}),
    ]


def spread(train: Tensor, train_labels: Tensor, samples: Tensor, requested: Tensor) -> list[Row]:
    """Return the within-class standard deviation of samples relative to real images.

    No row if no class has at least two samples and two real images.
    """
    classes = [c for c in requested.unique() if (requested == c).sum() > 1 and (train_labels == c).sum() > 1]
    real = within_class_std(train, train_labels, classes) if classes else 0.0
    if real == 0:
        return []
    value = 100 * within_class_std(samples, requested, classes) / real
    return [Row("spread", "within-class std / real", value, "%", "same", {"real": 100.0})]


def within_class_std(pixels: Tensor, labels: Tensor, classes: list[Tensor]) -> float:
    """Return the standard deviation over the samples (N, D) of a class: root mean square over pixels, mean over
    classes."""
    return float(torch.stack([pixels[labels == c].double().var(0).mean().sqrt() for c in classes]).mean())


def identical_pairs(pixels: Tensor) -> int:
    """Return the number of pairs of rows (N, D) that are equal after rounding to 8 bits."""
    counts = (pixels * 255).round().to(torch.uint8).unique(dim=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def nearest_distance(pixels: Tensor, others: Tensor) -> float:
    """Return the mean over rows (N, D) of the Euclidean distance to the nearest row of `others`, in float64."""
    others = others.double()
    nearest = [torch.cdist(chunk.double(), others).amin(1) for chunk in pixels.split(256)]
    return float(torch.cat(nearest).mean())


def _frechet_row(
    train: Tensor, train_labels: Tensor | None, held_out: Tensor, samples: Tensor, requested: Tensor | None
) -> Row:
    """Return the Frechet distance of samples to held-out images in raw pixels.

    Baselines, each of as many images as there are samples: training images, class means, noised training images.
    """
    subset = train[torch.randperm(len(train), generator=generator("judge", "subset"))[: len(samples)]]
    noise = torch.randn(subset.shape, generator=generator("judge", "noise"))
    real = Factor.of_features(held_out)

    def distance(pixels: Tensor) -> float:
        return real.distance(Factor.of_features(pixels))

    baselines = {"real train vs real": distance(subset)}
    if train_labels is not None and requested is not None and torch.isin(requested, train_labels).all():
        means = {int(c): train[train_labels == c].mean(0) for c in requested.unique()}
        copies = torch.stack([means[int(c)] for c in requested])
        baselines["class means"] = distance(copies)
    baselines[f"train + noise {NOISE}"] = distance(subset + NOISE * noise)
    value = distance(samples)
    return Row("frechet_pixels", "Frechet distance (raw pixels)", value, "", "lower", baselines)


def _nearest_row(train: Tensor, held_out: Tensor, samples: Tensor) -> Row:
    """Return the distance of samples to the nearest training image; far below the baseline, samples are copies."""
    baselines = {"held-out real": nearest_distance(held_out, train)}
    value = nearest_distance(samples, train)
    return Row("nearest", "nearest training image, distance", value, "", "same", baselines)
