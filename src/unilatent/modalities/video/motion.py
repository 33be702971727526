"""How clips move and how reconstructions of them flicker, from pixels alone; and clips spoiled in a known way.

Clips are (B, T, C, H, W) uint8, as saved to files. Feature networks see motion badly: I3D's logits change more when a
clip loses half of its resolution than when its frames are shuffled. These numbers are not blind to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...maths.streams import generator
from ...records import Rows
from .._media.render import finite_levels
from .._media.similarity import WINDOW, psnr, ssim
from ..base import Evidence, Metric, Row, Space

LEAST_FRAMES = 3
"""Frames that the measures of motion need."""


def to_clips(data: Tensor) -> Tensor:
    """Round (B, T, C, H, W) in [0, 1] to 256 levels: uint8, on its device. ValueError on NaN or infinity."""
    return finite_levels(data, "clip", "B, T, C, H, W")


# ---- reconstructions against their originals


def frame_psnr(made: Tensor, clips: Tensor) -> Tensor:
    """Return the PSNR of each frame in dB, at most 100: (B, T)."""
    _check_pair(made, clips)
    pair = (part.flatten(0, 1).float() / 255 for part in (made, clips))
    return psnr(*pair).view(made.shape[:2])


def frame_ssim(made: Tensor, clips: Tensor) -> Tensor:
    """Return the SSIM of each frame: (B, T) float64. ValueError for sides below 11 pixels."""
    _check_pair(made, clips)
    pair = (part.flatten(0, 1).float() / 255 for part in (made, clips))
    return ssim(*pair).view(made.shape[:2])


def flicker_psnr(made: Tensor, clips: Tensor) -> Tensor:
    """Return the PSNR in dB, at most 100, between |x(t + 1) - x(t)| of reconstructions and of their originals, averaged
    over time: (B,). T >= 2.

    A constant error does not lower it, an error that changes from frame to frame does.
    """
    _check_pair(made, clips)
    if made.shape[1] < 2:
        raise ValueError("flicker needs clips of at least 2 frames, these have 1")
    pair = (steps(part).abs().flatten(0, 1) for part in (made, clips))
    return psnr(*pair).view(len(made), -1).mean(1)


def reconstruction_errors(made: Tensor, clips: Tensor) -> dict[str, list[float]]:
    """Return per clip: `psnr` and `ssim` (sides of at least 11 pixels), means over frames; `psnr_worst`, the worst
    frame's; `flicker` (T >= 2)."""
    frames = frame_psnr(made, clips)
    errors = {"psnr": frames.mean(1).tolist(), "psnr_worst": frames.amin(1).tolist()}
    if min(clips.shape[-2:]) >= WINDOW:
        errors["ssim"] = frame_ssim(made, clips).mean(1).tolist()
    if clips.shape[1] > 1:
        errors["flicker"] = flicker_psnr(made, clips).tolist()
    return errors


# ---- motion


def steps(clips: Tensor, frames: int = 1) -> Tensor:
    """Return x(t + frames) - x(t), float32 in [-1, 1]: (B, T - frames, C, H, W)."""
    levels = clips.float() / 255
    return levels[:, frames:] - levels[:, :-frames]


def change(clips: Tensor) -> Tensor:
    """Return the root mean square of x(t + 1) - x(t): (B,) in [0, 1], 0 for a clip that stands still. T >= 2."""
    return _rms(steps(clips))


def persistence(clips: Tensor) -> Tensor:
    """Return how much of a change goes on into the next one: (B,) in [0, 2]. T >= 3.

    The ratio of the root mean squares of x(t + 2) - x(t) and x(t + 1) - x(t), taken over all steps that a pair consists
    of: 2 for a steady change, sqrt(2) if steps are uncorrelated, 1 for frames in random order, 0 for a clip that
    alternates between two frames. 0 also for a clip that stands still.
    """
    if clips.shape[1] < LEAST_FRAMES:
        raise ValueError(f"persistence needs clips of at least {LEAST_FRAMES} frames, these have {clips.shape[1]}")
    one = steps(clips).square().flatten(2).mean(2)  # (B, T - 1)
    two = steps(clips, 2).square().flatten(2).mean(2).mean(1)  # (B,)
    single = ((one[:, :-1] + one[:, 1:]) / 2).mean(1)  # the steps of each pair, so that the ratio is at most 2
    return torch.where(single > 0, (two / single.clamp(min=1e-12)).sqrt(), torch.zeros_like(two))


def _rms(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1).sqrt()


# ---- clips spoiled in a known way


def still(clips: Tensor, given: int = 0) -> Tensor:
    """Repeat the last given frame to the end (given 0: the first frame)."""
    known = max(given, 1)
    return torch.cat([clips[:, :known], clips[:, known - 1 : known].expand_as(clips[:, known:])], dim=1)


def shuffled(clips: Tensor, given: int = 0) -> Tensor:
    """Put the frames after the given ones in one random order, the same for all clips of a length."""
    order = torch.randperm(clips.shape[1] - given, generator=generator("frames", "shuffled", clips.shape[1], given))
    return torch.cat([clips[:, :given], clips[:, given:][:, order.to(clips.device)]], dim=1)


def halved(clips: Tensor) -> Tensor:
    """Average pixels over squares of 2 x 2, at the same size: half of the resolution (sides of at least 2 pixels)."""
    height, width = clips.shape[-2:]
    frames = F.interpolate(clips.flatten(0, 1).float(), (height // 2, width // 2), mode="area")
    frames = F.interpolate(frames, (height, width), mode="nearest").round().to(torch.uint8)
    return frames.view_as(clips)


# ---- for the evaluation


class Motion(Space):
    """`change` (B,) and `persistence` (B,), for clips of at least three frames; as controls, the same of still and
    shuffled clips, which keep given frames, and the reconstruction errors of clips at half resolution."""

    name = "motion"

    def __init__(self, given: int = 0):
        """given: frames at the start of each clip that samples were given."""
        self.given = given
        self.details = {"given": f"given{given}"} if given else {}  # controls depend on it

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        clips = to_clips(data)
        if clips.shape[1] < LEAST_FRAMES:
            return {}
        return {"change": change(clips).cpu(), "persistence": persistence(clips).cpu()}

    def controls(self, data: Tensor) -> dict[str, Tensor]:
        clips = to_clips(data)
        if clips.shape[1] < max(LEAST_FRAMES, self.given + 2) or min(clips.shape[-2:]) < 2:
            return {}
        found = {}
        for name, spoiled in (("still", still(clips, self.given)), ("shuffled", shuffled(clips, self.given))):
            found[f"{name}_change"] = change(spoiled)
            found[f"{name}_persistence"] = persistence(spoiled)
        found |= {f"halved_{k}": torch.tensor(v) for k, v in reconstruction_errors(halved(clips), clips).items()}
        return {key: value.float().cpu() for key, value in found.items()}


CONTROLS = {"still": "last frame repeated", "shuffled": "frames shuffled", "halved": "half resolution"}
"""Control -> its name in tables."""


class ClipReconstruction(Metric):
    """PSNR, SSIM and flicker of held-out reconstructions, from `reconstruction_errors`."""

    track = "reconstruction"
    gives = ("psnr", "psnr_worst", "ssim", "flicker")

    def __call__(self, evidence: Evidence) -> list[Row]:
        errors, real = evidence.reconstructions, evidence.held_out
        if errors is None or not len(errors):
            return []
        kinds = (
            ("psnr", "PSNR of held-out frames", "dB"),
            ("psnr_worst", "PSNR of each clip's worst frame", "dB"),
            ("ssim", "SSIM of held-out frames", ""),
            ("flicker", "PSNR of frame differences (flicker)", "dB"),
        )
        return [
            Row(key, name, _mean(errors, key), unit, "higher", _beside(real, key, ("halved",)))
            for key, name, unit in kinds
            if key in errors
        ]


class Continuation(Metric):
    """Of clips that continue the given frames of held-out ones: the PSNR of the frames that were made against those
    that follow, beside the last given frame repeated. High where one future is possible, as for lawful motion."""

    gives = ("rest_psnr",)

    def __init__(self, details: Mapping[str, str]):
        """details: which frames samples were given, in words."""
        self.details = details

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples = evidence.samples
        if samples is None or not len(samples) or "rest_psnr" not in samples:
            return []
        beside = {CONTROLS["still"]: _mean(samples, "filled_rest_psnr")}
        return [Row("rest_psnr", "PSNR of made frames, of given ones continued", _mean(samples, "rest_psnr"), "dB",
                    "higher", beside)]  # fmt: skip


class MotionMetrics(Metric):
    """Whether samples move as much, and as steadily, as real clips.

    motion_distance: the Wasserstein-1 distances between samples and training clips of `change` and of `persistence`,
    each divided by its standard deviation over training clips, summed.
    """

    space = "motion"
    gives = ("motion_change", "motion_persistence", "motion_distance")

    def __init__(self, details: Mapping[str, str] | None = None):
        """details: which frames samples were given, in words."""
        self.details = details or {}

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, held_out, samples = evidence.train, evidence.held_out, evidence.samples
        if train is None or samples is None or not len(samples) or "change" not in samples or "change" not in train:
            return []
        rows = []
        for key, name, unit, factor in (
            ("change", "change from frame to frame, of full range", "%", 100.0),
            ("persistence", "persistence of changes (steady 2, random order 1)", "", 1.0),
        ):
            beside = {"training": factor * _mean(train, key)}
            if held_out is not None and key in held_out:
                beside["held-out real"] = factor * _mean(held_out, key)
            controls = _beside(held_out, key, ("still", "shuffled"))
            beside |= {control: factor * value for control, value in controls.items()}
            rows.append(Row(f"motion_{key}", name, factor * _mean(samples, key), unit, "same", beside))
        distance = motion_distance(train, samples)
        if distance is None:
            return rows
        sets = {"held-out real": "", CONTROLS["still"]: "still_", CONTROLS["shuffled"]: "shuffled_"}
        beside = {}
        for name, prefix in sets.items():
            if held_out is not None and f"{prefix}change" in held_out:
                beside[name] = motion_distance(train, held_out, prefix) or 0.0
        return [*rows, Row("motion_distance", "distance of motion from training clips", distance, "", "lower", beside)]


def motion_distance(train: Rows, other: Rows, prefix: str = "") -> float | None:
    """Return `motion_distance` of a set (or of one of its controls) from training clips; None if these all move alike.

    ValueError if either set is empty.
    """
    from scipy.stats import wasserstein_distance

    total = 0.0
    for key in ("change", "persistence"):
        real, found = train[key].double(), other[f"{prefix}{key}"].double()
        spread = float(real.std(correction=0))
        if spread == 0:
            return None
        total += float(wasserstein_distance(real.numpy(), found.numpy())) / spread
    return total


def _mean(rows: Rows, key: str) -> float:
    return float(rows[key].double().mean())


def _beside(real: Rows | None, key: str, controls: tuple[str, ...]) -> dict[str, float]:
    """Return the means of a measure over real clips spoiled in a known way."""
    if real is None:
        return {}
    return {CONTROLS[control]: _mean(real, f"{control}_{key}") for control in controls if f"{control}_{key}" in real}


def _check_pair(made: Tensor, clips: Tensor) -> None:
    for part in (made, clips):
        if part.ndim != 5 or part.dtype != torch.uint8:
            raise ValueError(f"clips: need (B, T, C, H, W) uint8, got {tuple(part.shape)} {part.dtype}")
    if made.shape != clips.shape:
        raise ValueError(f"clips: both need the same shape, got {tuple(made.shape)} and {tuple(clips.shape)}")
