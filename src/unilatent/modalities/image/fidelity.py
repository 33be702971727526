"""Distances between generated and real images in the features of `spaces`: FID, KID, precision and others."""

from __future__ import annotations

from ...maths.fidelity import density_coverage, inception_score_of, kernel_distance, precision_recall
from ...maths.frechet import frechet_distance
from ...records import Rows
from ..base import Evidence, Metric, Row

FIRST = 10_000
"""KID, precision, recall, density and coverage use at most the first 10,000 images of each set."""


class FrechetInceptionDistance(Metric):
    """FID and, if the reference has spatial features, sFID."""

    space = "inception"
    gives = ("fid", "sfid")

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, samples = evidence.train, evidence.samples
        if real is None or samples is None or len(samples) < 2:
            return []
        kinds = (("fid", "FID", "pool"), ("sfid", "sFID", "spatial"))
        return [
            Row(key, name, distance(real, samples, feature), "", "lower")
            for key, name, feature in kinds
            if has_moments(real, feature)
        ]


class InceptionScore(Metric):
    """Inception Score over ten splits, in the order of the samples."""

    space = "inception"
    gives = ("is",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples = evidence.samples
        if samples is None or len(samples) < 10 or "logits_unbiased" not in samples:
            return []
        chunks = (logits.double().softmax(1) for logits in samples.chunks("logits_unbiased"))
        score = inception_score_of(chunks, len(samples))
        return [Row("is", "Inception Score", score.mean, "", "higher", {}, score.std)]


class KernelInceptionDistance(Metric):
    """KID."""

    space = "inception"
    gives = ("kid",)
    most_samples = most_reference = FIRST

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, samples = evidence.train, evidence.samples
        if real is None or samples is None or "pool" not in real or min(len(real), len(samples)) < 2:
            return []
        kernel = kernel_distance(real.first("pool", FIRST), samples.first("pool", FIRST))
        return [Row("kid", "KID", kernel.mean, "", "lower", {}, kernel.std)]


class ManifoldMetrics(Metric):
    """Precision and recall (k = 3), density and coverage (k = 5). Needs at least six images in each set."""

    space = "inception"
    gives = ("precision", "recall", "density", "coverage")
    most_samples = most_reference = FIRST

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, samples = evidence.train, evidence.samples
        if real is None or samples is None or "pool" not in real or min(len(real), len(samples)) < 6:
            return []
        sets = real.first("pool", FIRST), samples.first("pool", FIRST)
        values = {**precision_recall(*sets)._asdict(), **density_coverage(*sets)._asdict()}
        return [Row(key, key, float(value), "", "higher") for key, value in values.items()]


class ReconstructionFID(Metric):
    """rFID: the FID of reconstructions to their own originals."""

    space = "inception"
    track = "reconstruction"
    gives = ("rfid",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, reconstructions = evidence.held_out, evidence.reconstructions
        if real is None or reconstructions is None or len(reconstructions) < 2:
            return []
        return [Row("rfid", "rFID", distance(real, reconstructions, "pool"), "", "lower")]


class ClassifierMetrics(Metric):
    """Frechet distance in the hidden units of a small classifier fitted to this data set, and its accuracy on samples.

    Comparable only within one data set, and not with Inception metrics.
    """

    space = "classifier"
    gives = ("frechet_classifier", "classified")

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, held_out, samples = evidence.train, evidence.held_out, evidence.samples
        if train is None or samples is None or len(samples) < 2 or "hidden" not in samples or "hidden" not in train:
            return []
        real_distance, real_accuracy = {}, {}
        if held_out is not None and len(held_out) > 1 and "hidden" in held_out:
            real_distance = {"held-out real": distance(train, held_out, "hidden")}
            real_accuracy = {"held-out real": accuracy(held_out)}
        value = distance(train, samples, "hidden")
        rows = [Row("frechet_classifier", "Frechet distance (classifier features)", value, "", "lower", real_distance)]
        if "labels" in samples:
            name = "perceptron agrees with the requested class"
            rows.append(Row("classified", name, accuracy(samples), "%", "higher", real_accuracy))
        return rows


class FeatureFrechetDistance(Metric):
    """Frechet distance in the features of another network."""

    def __init__(self, space: str, title: str):
        self.space, self.title = space, title
        self.gives = (f"fd_{space}",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        assert self.space is not None
        real, samples = evidence.train, evidence.samples
        if real is None or samples is None or len(samples) < 2 or not has_moments(real, self.space):
            return []
        value = distance(real, samples, self.space)
        return [Row(self.gives[0], f"Frechet distance ({self.title})", value, "", "lower")]


class PerceptualDistance(Metric):
    """LPIPS between held-out images and their reconstructions."""

    space = "lpips"
    track = "reconstruction"
    gives = ("lpips",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions = evidence.reconstructions
        if reconstructions is None or not len(reconstructions):
            return []
        value = float(reconstructions["lpips"].mean())
        return [Row("lpips", "LPIPS (VGG) of held-out reconstructions", value, "", "lower")]


def distance(real: Rows, other: Rows, feature: str) -> float:
    """Return the Frechet distance of a feature, from streamed moments."""
    return frechet_distance(real.moments(feature), other.moments(feature))


def has_moments(rows: Rows, name: str) -> bool:
    """Whether a set has the feature, or stored moments of it."""
    return name in rows or name in rows.known_moments


def accuracy(rows: Rows) -> float:
    """Return the percentage of images that the classifier assigns to their label."""
    return 100 * float((rows["chosen"] == rows["labels"]).double().mean())
