"""The FID InceptionV3 with seeded weights: layout, resizing, frozen weights, errors for wrong files."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from inception_state import images, seeded_state
from torch import Tensor

from unilatent.nets.inception import PUBLISHED, SIDE, InceptionV3, average, resize_tf1, resize_torch


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return seeded_state()


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception(file: Path) -> InceptionV3:
    return InceptionV3.load(str(file))


def test_the_layout_is_the_official_files(state: dict[str, Tensor]):
    """566 tensors of 23.9 million values, 96 MB."""
    assert len(state) == 566
    assert 23.8e6 < sum(value.numel() for value in state.values()) < 24.0e6
    assert abs(4 * sum(value.numel() for value in state.values()) / PUBLISHED.size - 1) < 0.01
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_6b.branch7x7dbl_2.conv.weight"].shape == (128, 128, 7, 1)
    assert state["fc.weight"].shape == (1008, 2048)


def test_features(inception: InceptionV3):
    found = inception(images()["small"])
    assert [tuple(value.shape) for value in found] == [(1, 2048), (1, 2023), (1, 1008)]
    assert all(value.dtype == torch.float32 and value.isfinite().all() and not value.requires_grad for value in found)
    torch.testing.assert_close(found.logits_unbiased, found.pool @ inception.network.fc.weight.T)
    assert all(torch.equal(a, b) for a, b in zip(found, inception(images()["small"]), strict=True))


def test_images_of_a_batch_are_independent(inception: InceptionV3):
    both = torch.cat([images()["small"], 255 - images()["small"]])
    for together, alone in zip(inception(both), inception(both[1:]), strict=True):
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_spatial_features_are_ordered_by_row_column_and_channel(inception: InceptionV3):
    """The left edge of an image mostly changes the left ones of 17 columns."""
    image = torch.full((1, 3, SIDE, SIDE), 120, dtype=torch.uint8)
    changed = image.clone()
    changed[..., :20] = 200
    difference = (inception(changed).spatial - inception(image).spatial).abs().view(17, 17, 7).mean((0, 2))
    assert difference[:5].mean() > 3 * difference[-5:].mean()


def test_autocast_has_no_effect(inception: InceptionV3):
    image = images()["small"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inception(image).pool, inception(image.clone()).pool)
        found = inception(image)
    assert all(torch.equal(a, b) for a, b in zip(found, inception(image), strict=True))


def test_frozen(inception: InceptionV3):
    assert not inception.train().training and not any(module.training for module in inception.modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())


def test_average_pooling_excludes_padding():
    assert torch.equal(average(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_tensorflows_resize_by_hand():
    """Doubling [0, 100] reads coordinates 0, 0.5, 1, 1.5: no half pixels, and the last is clamped to the edge."""
    ramp = torch.arange(SIDE).float() * (2 / SIDE)
    want = (100 * ramp.clamp(max=1) - 128) / 128
    found = resize_tf1(torch.tensor([0.0, 100.0]).view(1, 1, 1, 2))[0, 0]
    torch.testing.assert_close(found, want.expand(SIDE, SIDE))
    same = torch.rand(1, 3, SIDE, SIDE) * 255
    assert torch.equal(resize_tf1(same), (same - 128) / 128)


def test_the_other_resize_has_half_pixels_and_another_range():
    found = resize_torch(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))[0, 0]
    assert float(found[0, 0]) == -1 and float(found[0, -1]) == 1
    torch.testing.assert_close(found, -found.flip(1))
    assert not torch.allclose(resize_tf1(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))[0, 0], found, atol=0.1)


def test_the_resize_is_chosen_by_name(state: dict[str, Tensor], inception: InceptionV3):
    other = InceptionV3(state, "torch")
    assert not torch.allclose(other(images()["small"]).pool, inception(images()["small"]).pool, atol=1e-3)
    with pytest.raises(ValueError, match="resize 'pil' is unknown; one of tf1, torch"):
        InceptionV3(state, "pil")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 32, 32), torch.float32), ((1, 1, 32, 32), torch.uint8), ((3, 8, 8), torch.uint8)]
)
def test_only_8_bit_colour_images(inception: InceptionV3, shape: tuple[int, ...], dtype: torch.dtype):
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\) uint8; got"):
        inception(torch.zeros(shape, dtype=dtype))


def test_a_converted_file_without_counters(state: dict[str, Tensor], inception: InceptionV3, tmp_path: Path):
    path = tmp_path / "converted.safetensors"
    safetensors.torch.save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(InceptionV3.load(str(path))(images()["flat"]).pool, inception(images()["flat"]).pool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("Mixed_5b.branch1x1.conv.weight"),
            "no tensor Mixed_5b.branch1x1.conv.weight (1 of 472",
        ),
        (lambda s: s.update(AuxLogits=torch.zeros(2)), "unknown tensor AuxLogits"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), "fc.weight has shape (1000, 2048)"),
    ],
)
def test_another_networks_file_is_refused(state: dict[str, Tensor], tmp_path: Path, change, words: str):
    """For example torchvision's InceptionV3 with its 1000 classes."""
    state = dict(state)
    change(state)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(ValueError) as refusal:
        InceptionV3.load(str(path))
    message = str(refusal.value)
    assert words in message and str(path) in message and PUBLISHED.url in message and "\n" not in message


def test_without_weights_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"InceptionV3 weights for FID: not found at .*6726825d\.pth.*forbids"):
        InceptionV3.load()


def test_a_cached_file_with_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    (tmp_path / PUBLISHED.file).write_bytes(b"not these")
    with pytest.raises(ValueError, match="is not used, its SHA-256 is"):
        InceptionV3.load()
