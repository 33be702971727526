"""Measures that apply to every kind of system, in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unilatent.modalities._atoms.metrics import type_accuracy, wasserstein


def test_wasserstein_distance_of_two_samples() -> None:
    a = torch.tensor([0.0, 1.0, 3.0])
    assert wasserstein(a, a + 2) == pytest.approx(2)
    assert wasserstein(a, a.repeat(5)) == pytest.approx(0)
    assert wasserstein(torch.tensor([0]), torch.tensor([0, 4])) == pytest.approx(2)
    assert wasserstein(np.array([0, 1.0]), np.array([3, 4.0])) == pytest.approx(3)
    assert wasserstein(np.array([0.0]), np.array([0, 0, 2.0, 2])) == pytest.approx(1)
    assert math.isinf(wasserstein(a, torch.zeros(0))) and math.isinf(wasserstein(np.zeros(0), a))


def test_type_accuracy_ignores_padding() -> None:
    types = torch.tensor([[6, 1, 1, 0], [8, 1, 0, 0]])
    made = torch.tensor([[6, 1, 7, 9], [8, 1, 1, 1]])
    assert type_accuracy({"types": made}, {"types": types}).tolist() == pytest.approx([200 / 3, 100])
