"""LPIPS compared with numbers from the UNITE authors' copy, with weights from a formula (item k of the golden data)."""

from __future__ import annotations

import math
import re

import pytest
import torch
from golden import golden, needs_golden, read_json

from unilatent.nets.lpips import CHANNELS, LPIPS, vgg_features

pytestmark = needs_golden

SLICE_STARTS = (0, 4, 9, 16, 23)
"""Golden keys number layers within each of five slices; these are the numbers of the slices' first layers in
torchvision."""


def formula(shape: tuple[int, ...], k: int) -> torch.Tensor:
    """sin(0.7391 i + 1.3 k) over the flat index i, float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7391 * i + 1.3 * k).view(shape)


def golden_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (backbone, linear): linear 0.1 |w|, biases 0.01 w, convolutions 2 w / sqrt(fan_in)."""
    shapes = {key: tuple(value.shape) for key, value in vgg_features().state_dict().items()}
    backbone, linear = {}, {}
    for k, key in enumerate(read_json("meta.json")["lpips.sorted_keys"]):
        if found := re.fullmatch(r"lin(\d)\.model\.1\.weight", key):
            stage = int(found[1])
            linear[f"lin{stage}.weight"] = (0.1 * formula((CHANNELS[stage],), k).abs()).float()
            continue
        found = re.fullmatch(r"net\.slice(\d)\.(\d)\.(weight|bias)", key)
        assert found, key
        name = f"{SLICE_STARTS[int(found[1]) - 1] + int(found[2])}.{found[3]}"
        w = formula(shapes[name], k)
        backbone[f"features.{name}"] = (0.01 * w if w.ndim == 1 else 2 * w / math.sqrt(w[0].numel())).float()
    return backbone, linear


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(*golden_weights())


def test_each_distance(lpips):
    """For images in [0, 1], as in the authors' code."""
    distance = lpips(golden()["lpips.a_u8"] / 255, golden()["lpips.b_u8"] / 255)
    torch.testing.assert_close(distance, golden()["lpips.none"].flatten(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(distance.mean(), golden()["lpips.mean"], rtol=1e-5, atol=1e-7)


def test_inputs_in_the_standard_range(lpips):
    distance = lpips(golden()["lpips.a_u8"] / 127.5 - 1, golden()["lpips.b_u8"] / 127.5 - 1)
    torch.testing.assert_close(distance.mean(), golden()["lpips.mean_if_inputs_scaled_to_-1_1"], rtol=1e-5, atol=1e-7)


def test_mean_features(lpips):
    """Each feature map separately, for the authors' range of inputs."""
    expected = read_json("meta.json")["lpips.feat_means"]
    means = [tap.mean().item() for tap in lpips.taps(golden()["lpips.a_u8"] / 255)]
    assert means == pytest.approx(expected, rel=1e-5)
