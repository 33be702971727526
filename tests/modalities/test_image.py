"""Images as tokens: the rearrangement, invalid configurations, the loss, flipping, drawing."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch import nn

from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.modalities._media import losses
from unilatent.modalities.image import Image, ImageConfig
from unilatent.registry import available, find
from unilatent.types import Tokens


def make(**fields) -> Image:
    return Image(ImageConfig.parse({"size": 8, "patch_size": 2} | fields))


def images(n: int = 3, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_the_registry_finds_it():
    assert "image" in available("modalities") and find("modalities", "image") is Image


@pytest.mark.parametrize(
    ("size", "patch", "channels"), [(8, 2, 3), ([4, 6], 2, 3), ([6, 4], 2, 1), (5, 5, 3), (4, 1, 1)]
)
def test_unpack_inverts_pack_exactly(size, patch, channels):
    image = make(size=size, patch_size=patch, channels=channels)
    height, width = image.config.height, image.config.width
    data = images(2, channels, height, width)
    tokens = image.pack(data)
    assert tokens.values.shape == (2, image.max_tokens, image.channels)
    assert image.max_tokens == height * width // patch**2 and image.channels == channels * patch**2
    assert tokens.layout.mask is None and tokens.layout.positions.shape == (1, image.max_tokens, image.axes)
    assert torch.equal(image.unpack(tokens), data)


def test_order_of_patches_and_of_values_in_a_patch():
    """Patches row by row; inside a patch (row p, column q, channel c), c fastest."""
    image = make(size=[4, 6], patch_size=2)
    data = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6).float()
    tokens = image.pack(data)
    for n, (row, column) in enumerate(tokens.layout.positions[0].long().tolist()):
        assert n == row * 3 + column
        want = [data[0, c, 2 * row + p, 2 * column + q].item() for p in range(2) for q in range(2) for c in range(3)]
        assert tokens.values[0, n].tolist() == want


def test_a_new_sample_has_the_layout_of_pack():
    image = make(size=[4, 6])
    drawn = image.sample_layout(Streams(("a",), range(2)))
    assert torch.equal(drawn.positions, image.pack(images(1, 3, 4, 6)).layout.positions)
    assert drawn.positions.dtype == torch.float32 and drawn.mask is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 30, "patch_size": 4}, ["size: 30 is not a multiple of patch_size 4", "28 or 32"]),
        ({"size": [30, 32], "patch_size": 8}, ["[30, 32]", "[24, 32] or [32, 32]"]),
        ({"size": 2, "patch_size": 4}, ["size: 2 is smaller than patch_size 4", "works: 4"]),
        ({"size": [8, 2], "patch_size": 4}, ["[8, 2] is smaller", "[8, 4]"]),
        ({"size": 0}, ["size: 0", "[height, width]"]),
        ({"size": "big"}, ["size: 'big'", "[height, width]"]),
        ({"size": [8, 8, 8]}, ["size: [8, 8, 8]"]),
        ({"patch_size": 0}, ["patch_size: 0"]),
        ({"channels": 2}, ["channels: 2"]),
        ({"l1_weight": -1}, ["l1_weight: -1"]),
        ({"l1_weight": 0}, ["l1_weight", "all are 0"]),
        ({"perceptual_weight": 1}, ["perceptual_weight: 1.0", "at least 32"]),
        ({"perceptual_weight": 1, "size": [64, 16]}, ["size is [64, 16]"]),
        ({"perceptual_weight": 1, "size": 32, "channels": 1}, ["perceptual_weight", "channels 3, not 1"]),
        ({"patchsize": 2}, ["patchsize", "did you mean 'patch_size'"]),
    ],
)
def test_invalid_configurations_are_refused_with_a_fix(fields, words):
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_the_configuration_round_trips():
    config = make(size=[4, 6], flip=False).config
    assert ImageConfig.parse(config.plain()) == config and (config.height, config.width) == (4, 6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((1, 3, 8, 8)), ["ndarray"]),
        (torch.zeros(3, 8, 8), ["(B, 3, 8, 8)", "(3, 8, 8)", "images[None]"]),
        (torch.zeros(1, 1, 8, 8), ["(B, 3, 8, 8)", "(1, 1, 8, 8)"]),
        (torch.zeros(1, 3, 8, 9), ["(1, 3, 8, 9)"]),
        (torch.zeros(0, 3, 8, 8), ["empty"]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["torch.uint8", "divide by 255"]),
        (torch.full((1, 3, 8, 8), 200.0), ["[200, 200]", "divide by 255"]),
        (torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), ["[-1, 1]", "(images + 1) / 2"]),
        (torch.full((1, 3, 8, 8), float("nan")), ["NaN"]),
        (torch.full((1, 3, 8, 8), float("inf")), ["inf"]),
    ],
)
def test_check_names_what_is_expected_and_what_was_given(data, words):
    with pytest.raises(ValueError, match="images: expected") as error:
        make().check(data)
    assert all(word in str(error.value) for word in words), error.value


def test_check_returns_images_unchanged():
    data = images() * 1.0005
    assert make().check(data) is data


def test_finish_clamps():
    image = make().finish(torch.tensor([-0.5, 0.25, 1.5], dtype=torch.float64))
    assert image.tolist() == [0, 0.25, 1] and image.dtype == torch.float32


# ---- loss ----------------------------------------------------------------------------------------------------------


def test_loss_terms_are_weighted_means_and_zero_at_the_truth():
    image = make(l1_weight=2.0, squared_weight=3.0)
    data = images()
    off = Tokens(image.pack(data).values + 0.1, image.pack(data).layout)
    terms = image.reconstruction_loss(off, data)
    assert set(terms) == {"l1", "squared"}
    assert terms["l1"].item() == pytest.approx(2 * 0.1, rel=1e-4)
    assert terms["squared"].item() == pytest.approx(3 * 0.01, rel=1e-4)
    assert all(term.item() == 0 for term in image.reconstruction_loss(image.pack(data), data).values())


def test_only_terms_with_a_weight_appear():
    image = make(l1_weight=0, squared_weight=1)
    assert set(image.reconstruction_loss(image.pack(images()), images())) == {"squared"}


class FakeLPIPS(nn.Module):
    """Mean squared difference, which checks the scale and precision of its inputs."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        assert b.amin() >= -1 and b.amax() <= 1 and b.amin() < -0.9
        return (a - b).square().flatten(1).mean(1)


def test_perceptual_term_in_float32_on_images_in_minus_one_to_one(monkeypatch):
    loaded = []
    monkeypatch.setattr(losses, "lpips", lambda file, device, dtype: loaded.append((file, device.type)) or FakeLPIPS())
    image = make(size=32, l1_weight=0, perceptual_weight=0.5, perceptual_weights="vgg.pth")
    data = images(2, 3, 32, 32)
    values = (image.pack(data).values + 0.1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = image.reconstruction_loss(Tokens(values, image.pack(data).layout), data)
    assert loaded == [("vgg.pth", "cpu")] and set(terms) == {"perceptual"}
    assert terms["perceptual"].item() == pytest.approx(0.5 * 0.2**2, rel=1e-4)
    terms["perceptual"].backward()
    assert values.grad is not None and values.grad.abs().sum() > 0


def test_missing_perceptual_weights_are_named(tmp_path):
    image = make(size=32, perceptual_weight=1, perceptual_weights=str(tmp_path / "nowhere.pth"))
    data = images(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        image.reconstruction_loss(image.pack(data), data)


def test_no_network_is_loaded_without_a_perceptual_weight(monkeypatch):
    monkeypatch.setattr(losses, "lpips", lambda *_: pytest.fail("loaded"))
    make().reconstruction_loss(make().pack(images()), images())


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_each_image_is_flipped_by_its_own_stream():
    image = make()
    data = images(32)
    mirror = Streams(("augment", 0), range(32)).uniform() < 0.5
    out = image.augment(data, Streams(("augment", 0), range(32)))
    assert 0 < mirror.sum() < 32
    assert torch.equal(out[mirror], data[mirror].flip(-1)) and torch.equal(out[~mirror], data[~mirror])
    alone = image.augment(data[5:6], Streams(("augment", 0), [5]))  # independent of the batch
    assert torch.equal(alone[0], out[5])


def test_flipping_can_be_disabled():
    data = images(8)
    assert make(flip=False).augment(data, Streams(("a",), range(8))) is data


# ---- drawing -------------------------------------------------------------------------------------------------------


def test_written_images_are_rounded_and_numbered(tmp_path):
    data = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255]).reshape(1, 1, 2, 2).repeat(2, 3, 1, 1)
    paths = make(size=2).write(data, tmp_path / "new", start=7)
    assert [path.name for path in paths] == ["000007.png", "000008.png"]
    assert np.asarray(PIL.open(paths[1]))[..., 1].tolist() == [[0, 0], [1, 255]]
    assert sorted(os.listdir(tmp_path / "new")) == ["000007.png", "000008.png"]  # no partial file is left


def test_written_and_read_back(tmp_path):
    image = make(size=[4, 6])
    data = (images(5, 3, 4, 6) * 255).round() / 255
    image.write(data, tmp_path)
    batches = list(image.read(tmp_path, batch_size=2))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1]
    assert [name for _, names in batches for name in names] == [f"{i:06d}.png" for i in range(5)]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), data)


@pytest.mark.parametrize(("side", "factor"), [(8, 4), (16, 2), (28, 2), (32, 1), (64, 1)])
def test_grid_magnifies_small_images_by_an_integer_factor(tmp_path, side, factor):
    data = images(3, 1, side, side)
    make(size=side, channels=1).draw_grid([data, data], tmp_path / "grid.png")
    grid = np.asarray(PIL.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (side * factor + 2) + 2, 3 * (side * factor + 2) + 2)
    left = 2 + side * factor + 2  # the second image of the first row
    cell = grid[2 : 2 + side * factor, left : left + side * factor]
    want = (data[1, 0] * 255).round().to(torch.uint8).numpy()
    assert (cell[factor // 2 :: factor, factor // 2 :: factor] == want).all()
    assert (cell == np.kron(want, np.ones((factor, factor), np.uint8))).all()


def test_long_rows_wrap_and_pairs_stay_together(tmp_path):
    image = make(size=32, channels=1)
    originals, copies = torch.zeros(5, 1, 32, 32), torch.full((5, 1, 32, 32), 0.5)
    image.draw_grid([originals, copies], tmp_path / "grid.png", columns=3)
    grid = np.asarray(PIL.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 34 + 2, 3 * 34 + 2)
    assert grid[18::34, 18].tolist() == [0, 128, 0, 128]
    assert grid[18::34, 18 + 68].tolist() == [0, 128, 255, 255]  # five images: the last place stays white


def test_an_interrupted_drawing_leaves_the_old_file(tmp_path, monkeypatch):
    image, path = make(), tmp_path / "grid.png"
    image.draw_grid([images()], path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        image.draw_grid([1 - images()], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["grid.png"]
