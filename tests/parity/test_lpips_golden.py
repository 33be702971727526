"""Our LPIPS against numbers from the UNITE authors' copy, with weights given by a formula."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unilatent.nets.lpips import CHANNELS, LPIPS, vgg_features

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needed = [GOLDEN / "golden.safetensors", GOLDEN / "meta.json"]
pytestmark = pytest.mark.skipif(not all(path.is_file() for path in needed), reason=f"no golden data at {GOLDEN}")


SLICE_STARTS = (0, 4, 9, 16, 23)
"""Golden keys count layers within each of five slices; these are the slices' first layers in torchvision's count."""


def formula(shape: tuple[int, ...], k: int) -> torch.Tensor:
    """sin(0.7391 i + 1.3 k) over the flat index i, float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7391 * i + 1.3 * k).view(shape)


def golden_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(backbone, linear): linear 0.1 |w|, biases 0.01 w, convolutions 2 w / sqrt(fan_in)."""
    shapes = {key: tuple(value.shape) for key, value in vgg_features().state_dict().items()}
    backbone, linear = {}, {}
    for k, key in enumerate(json.loads((GOLDEN / "meta.json").read_text())["lpips.sorted_keys"]):
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


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def test_each_distance(lpips, golden):
    """Pictures in [0, 1], as the authors' code feeds them."""
    distance = lpips(golden["lpips.a_u8"] / 255, golden["lpips.b_u8"] / 255)
    torch.testing.assert_close(distance, golden["lpips.none"].flatten(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(distance.mean(), golden["lpips.mean"], rtol=1e-5, atol=1e-7)


def test_inputs_in_the_standard_range(lpips, golden):
    distance = lpips(golden["lpips.a_u8"] / 127.5 - 1, golden["lpips.b_u8"] / 127.5 - 1)
    torch.testing.assert_close(distance.mean(), golden["lpips.mean_if_inputs_scaled_to_-1_1"], rtol=1e-5, atol=1e-7)


def test_mean_features(lpips, golden):
    """Every tap on its own, in the authors' range of inputs."""
    expected = json.loads((GOLDEN / "meta.json").read_text())["lpips.feat_means"]
    means = [tap.mean().item() for tap in lpips.taps(golden["lpips.a_u8"] / 255)]
    assert means == pytest.approx(expected, rel=1e-5)
