"""Whether clips of a bouncing digit obey: whether it is the digit that was asked for, keeps its shape, and moves as a
digit moves. A program reads this from pixels; no network is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...maths.frechet import frechet_distance_of
from ...maths.streams import generator
from ...records import Rows
from ..base import Evidence, Metric, Row, Space
from .bouncing import SIDE, SPEEDS, triangle
from .motion import CONTROLS, to_clips

WINDOW = 10
"""Side of the window around a digit's centroid in pixels."""
LAWFUL = 0.2
"""Largest distance in pixels (root mean square over frames) of a lawful path from the law's nearest one. Real clips
reach 0.08; with noise of 0.1 on each pixel a third of them pass; two clips joined are at 1.2, shuffled ones at 2.5."""
FAINT = 0.1
"""Values up to this are no digit: noise on a black ground would draw the centre of mass to the middle of the frame."""
STILL = 0.4
"""Speed in pixels per frame below which a digit does not move as those of the data do."""
STEADY = 0.06
"""Largest root mean square deviation of frames from their mean, in the window, of a digit that keeps its shape: real
clips have 0.03, different digits of a class 0.09."""
MIN_LAWFUL = 0.9
"""Smallest share of lawful real clips at which the data are of bouncing digits."""
GRID_SPEEDS, GRID_PHASES = 61, 64
"""Speeds and phases along one axis that are tried, before the best are refined."""
MAX_FITTED = 5_000
"""Largest number of training clips that the SVM is fitted to."""


def centroids(frames: Tensor) -> Tensor:
    """Return the centres of mass (row, column) of frames (B, T, H, W), (B, T, 2) pixels; the middle of black ones."""
    height, width = frames.shape[2:]
    rows = torch.arange(height, dtype=frames.dtype), frames.sum(3)
    columns = torch.arange(width, dtype=frames.dtype), frames.sum(2)
    mass = frames.sum((2, 3))
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=frames.dtype)
    found = torch.stack([(weight * place).sum(2) for place, weight in (rows, columns)], -1)
    return torch.where(mass[..., None] > 0, found / mass.clamp(min=1e-9)[..., None], middle)


def upright(frames: Tensor, centres: Tensor) -> Tensor:
    """Sample the window around each frame's centroid, bilinearly, 0 outside: (B, T, H, W) to (B, T, 10, 10)."""
    height, width = frames.shape[2:]
    offsets = torch.arange(WINDOW, dtype=frames.dtype) - (WINDOW - 1) / 2
    rows = _shares(centres[..., :1] + offsets, height)  # (B, T, 10, H)
    columns = _shares(centres[..., 1:] + offsets, width)  # (B, T, 10, W)
    return rows @ frames @ columns.mT


def _shares(places: Tensor, size: int) -> Tensor:
    """Return the weights (..., size) of the pixels of a line in a value between them."""
    return (1 - (places[..., None] - torch.arange(size, dtype=places.dtype)).abs()).clamp(min=0)


def fit_path(centres: Tensor, ways: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Fit the law of motion to centroids (B, T, 2): the distance from it in pixels, root mean square over frames, (B,),
    and the speed in pixels per frame, (B,).

    Along each axis a lawful path is a constant plus a triangle wave of any phase and of a speed up to the largest.
    """
    errors, speeds = [], []
    for axis, way in enumerate(ways):
        squared, speed = _fit_axis(centres[..., axis].double().numpy(), way)
        errors.append(squared)
        speeds.append(speed)
    squared, speed = np.sum(errors, 0), np.hypot(*speeds)
    return torch.from_numpy(np.sqrt(squared)).float(), torch.from_numpy(speed).float()


def lawful(error: Tensor, speed: Tensor) -> Tensor:
    """Whether paths with these distances from the law, and these speeds, are those of digits that move: bool (B,)."""
    return (error < LAWFUL) & (speed > STILL)


def _fit_axis(places: np.ndarray, way: float) -> tuple[np.ndarray, np.ndarray]:
    """Return of places (B, T) along an axis the smallest mean squared distance from a wave, and its speed, (B,)."""
    frames = places.shape[1]
    centred = places - places.mean(1, keepdims=True)
    speeds, phases, waves = _waves(frames, way)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b, for all waves at once
    distance = (waves**2).sum(1) - 2 * centred @ waves.T  # (B, G)
    best = distance.argmin(1)
    speed, phase = speeds[best], phases[best]
    step = SPEEDS[1] / (GRID_SPEEDS - 1), 2 * way / GRID_PHASES
    time = np.arange(frames)
    squared = np.zeros(len(places))
    for _ in range(3):  # refine around the best: steps of a quarter, then a sixteenth, ...
        step = step[0] / 4, step[1] / 4
        around = np.stack(np.meshgrid(np.arange(-5, 6), np.arange(-5, 6), indexing="ij"), -1).reshape(-1, 2)  # (121, 2)
        tried = speed[:, None] + step[0] * around[:, 0], phase[:, None] + step[1] * around[:, 1]  # (B, 121) each
        wave = triangle(tried[1][..., None] + tried[0][..., None] * time, way)  # (B, 121, T)
        error = np.square(centred[:, None] - wave + wave.mean(2, keepdims=True)).mean(2)
        best = error.argmin(1)
        rows = np.arange(len(places))
        speed, phase, squared = tried[0][rows, best], tried[1][rows, best], error[rows, best]
    return squared, np.abs(speed)


@lru_cache(maxsize=8)
def _waves(frames: int, way: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return speeds (G,), phases (G,) and centred triangle waves (G, frames)."""
    grid = np.meshgrid(
        np.linspace(0, SPEEDS[1], GRID_SPEEDS), 2 * way * np.arange(GRID_PHASES) / GRID_PHASES, indexing="ij"
    )
    speeds, phases = (axis.ravel() for axis in grid)
    waves = triangle(phases[:, None] + speeds[:, None] * np.arange(frames), way)
    return speeds, phases, waves - waves.mean(1, keepdims=True)


class BouncingDigits(Space):
    """`upright` (B, 100), the digit with its motion undone, averaged over frames; `lawful` (B,), whether it moves as
    those of the data do; `path_error`, `speed` and `drift` (B,), see `fit_path` and STEADY; `centres` (B, T 2); of
    pairs `centre_distance` (B, T), between the centres of mass."""

    name = "bouncing"

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        if min(data.shape[-2:]) <= SIDE:
            return {}
        frames = to_clips(data).cpu().float().mean(2) / 255  # (B, T, H, W)
        centres = centroids((frames - FAINT).clamp(min=0))
        windows = upright(frames, centres)
        mean = windows.mean(1)
        height, width = frames.shape[2:]
        error, speed = fit_path(centres, (height - SIDE, width - SIDE))
        drift = (windows - mean[:, None]).square().mean((1, 2, 3)).sqrt()
        return {
            "upright": mean.flatten(1), "lawful": lawful(error, speed), "path_error": error, "speed": speed,
            "drift": drift, "centres": centres.flatten(1),
        }  # fmt: skip

    def against(self, made: Tensor, data: Tensor) -> dict[str, Tensor]:
        if min(data.shape[-2:]) <= SIDE:
            return {}
        pair = [to_clips(part).cpu().float().mean(2) / 255 for part in (made, data)]
        centres = [centroids((frames - FAINT).clamp(min=0)) for frames in pair]
        return {"centre_distance": (centres[0] - centres[1]).norm(dim=2)}


class BouncingMetrics(Metric):
    """Of generated clips of bouncing digits: whether they show the digit that was asked for (an SVM fitted to training
    clips), move lawfully, keep their shape, and have real speeds; of continued ones, how far from the true place the
    digit is in the frames that were made, beside the last given frame repeated. Nothing unless the real clips move
    lawfully, as those of other data hardly do."""

    space = "bouncing"
    gives = (
        "judge_accuracy", "recognised", "lawful", "steady", "speed_spread", "frechet_upright", "path_distance",
    )  # fmt: skip
    most_samples = MAX_FITTED
    most_reference = MAX_FITTED

    def __init__(self, given: int = 0, details: Mapping[str, str] | None = None):
        """given: frames at the start of each clip that samples were given. details: the same in words."""
        self.given, self.details = given, details or {}

    def __call__(self, evidence: Evidence) -> list[Row]:
        sets = (evidence.train, evidence.held_out, evidence.samples)
        if any(rows is None or len(rows) < 2 or "upright" not in rows for rows in sets):
            return []
        train, held_out, samples = (rows for rows in sets if rows is not None)
        if float(train.first("lawful", MAX_FITTED).double().mean()) < MIN_LAWFUL:
            return []
        upright = [rows.first("upright", MAX_FITTED).float() for rows in (samples, held_out, train)]
        count = len(upright[0])
        beside = {"real train vs real": frechet_distance_of(upright[2][:count], upright[1])}
        distance = frechet_distance_of(upright[0], upright[1])
        return [
            *self._recognised(train, held_out, samples), *self._motion(held_out, samples), *self._places(samples),
            Row("frechet_upright", "Frechet distance (digits, motion undone)", distance, "", "lower", beside),
        ]  # fmt: skip

    def _recognised(self, train: Rows, held_out: Rows, samples: Rows) -> list[Row]:
        if not all("labels" in rows for rows in (train, held_out, samples)):
            return []
        from sklearn.svm import SVC

        svm = SVC(C=10, kernel="rbf", gamma="scale").fit(
            train.first("upright", MAX_FITTED).numpy(), train.first("labels", MAX_FITTED).numpy()
        )

        def accuracy(rows: Rows) -> float:
            chosen = torch.from_numpy(svm.predict(rows.first("upright", MAX_FITTED).numpy()))
            return 100 * float((chosen == rows.first("labels", MAX_FITTED)).double().mean())

        real = accuracy(held_out)
        return [
            Row("judge_accuracy", "SVM accuracy on held-out real", real, "%", headline=False),
            Row("recognised", "recognised as the requested class", accuracy(samples), "%", "higher",
                {"held-out real": real}),
        ]  # fmt: skip

    def _motion(self, held_out: Rows, samples: Rows) -> list[Row]:
        def moving(rows: Rows) -> float:
            return 100 * float(rows.first("lawful", MAX_FITTED).double().mean())

        def steady(rows: Rows) -> float:
            return 100 * float((rows.first("drift", MAX_FITTED) < STEADY).double().mean())

        controls = {"held-out real": moving(held_out), "frames shuffled": _shuffled(held_out)}
        speeds = [rows.first("speed", MAX_FITTED).double().std() for rows in (samples, held_out)]
        return [
            Row("lawful", "move lawfully", moving(samples), "%", "higher", controls),
            Row("steady", "keep their shape", steady(samples), "%", "higher",
                {"held-out real": steady(held_out)}),
            Row("speed_spread", "spread of speeds / real", 100 * float(speeds[0] / speeds[1]), "%", "same",
                {"real": 100.0}),
        ]  # fmt: skip

    def _places(self, samples: Rows) -> list[Row]:
        if "centre_distance" not in samples:
            return []
        made, still = (
            float(samples[key][:, self.given :].double().square().mean().sqrt())
            for key in ("centre_distance", "filled_centre_distance")
        )
        title = "distance from the true place, continued frames"
        return [Row("path_distance", title, made, "pixels", "lower", {CONTROLS["still"]: still})]


def _shuffled(rows: Rows) -> float:
    """Return the share of lawful clips among real ones whose frames are in random order."""
    centres = rows.first("centres", 500).unflatten(1, (-1, 2))  # (B, T, 2)
    order = torch.rand(centres.shape[:2], generator=generator("bouncing", "shuffled")).argsort(1)
    shuffled = centres.gather(1, order[..., None].expand(-1, -1, 2))
    # what the digits' places reach over is not the clip's frame, but close to it
    reach = (centres.amax((0, 1)) - centres.amin((0, 1))).tolist()
    return 100 * float(lawful(*fit_path(shuffled, (reach[0], reach[1]))).double().mean())
