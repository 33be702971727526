"""Given parts of images and clips: drawn, filled, put back, read from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unilatent.maths.streams import Streams
from unilatent.modalities._media.given import draw_masks, read_mask
from unilatent.modalities.image import Image as ImageModality
from unilatent.modalities.image import ImageConfig
from unilatent.modalities.video import Video, VideoConfig
from unilatent.types import Given

IMAGE = ImageModality(ImageConfig(size=8, patch_size=4))
VIDEO = Video(VideoConfig(frames=8, size=8, tubelet=(2, 4, 4)))


def drawn(kinds: tuple[str, ...], count: int = 2000, shape: tuple[int, ...] = (8, 1, 12, 10)) -> torch.Tensor:
    return draw_masks(Streams(("given",), range(count)), shape, kinds)


def test_the_first_frames_are_given_all_numbers_of_them_equally_often():
    mask = drawn(("frames",))
    assert (mask == mask[:, :, :, :1, :1]).all(), "whole frames"
    count = mask[:, :, 0, 0, 0].sum(1)
    assert (mask[:, :, 0, 0, 0].int().diff(dim=1) <= 0).all(), "the first ones"
    numbers = torch.bincount(count, minlength=9)
    assert numbers[0] == numbers[8] == 0 and (numbers[1:8] - 2000 / 7).abs().max() < 75  # 4.7 standard deviations


def test_a_box_is_the_same_in_all_frames_and_leaves_something_to_make():
    mask = drawn(("box",))
    assert (mask == mask[:, :1]).all()
    inside = mask[:, 0, 0]
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    boxes = inside.sum((1, 2)) == rows * columns  # the given part is the box itself, or all pixels outside of one
    outside = ~inside
    others = outside.sum((1, 2)) == outside.any(2).sum(1) * outside.any(1).sum(1)
    assert (boxes | others).all() and 0.4 < boxes.float().mean() < 0.7
    sides = torch.where(boxes, rows, outside.any(2).sum(1))
    assert sides.min() == 3 and sides.max() == 9  # from a quarter to three quarters of the side
    assert inside.any((1, 2)).all() and outside.any((1, 2)).all()


def test_a_mask_depends_on_no_batch_mate():
    alone = draw_masks(Streams(("given",), [7]), (8, 1, 12, 10), ("frames", "box"))
    assert torch.equal(drawn(("frames", "box"), 20)[7:8], alone)


@pytest.mark.parametrize("modality", [IMAGE, VIDEO], ids=["image", "video"])
def test_masks_are_packed_as_the_data_are(modality):
    shape = (8, 8) if modality is IMAGE else (8, 8, 8)
    data = torch.rand(5, *([3] if modality is IMAGE else [8, 3]), 8, 8)
    mask = modality.draw_mask(data, Streams(("given",), range(5)), modality.given_kinds)
    assert mask.shape == (5, *data.shape[1:-3], 1, 8, 8) and len(shape)
    packed = modality.pack_mask(mask)
    values = modality.pack(torch.where(mask, data, -1.0)).values  # (B, N, C)
    assert packed.shape == (*values.shape[:2], modality.mask_channels)
    assert torch.equal(packed.repeat_interleave(3, dim=2).bool(), values >= 0)


@pytest.mark.parametrize("modality", [IMAGE, VIDEO], ids=["image", "video"])
def test_put_back_is_exact_and_fill_sees_nothing_else(modality):
    data = torch.rand(6, *([3] if modality is IMAGE else [8, 3]), 8, 8)
    mask = modality.draw_mask(data, Streams(("given",), range(6)), modality.given_kinds)
    made = torch.rand_like(data)
    back = modality.put_back(made, Given(data, mask))
    where = mask.expand_as(data)
    assert torch.equal(back[where], data[where]) and torch.equal(back[~where], made[~where])
    other = torch.where(mask, data, torch.rand_like(data))
    filled = modality.fill(Given(data, mask))
    assert torch.equal(filled, modality.fill(Given(other, mask))) and torch.equal(filled[where], data[where])


def test_the_last_given_frame_fills_the_rest():
    data, mask = torch.rand(1, 8, 3, 8, 8), torch.zeros(1, 8, 1, 8, 8, dtype=torch.bool)
    mask[:, :3] = True
    filled = VIDEO.fill(Given(data, mask))
    assert torch.equal(filled[0, 3:], data[0, 2].expand(5, -1, -1, -1))
    assert (VIDEO.fill(Given(data, torch.zeros_like(mask))) == 0.5).all()


def test_errors_are_of_the_rest_alone():
    data = torch.rand(2, 8, 3, 8, 8)
    mask = torch.zeros(2, 8, 1, 8, 8, dtype=torch.bool)
    mask[:, :5] = True
    made = data.clone()
    made[:, 5:] += 0.1
    made[:, :5] += 0.5
    errors = VIDEO.errors_of_rest(made, data, Given(data, mask))
    assert errors["rest_psnr"] == pytest.approx([20.0, 20.0], abs=1e-3)
    still = data[:, 4:5].expand(-1, 3, -1, -1, -1)
    want = -10 * (still - data[:, 5:]).square().mean((1, 2, 3, 4)).log10()
    assert errors["filled_rest_psnr"] == pytest.approx(want.tolist(), rel=1e-4)


def picture(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_an_image_and_its_mask_are_read(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    white = np.zeros((8, 8), np.uint8)
    white[2:5, 1:7] = 255
    given = IMAGE.read_given(picture(tmp_path / "a.png", pixels), picture(tmp_path / "m.png", white), None)
    assert torch.equal(given.mask[0, 0], torch.from_numpy(white == 0))
    assert torch.equal(given.data[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("mask", "frames", "words"),
    [
        (None, None, "--mask: not set"),
        ("m.png", 5, "--frames: 5, but samples of this model are images"),
        ("black.png", None, "is black everywhere"),
        ("text.png", None, "--mask: "),
        ("absent.png", None, "No such file"),
    ],
)
def test_what_cannot_be_given_of_an_image_is_refused(tmp_path: Path, mask: str | None, frames: int | None, words: str):
    picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    picture(tmp_path / "m.png", np.full((8, 8), 255, np.uint8))
    picture(tmp_path / "black.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError) as error:
        IMAGE.read_given(tmp_path / "a.png", None if mask is None else tmp_path / mask, frames)
    assert words in str(error.value)


def test_frames_of_a_clip_are_given_and_the_others_kept_beside(tmp_path: Path):
    data = torch.rand(1, 8, 3, 8, 8).mul(255).round() / 255
    [path] = VIDEO.write(data, tmp_path)
    given = VIDEO.read_given(path, None, 3)
    assert given.mask[0, :, 0, 0, 0].tolist() == [True] * 3 + [False] * 5
    assert torch.equal(given.data, data), "what follows in the file is there to compare with"
    one = VIDEO.read_given(picture(tmp_path / "p.png", np.full((8, 8, 3), 51, np.uint8)), None, None)
    assert one.mask[0, :, 0, 0, 0].tolist() == [True] + [False] * 7 and (one.data == 0.2).all()
    white = np.zeros((8, 8), np.uint8)
    white[:4] = 255
    painted = VIDEO.read_given(path, picture(tmp_path / "m.png", white), None)
    assert painted.mask[0, :, 0, :, 0].tolist() == [[False] * 4 + [True] * 4] * 8
    with pytest.raises(ValueError, match=r"--frames: 8, but clips have 8 frames"):
        VIDEO.read_given(path, None, 8)
    strided = Video(VIDEO.config.model_copy(update={"stride": 2}))
    every_second = strided.read_given(path, None, 3)
    assert torch.equal(every_second.data[:, :4], data[:, ::2])
    with pytest.raises(ValueError, match=r"has 4 frames \(every 2 of 8\), 5 are asked for"):
        strided.read_given(path, None, 5)


def test_a_mask_is_cropped_as_its_image(tmp_path: Path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 8:] = 255
    assert torch.equal(
        read_mask(picture(tmp_path / "m.png", wide), IMAGE.frame)[0],
        torch.tensor([True] * 4 + [False] * 4).expand(8, 8),
    )
