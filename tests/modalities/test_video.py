"""Clips as tubelets, their configuration, drawing, and the set of bouncing digits with its judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unilatent.batches import load_all
from unilatent.config import ConfigError
from unilatent.modalities.base import Evidence
from unilatent.modalities.video import Video, VideoConfig, VideoData, bouncing, judge
from unilatent.modalities.video.tokens import pack, unpack
from unilatent.records import MemoryRows

CONFIG = VideoConfig(frames=16, size=16, tubelet=(4, 4, 4), channels=1, flip=False)


def clips(count: int = 60, held_out: bool = True) -> torch.Tensor:
    video = Video(CONFIG)
    splits = video.splits(VideoData(path="bouncing", num_samples=count, held_out=count))
    data = splits.held_out if held_out else splits.train
    return video.collate([data[i][0] for i in range(count)])


def test_tubelets_hold_their_pixels():
    """Token n of a grid (T', H', W') holds frames, rows and columns of its tubelet, channels last."""
    x = torch.arange(2 * 4 * 3 * 6 * 8).view(2, 4, 3, 6, 8).float()
    tokens = pack(x, (2, 3, 4))
    assert tokens.shape == (2, 2 * 2 * 2, 2 * 3 * 4 * 3)
    token = tokens[1, 1 * 4 + 0 * 2 + 1].view(2, 3, 4, 3)  # second in time, first row, second column
    assert torch.equal(token, x[1, 2:4, :, 0:3, 4:8].permute(0, 2, 3, 1))
    assert torch.equal(unpack(tokens, 4, 6, 8, (2, 3, 4)), x)


def test_a_tubelet_of_one_frame_is_the_patch_of_images():
    from unilatent.modalities.image import tokens as patches

    x = torch.rand(2, 3, 3, 8, 8)
    frames = pack(x, (1, 4, 4)).view(2 * 3, 4, -1)
    assert torch.equal(frames, patches.pack(x.flatten(0, 1), 4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frames": 17}, "frames: frames 17 is not a multiple of the tubelet's 4; nearest that works: 16 or 20"),
        ({"size": (16, 18)}, "size: width 18 is not a multiple of the tubelet's 4; nearest that works: 16 or 20"),
        ({"frames": 3}, "nearest that works: 4"),
        ({"l1_weight": 0.0}, "set at least one"),
        ({"perceptual_weight": 1.0}, "needs channels 3 and sides of at least 32"),
        ({"stride": 0}, "stride: 0 is no number of frames"),
        ({"stride": [3, 2]}, "is no number of frames"),
        ({"given_frames": 16}, "leave no frame to make"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict, words: str):
    with pytest.raises(ConfigError) as error:
        VideoConfig.parse({**CONFIG.plain(), **fields})
    assert words in str(error.value)


def test_units_count_frames_and_pixels():
    video = Video(VideoConfig(frames=4, size=8, tubelet=(2, 4, 4)))
    assert video.units(video.pack(torch.zeros(1, 4, 3, 8, 8)).layout) == {"pixel": 256, "subpixel": 768, "frame": 4}


def test_drawing_makes_a_filmstrip_and_an_animation(tmp_path):
    video, data = Video(CONFIG), clips(3)
    video.draw_grid([data, data.flip(1)], tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.webp") as moving:
        assert moving.n_frames == 16
    with Image.open(tmp_path / "grid.png") as still:
        assert still.width > 8 * 16  # eight frames side by side
    [path] = video.write(data[:1], tmp_path / "one")
    [(read, names)] = list(video.read(tmp_path / "one", 4))
    assert names == [path.name] and torch.equal(read, (data[:1] * 255).round() / 255), "WebP files are lossless"


def test_an_mp4_is_drawn_where_pyav_is_there(tmp_path):
    av = pytest.importorskip("av")
    Video(CONFIG).draw_grid([clips(2)], tmp_path / "grid.png")
    with av.open(str(tmp_path / "grid.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16


# ---- bouncing digits


def test_a_bouncing_digit_keeps_its_mass_and_moves_by_the_law():
    drawn = bouncing.bounce(5, 16, 16)
    corners = drawn.path(16, (8.0, 8.0))
    assert corners.min() >= 0 and corners.max() <= 8
    digit = np.random.default_rng(0).random((8, 8))
    frames = bouncing.draw(digit, corners, 16, 16)
    assert np.allclose(frames.sum((1, 2)), digit.sum())
    rows = (frames.sum(2) * np.arange(16)).sum(1) / digit.sum()
    inner = (digit.sum(1) * np.arange(8)).sum() / digit.sum()
    assert np.allclose(rows, corners[:, 0] + inner), "splatting keeps the centroid"


def test_held_out_digits_are_in_no_training_clip():
    video = Video(CONFIG)
    splits = video.splits(VideoData(path="bouncing", num_samples=2000, held_out=360))
    shows = splits.train.collection.shows
    assert not set(shows[:2000]) & set(shows[2000:]) and len(set(shows[2000:])) == 360


def measured(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    return judge.BouncingDigits()(frames)


def test_the_judge_knows_lawful_motion_from_its_controls():
    real = clips(200)
    lawful = measured(real)["lawful"].float().mean()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    spliced = torch.cat([real[:, :8], real.roll(1, 0)[:, 8:]], dim=1)
    still = real[:, :1].expand(-1, 16, -1, -1, -1)
    noisy = (real + 0.05 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert lawful > 0.99 and measured(noisy)["lawful"].float().mean() > 0.97
    for control in (real[:, order], spliced, still):
        assert measured(control)["lawful"].float().mean() < 0.03


def test_the_judge_reads_the_digit_and_the_speed():
    video = Video(CONFIG)
    splits = video.splits(VideoData(path="bouncing", num_samples=1500, held_out=300))
    rows = {}
    for name, data in (("train", splits.train), ("held_out", splits.held_out)):
        batch = load_all(data, video)
        rows[name] = MemoryRows({**measured(batch.data), "labels": torch.as_tensor(batch.values["labels"])})
    train, held_out = rows["train"], rows["held_out"]
    real = {row.key: row for row in judge.BouncingMetrics()(Evidence(train, held_out, held_out))}
    assert real["recognised"].value > 96 and real["lawful"].value > 99 and real["steady"].value > 99
    assert real["speed_spread"].value == pytest.approx(100)
    wrong = MemoryRows({**{k: held_out[k] for k in ("upright", "lawful", "drift", "speed", "centres")},
                        "labels": held_out["labels"].roll(1)})  # fmt: skip
    found = {row.key: row for row in judge.BouncingMetrics()(Evidence(train, held_out, wrong))}
    assert found["recognised"].value < 30
    speed = measured(clips(100))["speed"]
    true = torch.tensor([np.hypot(*bouncing.bounce(100 + i, 16, 16).velocity) for i in range(100)])
    assert (speed - true).abs().max() < 0.1


def test_small_frames_and_other_data_are_left_alone():
    with pytest.raises(ValueError, match="at least 10 pixels"):
        Video(VideoConfig(frames=4, size=8, tubelet=(2, 4, 4))).splits(VideoData(path="bouncing", num_samples=10))
    assert judge.BouncingDigits()(torch.zeros(2, 4, 1, 8, 8)) == {}
    frames = clips(20)
    lawful, shuffled = (MemoryRows(measured(part)) for part in (frames, frames[:, torch.randperm(16)]))
    assert judge.BouncingMetrics()(Evidence(lawful, lawful, lawful))
    assert judge.BouncingMetrics()(Evidence(shuffled, shuffled, shuffled)) == []
