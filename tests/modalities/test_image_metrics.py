"""Pixel metrics must accept real images, and detect copies, collapse, blur and noise."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.modalities._media.similarity import psnr
from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.image import Image, ImageConfig, ImageData
from unilatent.modalities.image.fidelity import ClassifierMetrics
from unilatent.modalities.image.metrics import (
    ImageReconstruction,
    PixelMetrics,
    identical_pairs,
    nearest_distance,
    within_class_std,
)
from unilatent.modalities.image.relative import RelativeDistance
from unilatent.modalities.image.scene_metrics import SceneAccuracy
from unilatent.modalities.image.spaces import Pixels
from unilatent.records import MemoryRows


def stacked(dataset) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in items]), {"labels": torch.tensor([values["labels"] for _, values in items])}


IMAGE = Image(ImageConfig(size=8, patch_size=2, channels=1))


@pytest.fixture(scope="module")
def digits():
    """Training and held-out digits, each (data, values)."""
    both = IMAGE.splits(ImageData(path="digits", held_out=297))
    return stacked(both.train), stacked(both.held_out)


def rows_of(data: torch.Tensor, values: dict[str, torch.Tensor]) -> MemoryRows:
    """The rows that evaluation stores for images."""
    return MemoryRows({**values, **Pixels()(data)})


def rows_by_name(digits, samples) -> dict[str, Row]:
    train, held_out = digits
    rows = PixelMetrics()(Evidence(rows_of(*train), rows_of(*held_out), rows_of(*samples)))
    return {row.name: row for row in rows}


def test_real_images_pass(digits):
    rows = rows_by_name(digits, digits[1])
    assert rows["SVM accuracy on held-out real"].value > 95
    assert rows["recognised as the requested class"].value > 95
    assert rows["within-class std / real"].value == pytest.approx(100, abs=8)
    assert rows["Frechet distance (raw pixels)"].value == pytest.approx(0, abs=1e-6)
    nearest = rows["nearest training image, distance"]
    assert nearest.value == pytest.approx(nearest.beside["held-out real"]) and nearest.better == "same"
    assert rows["identical pairs among samples"].value == rows["identical pairs among samples"].beside["held-out real"]


def test_the_frechet_distance_has_baselines(digits):
    row = rows_by_name(digits, digits[1])["Frechet distance (raw pixels)"]
    assert set(row.beside) == {"real train vs real", "class means", "train + noise 0.2"} and row.better == "lower"
    real, means, noisy = row.beside.values()
    assert 0 < real < 0.2 * means and real < 0.2 * noisy


def test_class_means_are_recognised_but_have_no_spread(digits):
    (train, values), (_, requested) = digits
    means = torch.stack([train[values["labels"] == c].mean(0) for c in range(10)])
    rows = rows_by_name(digits, (means[requested["labels"]], requested))
    assert rows["recognised as the requested class"].value > 99
    assert rows["within-class std / real"].value == pytest.approx(0, abs=1e-3)
    frechet = rows["Frechet distance (raw pixels)"]
    assert frechet.value == pytest.approx(frechet.beside["class means"], rel=1e-3)
    counts = torch.bincount(requested["labels"])
    assert rows["identical pairs among samples"].value == (counts * (counts - 1) // 2).sum()


def test_noise_is_detected(digits):
    data, requested = digits[1]
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(0))
    rows = rows_by_name(digits, (noise, requested))
    frechet = rows["Frechet distance (raw pixels)"]
    assert frechet.value > max(frechet.beside.values())
    assert rows["recognised as the requested class"].value < 30
    nearest = rows["nearest training image, distance"]
    assert nearest.value > 1.2 * nearest.beside["held-out real"]


def test_copies_of_training_images_are_detected(digits):
    data, values = digits[0]
    rows = rows_by_name(digits, (data[:300], {"labels": values["labels"][:300]}))
    nearest = rows["nearest training image, distance"]
    assert nearest.value < 1e-3 < nearest.beside["held-out real"]


def test_images_of_other_classes_than_requested_are_detected(digits):
    data, values = digits[1]
    rows = rows_by_name(digits, (data, {"labels": (values["labels"] + 1) % 10}))
    assert rows["recognised as the requested class"].value < 5
    assert rows["SVM accuracy on held-out real"].value > 95


def test_the_metrics_are_deterministic(digits):
    samples = (digits[0][0][:200] * 0.9, {"labels": digits[0][1]["labels"][:200]})
    assert rows_by_name(digits, samples) == rows_by_name(digits, samples)


def test_without_labels_only_distances_remain(digits):
    train, held_out = digits
    rows = PixelMetrics()(Evidence(rows_of(train[0], {}), rows_of(held_out[0], {}), rows_of(held_out[0], {})))
    names = [row.name for row in rows]
    assert names[0] == "Frechet distance (raw pixels)" and len(names) == 3
    assert "class means" not in rows[0].beside


def test_no_rows_for_large_images_or_too_few():
    big, few = torch.rand(4, 3, 33, 33), torch.rand(1, 1, 8, 8)
    values = {"labels": torch.arange(4)}
    for rows in (rows_of(big, values), rows_of(few, {"labels": torch.zeros(1)})):
        assert PixelMetrics()(Evidence(rows, rows, rows)) == []
    assert PixelMetrics()(Evidence(None, None, rows_of(torch.rand(4, 1, 8, 8), values))) == []


def test_samples_with_nan_are_refused(digits):
    data, values = digits[1]
    with pytest.raises(ValueError, match="NaN or infinity in 297 of 297; the model that generated them diverged"):
        rows_by_name(digits, (data * math.nan, values))


def test_psnr_closed_form():
    target = torch.full((2, 3, 4, 4), 0.5)
    off = target.clone()
    off[0] += 0.1  # 20 dB
    off[1] += 0.01  # 40 dB
    assert psnr(off, target).mean().item() == pytest.approx(30, abs=1e-3)  # the mean is over dB, not over errors
    assert psnr(target, target).mean().item() == pytest.approx(100)


def test_reconstruction_has_the_mean_image_as_baseline(digits):
    train, held_out = digits
    errors = MemoryRows({key: torch.tensor(row) for key, row in IMAGE.errors(held_out[0] + 0.1, held_out[0]).items()})
    by_psnr, by_error = ImageReconstruction()(Evidence(rows_of(*train), rows_of(*held_out), None, errors))
    assert by_psnr.value == pytest.approx(20, abs=1e-3) and by_psnr.unit == "dB"
    assert by_error.value == pytest.approx(0.1, abs=1e-6) and by_error.better == "lower"
    mean = train[0].mean(0, keepdim=True).expand_as(held_out[0])
    expected = psnr(mean, held_out[0]).mean().item()
    assert by_psnr.beside == {"training mean image": pytest.approx(expected, abs=1e-2)}  # pixels are stored in 8 bits
    assert ImageReconstruction()(Evidence(rows_of(*train), None, None, MemoryRows({}))) == []
    assert [row.beside for row in ImageReconstruction()(Evidence(None, None, None, errors))] == [{}, {}]


def test_within_class_std_closed_form():
    pixels = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    classes = list(labels.unique())
    assert within_class_std(pixels, labels, classes) == pytest.approx((math.sqrt((2 + 0) / 2) + 0) / 2)


def test_distances_and_pairs_closed_form():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert nearest_distance(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), points) == pytest.approx((1 + 3) / 2)
    rows = torch.tensor([[0.1, 0.2], [0.1, 0.2005], [0.1, 0.2], [0.9, 0.2]])  # equal once rounded to 8 bits
    assert identical_pairs(rows) == 3


def test_metrics_without_a_download():
    light = {space.name for space in IMAGE.spaces() if not space.needs_download}
    kinds = {type(metric) for metric in IMAGE.metrics() if light.issuperset(metric.spaces)}
    assert kinds == {ImageReconstruction, PixelMetrics, ClassifierMetrics, RelativeDistance, SceneAccuracy}
