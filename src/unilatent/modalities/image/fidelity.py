"""Distances between generated and real pictures in a feature space (`spaces`)."""

from __future__ import annotations

from ...maths.fidelity import density_coverage, inception_score_of, kernel_distance, precision_recall
from ...maths.frechet import frechet_distance
from ...records import Rows
from ..base import Evidence, Metric, Row

FIRST = 10_000
"""Samples and real ones, the first of each set, that KID, precision, recall, density and coverage compare."""


class FrechetInception(Metric):
    """FID and, where the reference knows spatial features, sFID, against the reference."""

    space = "inception"
    gives = ("fid", "sfid")

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, made = evidence.train, evidence.samples
        if real is None or made is None or len(made) < 2:
            return []
        named = (("fid", "FID", "pool"), ("sfid", "sFID", "spatial"))
        return [Row(key, name, distance(real, made, of), "", "lower") for key, name, of in named if knows(real, of)]


class InceptionScore(Metric):
    """Over ten splits, in the order of the samples."""

    space = "inception"
    gives = ("is",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made = evidence.samples
        if made is None or len(made) < 10 or "logits_unbiased" not in made:
            return []
        parts = (logits.double().softmax(1) for logits in made.pieces("logits_unbiased"))
        score = inception_score_of(parts, len(made))
        return [Row("is", "Inception Score", score.mean, "", "higher", {}, score.std)]


class KernelInception(Metric):
    """KID, between first samples and first real ones."""

    space = "inception"
    gives = ("kid",)
    most_samples = most_reference = FIRST

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, made = evidence.train, evidence.samples
        if real is None or made is None or "pool" not in real or min(len(real), len(made)) < 2:
            return []
        kernel = kernel_distance(real.first("pool", FIRST), made.first("pool", FIRST))
        return [Row("kid", "KID", kernel.mean, "", "lower", {}, kernel.std)]


class Manifold(Metric):
    """Precision and recall (k = 3), density and coverage (k = 5), between first samples and first real ones; nothing
    for sets too small to have neighbours."""

    space = "inception"
    gives = ("precision", "recall", "density", "coverage")
    most_samples = most_reference = FIRST

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, made = evidence.train, evidence.samples
        if real is None or made is None or "pool" not in real or min(len(real), len(made)) < 6:
            return []
        sets = real.first("pool", FIRST), made.first("pool", FIRST)
        values = {**precision_recall(*sets)._asdict(), **density_coverage(*sets)._asdict()}
        return [Row(key, key, float(value), "", "higher") for key, value in values.items()]


class ReconstructionFidelity(Metric):
    """rFID: the Frechet distance of reconstructions to their own originals."""

    space = "inception"
    track = "reconstruction"
    gives = ("rfid",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, made = evidence.held_out, evidence.reconstructions
        if real is None or made is None or len(made) < 2:
            return []
        return [Row("rfid", "rFID", distance(real, made, "pool"), "", "lower")]


class Classifier(Metric):
    """Distances in the hidden units of a small classifier of this data set, and what it says of the samples. Its
    numbers compare only within one data set: none of them is an Inception number."""

    space = "classifier"
    gives = ("frechet_classifier", "classified")

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, held_out, made = evidence.train, evidence.held_out, evidence.samples
        if train is None or made is None or len(made) < 2 or "hidden" not in made or "hidden" not in train:
            return []
        beside, agreed = {}, {}
        if held_out is not None and len(held_out) > 1 and "hidden" in held_out:
            beside = {"held-out real": distance(train, held_out, "hidden")}
            agreed = {"held-out real": agreement(held_out)}
        value = distance(train, made, "hidden")
        rows = [Row("frechet_classifier", "Frechet distance (classifier features)", value, "", "lower", beside)]
        if "labels" in made:
            name = "the perceptron agrees with the class asked for"
            rows.append(Row("classified", name, agreement(made), "%", "higher", agreed))
        return rows


class Semantic(Metric):
    """The Frechet distance in another network's features."""

    def __init__(self, space: str, title: str):
        self.space, self.title = space, title
        self.gives = (f"fd_{space}",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        assert self.space is not None
        real, made = evidence.train, evidence.samples
        if real is None or made is None or len(made) < 2 or not knows(real, self.space):
            return []
        value = distance(real, made, self.space)
        return [Row(self.gives[0], f"Frechet distance ({self.title})", value, "", "lower")]


class PerceptualDistance(Metric):
    """LPIPS of held-out pictures through the tokenizer."""

    space = "lpips"
    track = "reconstruction"
    gives = ("lpips",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made = evidence.reconstructions
        if made is None or not len(made):
            return []
        return [Row("lpips", "LPIPS (VGG) of held-out reconstructions", float(made["lpips"].mean()), "", "lower")]


def distance(real: Rows, made: Rows, name: str) -> float:
    """Frechet distance from moments, which are read in pieces."""
    return frechet_distance(real.moments(name), made.moments(name))


def knows(rows: Rows, name: str) -> bool:
    """Whether a set's moments of a tensor can be had."""
    return name in rows or name in rows.known_moments


def agreement(rows: Rows) -> float:
    """Percent of pictures that the classifier takes for what they should be."""
    return 100 * float((rows["chosen"] == rows["labels"]).double().mean())
