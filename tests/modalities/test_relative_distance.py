"""`fdr` and `frechet_ratio`: 1 for real images, the known ratio for known Gaussians, and no number from other sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unilatent.maths.frechet import frechet_distance_of
from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.image import Image, ImageConfig, relative
from unilatent.modalities.image.relative import PUBLISHED, STAND_INS, RelativeDistance
from unilatent.records import MemoryRows, Statistics

FDR = RelativeDistance("fdr", "FDr", PUBLISHED)
WIDTHS = {"pool": 6, "dinov2": 4, "clip": 3}
"""Channels of each feature here."""


def normal(rows: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
    """Features of standard normal numbers times `scale`, moved by `shift` along the first channel."""
    stream = torch.Generator().manual_seed(seed)
    found = {name: scale * torch.randn(rows, width, generator=stream) for name, width in WIDTHS.items()}
    for values in found.values():
        values[:, 0] += shift
    return found


def moved(features: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    """The same features, moved along the first channel: their Frechet distance to the others is `by` squared."""
    return {name: values + by * torch.eye(values.shape[1])[0] for name, values in features.items()}


def row(train: MemoryRows | Statistics, held_out: dict | None, samples: dict, metric: RelativeDistance = FDR) -> Row:
    evidence = Evidence(train, None if held_out is None else MemoryRows(held_out), MemoryRows(samples))
    [found] = metric(evidence)
    return found


def test_a_known_shift_has_the_ratio_of_its_squares():
    """FD of moved copies is the squared shift: 3 squared over 0.5 squared in each feature."""
    real = normal(50, 0)
    found = row(MemoryRows(real), moved(real, 0.5), moved(real, 3.0))
    assert found.value == pytest.approx(36, rel=1e-6) and found.better == "lower" and found.beside == {"real": 1.0}
    assert found.parts == {name: pytest.approx(36, rel=1e-6) for name in ("Inception", "DINOv2", "CLIP")}


def test_it_is_the_mean_of_its_features():
    real = normal(50, 0)
    samples = {**moved(real, 1.0), "clip": moved(real, 2.0)["clip"]}
    found = row(MemoryRows(real), moved(real, 1.0), samples)
    assert found.parts == {"Inception": pytest.approx(1), "DINOv2": pytest.approx(1), "CLIP": pytest.approx(4)}
    assert found.value == pytest.approx(2)


@pytest.mark.parametrize("count", [20, 200])
def test_real_against_real_is_1_on_average_at_any_number(count: int):
    """Two sets that can be exchanged: the mean of the logarithm is 0. The plain distance is a tenth at ten times as
    many images."""
    train = MemoryRows(normal(4000, 0))
    found = [row(train, normal(count, 2 * k + 1), normal(count, 2 * k + 2)) for k in range(60)]
    logs = torch.tensor([list(each.parts.values()) for each in found]).log().mean(1)
    error = logs.std() / len(logs) ** 0.5
    assert abs(logs.mean()) < 3 * error < 0.25, (logs.mean(), error)


def test_fewer_held_out_images_than_samples_take_as_many_samples():
    """Twenty samples beside twenty real images, not a thousand: more images are closer by their number alone."""
    train, held_out, samples = normal(4000, 0), normal(20, 1), normal(1000, 2)
    evidence = Evidence(MemoryRows(train), MemoryRows(held_out), MemoryRows(samples))
    assert FDR.used(evidence) == (20, 4000)
    [found] = FDR(evidence)
    assert 0.5 < found.value < 2
    whole, part = (frechet_distance_of(train["pool"], s["pool"]) for s in (samples, held_out))
    assert whole / part < 0.1  # what the ratio would be with all samples


def test_many_images_are_read_in_chunks_to_the_same_number(monkeypatch: pytest.MonkeyPatch):
    sets = MemoryRows(normal(300, 0)), normal(40, 1), normal(40, 2, shift=1.0)
    want = row(*sets)
    monkeypatch.setattr(relative, "MANY", 10)
    assert row(*sets).parts == {name: pytest.approx(value, rel=1e-9) for name, value in want.parts.items()}


@pytest.mark.parametrize(("in_turn", "most"), [(False, 3), (True, 50)])
def test_classes_keep_their_shares_in_any_order(in_turn: bool, most: float):
    """In sets sorted by class, the first images would be of one class (a ratio of 3,000); in sets that go through the
    classes in turn, images at equal distances (270)."""

    def in_classes(count: int, seed: int) -> dict[str, Tensor]:
        """Four classes, 5 apart."""
        labels = torch.arange(count) % 4 if in_turn else torch.arange(count) * 4 // count
        return {name: values + 5.0 * labels[:, None] for name, values in normal(count, seed).items()}

    found = row(MemoryRows(in_classes(2000, 0)), in_classes(100, 1), in_classes(1000, 2))
    assert 0.3 < found.value < most


def test_without_held_out_images_half_of_the_reference_stands_for_them():
    train = normal(400, 0)
    evidence = Evidence(MemoryRows(train), None, MemoryRows(normal(1000, 1)))
    assert FDR.used(evidence) == (200, 200)
    ratios = [FDR(replace(evidence, samples=MemoryRows(normal(1000, k))))[0].value for k in range(1, 9)]
    assert 0.8 < sum(ratios) / len(ratios) < 1.25
    [far] = FDR(replace(evidence, samples=MemoryRows(normal(1000, 1, shift=2.0))))
    assert far.value > 20


def test_statistics_are_a_reference_if_there_are_held_out_images():
    """As published statistics are, with the features of images from elsewhere."""
    real = normal(50, 0)
    known = Statistics({name: MemoryRows(real).moments(name) for name in WIDTHS}, 50)
    assert row(known, moved(real, 0.5), moved(real, 3.0)).value == pytest.approx(36, rel=1e-6)
    assert FDR(Evidence(known, None, MemoryRows(real))) == [] and FDR.used(Evidence(known, None, None)) == (0, 0)


def missing(features: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: values for key, values in features.items() if key != name}


@pytest.mark.parametrize("name", WIDTHS)
def test_without_one_of_its_features_there_is_no_number(name: str):
    sets = normal(20, 0), normal(20, 1), normal(20, 2)
    for lacking in range(3):
        train, held_out, samples = (
            MemoryRows(missing(features, name) if place == lacking else features) for place, features in enumerate(sets)
        )
        found = FDR(Evidence(train, held_out, samples))
        assert (found == []) == (lacking != 1), (name, lacking)  # without held-out ones, half of the reference does


def test_images_that_are_the_reference_are_no_unit():
    real = normal(20, 0)
    assert FDR(Evidence(MemoryRows(real), MemoryRows(real), MemoryRows(normal(20, 1)))) == []
    one = {name: values[:1] for name, values in real.items()}
    assert FDR(Evidence(MemoryRows(real), MemoryRows(one), MemoryRows(normal(20, 1)))) == []
    assert FDR(Evidence(None, MemoryRows(real), MemoryRows(real))) == []


def of_image(keys: Sequence[str]) -> dict[str, RelativeDistance]:
    image = Image(ImageConfig(size=8, patch_size=2, channels=1))
    return {m.gives[0]: m for m in image.metrics() if isinstance(m, RelativeDistance) and m.gives[0] in keys}


def test_only_published_features_have_the_published_name():
    found = of_image(("fdr", "frechet_ratio"))
    assert found["fdr"].spaces == ("inception", "dinov2", "clip") and found["fdr"].features == PUBLISHED
    assert found["frechet_ratio"].spaces == ("pixels", "classifier") and found["frechet_ratio"].features == STAND_INS
    assert "FDr" in found["fdr"].name and "fd" not in found["frechet_ratio"].name.lower()
    assert all(metric.needs_held_out and metric.relative for metric in found.values())
