"""Motion and flicker of clips by closed forms, and the order that known kinds of damage must have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unilatent.modalities._media.similarity import ssim
from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.video import Video, VideoConfig
from unilatent.modalities.video.motion import (
    ClipReconstruction,
    Motion,
    MotionMetrics,
    change,
    flicker_psnr,
    frame_psnr,
    frame_ssim,
    halved,
    persistence,
    reconstruction_errors,
    shuffled,
    still,
    to_clips,
)
from unilatent.records import MemoryRows


def of_levels(levels: list[int], side: int = 4) -> Tensor:
    """One clip whose frames are uniform: (1, T, 1, side, side)."""
    return torch.tensor(levels, dtype=torch.uint8).view(1, -1, 1, 1, 1).expand(1, -1, 1, side, side).contiguous()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def moving(count: int = 12, frames: int = 10, side: int = 16, seed: int = 0) -> Tensor:
    """Clips of a smooth blob that moves at a constant speed of its own, around a torus: (count, frames, 1, s, s)."""
    stream = torch.Generator().manual_seed(seed)
    start, angle = torch.rand(count, 2, generator=stream) * side, torch.rand(count, generator=stream) * 2 * math.pi
    speed = 0.5 + torch.rand(count, 1, generator=stream)
    place = (
        start[:, None]
        + torch.arange(frames)[None, :, None] * (speed * torch.stack([angle.cos(), angle.sin()], 1))[:, None]
    )
    grid = torch.arange(side)
    near = [((grid - place[..., axis, None]) * 2 * math.pi / side).cos() for axis in (0, 1)]  # (count, frames, side)
    blob = (2 * (near[0][..., :, None] + near[1][..., None, :] - 2)).exp()
    return to_clips(blob[:, :, None])


# ---- closed forms


def test_psnr_of_each_frame():
    """An error of 51 levels is 1/5 of the range: 20 log10(5) dB."""
    clips = of_levels([100, 100, 100])
    made = clips.clone()
    made[:, 1] += 51
    assert frame_psnr(made, clips)[0].tolist() == pytest.approx([100, 20 * math.log10(5), 100], abs=1e-4)


def test_ssim_of_each_frame_is_that_of_its_image():
    made, clips = noise(2, 3, 3, 12, 13), noise(2, 3, 3, 12, 13, seed=1)
    want = ssim(made[1, 2][None].float() / 255, clips[1, 2][None].float() / 255)
    assert frame_ssim(made, clips).shape == (2, 3)
    assert torch.equal(frame_ssim(made, clips)[1, 2], want[0])


def test_a_constant_error_does_not_flicker_and_an_alternating_one_does():
    """+25.5 on every second frame of a still clip: |x(t + 1) - x(t)| is off by 1/10 at every step, 20 dB."""
    clips = of_levels([100] * 6)
    assert flicker_psnr(clips + 30, clips).tolist() == [100]
    alternating = clips.clone()
    alternating[:, ::2] += 51
    assert float(flicker_psnr(alternating, clips)) == pytest.approx(20 * math.log10(5), abs=1e-4)
    assert float(frame_psnr(alternating, clips).mean()) > float(frame_psnr(clips + 30, clips).mean())


def test_errors_of_a_clip():
    clips = noise(2, 4, 1, 12, 12)
    made = clips.clone()
    made[0, 2] = 255 - made[0, 2]
    errors = reconstruction_errors(made, clips)
    frames = frame_psnr(made, clips)
    assert list(errors) == ["psnr", "psnr_worst", "ssim", "flicker"]
    assert errors["psnr"] == pytest.approx([float(frames[0].mean()), 100])
    assert errors["psnr_worst"] == pytest.approx([float(frames[0, 2]), 100])
    assert errors["ssim"][1] == 1 > errors["ssim"][0]
    assert list(reconstruction_errors(made[:, :1, :, :8], clips[:, :1, :, :8])) == ["psnr", "psnr_worst"]


def test_change_by_hand():
    assert change(of_levels([0, 51, 102, 51])).tolist() == pytest.approx([0.2])
    assert change(of_levels([0, 102, 102])).tolist() == pytest.approx([0.4 / math.sqrt(2)])


@pytest.mark.parametrize(
    ("levels", "want"),
    [([0, 10, 20, 30, 40], 2.0), ([0, 90, 0, 90, 0], 0.0), ([7, 7, 7, 7], 0.0), ([0, 10, 10], math.sqrt(2))],
    ids=["steady", "alternating", "still", "one step"],
)
def test_persistence_by_hand(levels: list[int], want: float):
    assert persistence(of_levels(levels)).tolist() == pytest.approx([want], abs=1e-6)


def test_persistence_of_random_clips():
    """Independent frames: 1. Independent steps: sqrt(2). In expectation over many pixels, here 1 % off at most."""
    independent = noise(1, 12, 1, 64, 64)
    assert float(persistence(independent)) == pytest.approx(1, rel=0.01)
    steps = torch.randint(-9, 10, (1, 12, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    assert float(persistence((128 + steps.cumsum(1)).to(torch.uint8))) == pytest.approx(math.sqrt(2), rel=0.01)
    assert float(persistence(noise(1, 9, 3, 8, 8))) <= 2


# ---- clips spoiled in a known way


def test_a_still_clip_repeats_the_last_given_frame():
    clips = of_levels([1, 2, 3, 4, 5])
    assert still(clips)[0, :, 0, 0, 0].tolist() == [1, 1, 1, 1, 1]
    assert still(clips, given=2)[0, :, 0, 0, 0].tolist() == [1, 2, 2, 2, 2]
    assert still(clips, given=5)[0, :, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_shuffling_keeps_the_given_frames_and_the_set_of_all():
    clips = of_levels(list(range(16)))
    found = shuffled(clips, given=5)[0, :, 0, 0, 0].tolist()
    assert found[:5] == [0, 1, 2, 3, 4] and sorted(found) == list(range(16)) != found
    both = torch.cat([clips, clips + 100])
    assert torch.equal(shuffled(both)[1] - 100, shuffled(both)[0]), "the order does not depend on the batch"


def test_half_resolution_by_hand():
    clip = torch.tensor([[0, 8, 100, 100], [4, 0, 100, 104]], dtype=torch.uint8).view(1, 1, 1, 2, 4)
    assert halved(clip)[0, 0, 0].tolist() == [[3, 3, 101, 101], [3, 3, 101, 101]]
    assert halved(noise(2, 3, 3, 9, 7)).shape == (2, 3, 3, 9, 7)


def test_clips_are_rounded_to_8_bits():
    data = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.2]).view(1, 5, 1, 1, 1)
    assert to_clips(data).flatten().tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2"):
        to_clips(torch.stack([data[0], data[0] / 0]))
    with pytest.raises(ValueError, match=r"need \(B, T, C, H, W\), got shape \(5, 1, 1, 1\)"):
        to_clips(data[0])


@pytest.mark.parametrize("measure", [frame_psnr, frame_ssim, flicker_psnr])
def test_pairs_of_other_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"both need the same shape, got \(1, 3, 1, 12, 12\) and \(1, 4, 1, 12, 12\)"):
        measure(noise(1, 3, 1, 12, 12), noise(1, 4, 1, 12, 12))
    with pytest.raises(ValueError, match=r"uint8, got .* torch\.float32"):
        measure(noise(1, 3, 1, 12, 12).float(), noise(1, 3, 1, 12, 12))


# ---- metrics


def evidence(samples: Tensor) -> Evidence:
    space = Motion()
    data = [moving(60, seed=1), moving(60, seed=2)]
    train, held_out = (MemoryRows(space(clips / 255) | space.controls(clips / 255)) for clips in data)
    return Evidence(train=train, held_out=held_out, samples=MemoryRows(space(samples / 255)))


def rows(samples: Tensor) -> dict[str, Row]:
    return {row.key: row for row in MotionMetrics()(evidence(samples))}


def test_real_motion_is_near_and_damaged_motion_is_far():
    real = moving(60, seed=3)
    found = {"real": real, "shuffled": shuffled(real), "still": still(real), "halved": halved(real)}
    distances = {name: rows(clips)["motion_distance"].value for name, clips in found.items()}
    assert distances["real"] < 1 < min(distances["shuffled"], distances["still"])
    assert distances["halved"] < distances["shuffled"], "loss of detail is not loss of motion"
    row = rows(real)["motion_distance"]
    assert row.beside["held-out real"] < 1 < min(row.beside["last frame repeated"], row.beside["frames shuffled"])


def test_means_stand_beside_those_of_real_clips():
    found = rows(shuffled(moving(60, seed=3)))
    change_row, persistence_row = found["motion_change"], found["motion_persistence"]
    assert change_row.beside["last frame repeated"] == 0 and change_row.value > change_row.beside["held-out real"]
    assert persistence_row.value == pytest.approx(persistence_row.beside["frames shuffled"], abs=0.1)
    assert 1.5 < persistence_row.beside["held-out real"] <= 2


def test_reconstructions_stand_beside_half_resolution():
    clips = moving(6)
    held_out = MemoryRows(Motion().controls(clips / 255))
    errors = {k: torch.tensor(v) for k, v in reconstruction_errors(halved(clips), clips).items()}
    found = ClipReconstruction()(Evidence(held_out=held_out, reconstructions=MemoryRows(errors)))
    assert [row.key for row in found] == ["psnr", "psnr_worst", "ssim", "flicker"]
    for row in found:
        assert row.value == pytest.approx(row.beside["half resolution"])
        assert list(row.beside) == ["half resolution"], "nothing is given of a reconstruction, that could be repeated"


def test_baselines_of_samples_keep_what_is_given_and_those_of_reconstructions_do_not():
    clips = moving(6)
    whole, given = Motion().controls(clips / 255), Motion(5).controls(clips / 255)
    for name in ("psnr", "psnr_worst", "ssim", "flicker"):
        assert torch.equal(given[f"halved_{name}"], whole[f"halved_{name}"])
    assert not torch.equal(given["still_change"], whole["still_change"]), "samples are given them"


def test_given_frames_are_part_of_what_samples_are_measured_with():
    """Also of what is stored: controls of real clips depend on them."""
    assert Motion(5).details == {"given": "given5"} and Motion().details == {}
    config = VideoConfig.small().model_copy(update={"given_frames": 2})
    found = {key: metric.details for metric in Video(config).metrics() for key in metric.gives}
    for key in ("rest_psnr", "motion_change", "lawful"):
        assert found[key] == {"given": "given2-real"}
    assert found["psnr"] == {} and found["rfvd"]["given"] == "given0"
    assert all(not details for key, details in (
        (key, metric.details) for metric in Video(VideoConfig.small()).metrics() for key in metric.gives
    ) if "vd" not in key)  # fmt: skip


def test_clips_of_two_frames_have_no_motion():
    assert Motion()(moving(3, frames=2) / 255) == {} and Motion().controls(moving(3, frames=2) / 255) == {}
    assert MotionMetrics()(evidence(moving(2, frames=2))) == []
