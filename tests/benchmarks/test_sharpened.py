"""Which images benchmarks/sharpened.py measures."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from sharpened import images_of
from unilatent.batches import Example
from unilatent.modalities.base import Dataset
from unilatent.presets import preset
from unilatent.registry import find


class Sorted(Dataset):
    """A hundred images of ten classes, one class after the other; each as bright as the number of its class."""

    fingerprint = ""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Example:
        return torch.full((1, 8, 8), index // 10 / 10), {}


def test_images_are_of_all_classes() -> None:
    settings = preset("digits").modality
    images = images_of(Sorted(), find("modalities", settings.name)(settings), 20)
    assert [round(10 * float(image.mean())) for image in images] == [n // 2 for n in range(20)]
