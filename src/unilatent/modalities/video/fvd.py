"""FVD, the Frechet distance of clips in the logits of I3D (Unterthiner et al. 2018, arXiv:1812.01717), and its
protocol.

Two FVDs are comparable only if everything in `ClipProtocol` is the same, the real clips are the same, and so is their
number: below 10,000 clips the sampling error of the two sets alone exceeds what separates good models. So a distance
between real clips stands beside each, at the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...maths.fidelity import kernel_distance
from ...maths.frechet import Moments, frechet_distance, moments
from ...nets.i3d import I3D, check_frames
from ...pretrained import fingerprint
from ...records import Rows
from ..base import Evidence, Metric, Row, Space
from .motion import CONTROLS, halved, shuffled, still, to_clips

BENCHMARK_SIDE = 64
"""Kinetics-600's published FVDs are of clips of 64 x 64 pixels, whatever size was generated."""
NOTHING_GIVEN = "given0"
FIRST = 10_000
"""KVD uses at most the first 10,000 clips of each set."""


@dataclass(frozen=True)
class ClipProtocol:
    """What an FVD depends on besides clips and weights.

    frames, size: of a generated clip, size as (height, width) in pixels. stride: frames of a video from one frame of a
    clip to the next. given: how many frames at the start samples were given. context: what is scored in their place:
    the "real" ones, "decoded" ones (as the model reconstructs them), or "left out", nothing. resize: a key of
    `nets.resizing.STRETCHES`. How many clips are taken of a video is part of the data set's details.
    """

    frames: int
    size: tuple[int, int]
    stride: int = 1
    given: int = 0
    context: Literal["real", "decoded", "left out"] = "real"
    resize: str = "tf1"

    @property
    def scored_frames(self) -> int:
        """Frames that the network sees."""
        return self.frames - (self.given if self.context == "left out" else 0)

    @property
    def scored_sides(self) -> tuple[int | None, ...]:
        """Sides that clips are scored at: their own (None), and the benchmark's 64 if they are larger."""
        return (None, BENCHMARK_SIDE) if max(self.size) > BENCHMARK_SIDE else (None,)

    def details(self) -> dict[str, str]:
        """Return it in words, for `evaluation.protocol.Protocol`."""
        clip = {"clip": f"{self.frames}f-stride{self.stride}"}
        return {**clip, "given": NOTHING_GIVEN, **self.of_given, "resize": f"resize-{self.resize}"}

    @property
    def of_given(self) -> dict[str, str]:
        """What is given, in words; empty if nothing is."""
        return {"given": f"given{self.given}-{self.context}"} if self.given else {}


class Inflated(Space):
    """`logits` (B, 400) of I3D and, for clips larger than 64 pixels, `logits_64`, of clips stretched to 64 x 64 first.

    As controls, the same of held-out clips whose last given frame is repeated, whose frames are shuffled, and that have
    half of their resolution: `still_logits`, `shuffled_logits`, `halved_logits` (and ..._64). `weights` is the SHA-256
    of the network's tensors, independent of how they are stored.
    """

    name = "i3d"
    needs_download = True
    loaded = ("network",)

    def __init__(self, protocol: ClipProtocol, weights: str | None = None):
        """weights: a local file; None: the cache, or a download. See `nets.i3d.I3D.load`."""
        self.protocol, self.file = protocol, weights

    @property
    def details(self) -> Mapping[str, str]:  # type: ignore[override]
        """The protocol, and the first digits of the weights' hash."""
        return {**self.protocol.details(), **({"weights": f"i3d-{self.weights[:8]}"} if self.weights else {})}

    def prepare(self, device: torch.device) -> None:
        """ValueError if the clips are too short, or the weights cannot be had."""
        check_frames(self.protocol.scored_frames)
        self.use(I3D.load(self.file, self.protocol.resize), device)

    def use(self, network: I3D, device: torch.device) -> None:
        """Take this network."""
        self.weights = fingerprint(network.network)
        self.network, self.device = network.to(device), device

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        return self._logits(to_clips(data), "")

    def controls(self, data: Tensor) -> dict[str, Tensor]:
        clips, given = to_clips(data), self.protocol.given
        spoiled: dict[str, Callable[[], Tensor]] = {
            "still": lambda: still(clips, given),
            "shuffled": lambda: shuffled(clips, given),
            "halved": lambda: halved(clips),
        }
        return {key: value for name, make in spoiled.items() for key, value in self._logits(make(), f"{name}_").items()}

    def _logits(self, clips: Tensor, prefix: str) -> dict[str, Tensor]:
        if self.protocol.context == "left out":
            clips = clips[:, self.protocol.given :]
        clips = clips.to(self.device)
        return {
            prefix + feature_name(side): self.network(clips, side).logits.cpu() for side in self.protocol.scored_sides
        }


def feature_name(side: int | None) -> str:
    """Return the name of the logits of clips scored at a side; None: at their own size."""
    return "logits" if side is None else f"logits_{side}"


class _VideoMetric(Metric):
    space = "i3d"
    needs_held_out = True
    key = ""
    title = ""

    def __init__(self, protocol: ClipProtocol, side: int | None = None):
        """side: clips are stretched to this side first; None: scored at their own size."""
        height, width = protocol.size
        self.feature = feature_name(side)
        self.gives = (self.key if side is None else f"{self.key}_{side}",)
        self.details = {"size": f"{height}x{width}" + ("" if side is None else f"-scored-{side}x{side}")}
        self.name = self.title if side is None else f"{self.title} at {side} x {side}"


class FrechetVideoDistance(_VideoMetric):
    """FVD of samples to training clips.

    Beside it, each of as many clips as there are samples or held-out ones, whichever is less: the distance of held-out
    real clips, and of held-out clips spoiled in a known way (`Inflated.controls`); with fewer held-out clips than
    samples, also the FVD of the first so many samples. Without held-out clips: the distance between two halves of the
    training clips.
    """

    key, title = "fvd", "FVD"

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, samples, feature = evidence.train, evidence.samples, self.feature
        if train is None or samples is None or len(samples) < 2 or not _has(train, feature):
            return []
        real = train.moments(feature)
        value = frechet_distance(real, samples.moments(feature))
        beside = self._beside(real, train, evidence.held_out, samples)
        return [Row(self.gives[0], self.name, value, "", "lower", beside)]

    def _beside(self, real: Moments, train: Rows, held_out: Rows | None, samples: Rows) -> dict[str, float]:
        feature = self.feature
        if held_out is None or feature not in held_out or len(held_out) < 2:
            return {} if feature not in train or len(train) < 4 else halves(train[feature], len(samples))
        n = min(len(held_out), len(samples))
        found = {f"held-out real, n = {n:,}": frechet_distance(real, moments(evenly(held_out[feature], n)))}
        if n < len(samples):
            found[f"the first {n:,} samples"] = frechet_distance(real, moments(samples.first(feature, n)))
        for control, name in CONTROLS.items():
            if (key := f"{control}_{feature}") in held_out:
                found[name] = frechet_distance(real, moments(evenly(held_out[key], n)))
        return found


class KernelVideoDistance(_VideoMetric):
    """KVD: the squared MMD of I3D's logits with KID's kernel, whose estimate is unbiased at any number of clips."""

    key, title = "kvd", "KVD"
    most_samples = most_reference = FIRST

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, held_out, samples, feature = evidence.train, evidence.held_out, evidence.samples, self.feature
        if train is None or samples is None or feature not in train or min(len(train), len(samples)) < 2:
            return []
        real = train.first(feature, FIRST)
        kernel = kernel_distance(real, samples.first(feature, FIRST))
        beside = {}
        if held_out is not None and feature in held_out and len(held_out) > 1:
            beside["held-out real"] = kernel_distance(real, held_out.first(feature, FIRST)).mean
        return [Row(self.gives[0], self.name, kernel.mean, "", "lower", beside, kernel.std)]


class ReconstructionFVD(_VideoMetric):
    """rFVD: the FVD of reconstructions to their own originals, beside that of the originals spoiled in a known way.

    Of a reconstruction no frame is given. So frames that samples are given do not belong to its protocol, unless they
    are left out of what is scored; and baselines that keep them are left out.
    """

    key, title, track = "rfvd", "rFVD", "reconstruction"

    def __init__(self, protocol: ClipProtocol, side: int | None = None):
        super().__init__(protocol, side)
        self.controls = {name: text for name, text in CONTROLS.items() if name == "halved" or not protocol.given}
        if protocol.context != "left out":
            self.details = {**self.details, "given": NOTHING_GIVEN}

    def __call__(self, evidence: Evidence) -> list[Row]:
        real, made, feature = evidence.held_out, evidence.reconstructions, self.feature
        if real is None or made is None or len(made) < 2 or feature not in real:
            return []
        of_real = real.moments(feature)
        spoiled = {name: f"{control}_{feature}" for control, name in self.controls.items()}
        beside = {name: frechet_distance(of_real, real.moments(key)) for name, key in spoiled.items() if key in real}
        return [Row(self.gives[0], self.name, frechet_distance(of_real, made.moments(feature)), "", "lower", beside)]


def fvd_metrics(protocol: ClipProtocol) -> list[Metric]:
    """Return FVD and rFVD at each scored size, and KVD."""
    sides = protocol.scored_sides
    return [
        *[ReconstructionFVD(protocol, side) for side in sides],
        *[FrechetVideoDistance(protocol, side) for side in sides],
        KernelVideoDistance(protocol),
    ]


def halves(features: Tensor, most: int) -> dict[str, float]:
    """Return the Frechet distance between clips at even and at odd places (N, D), of at most `most` each, N >= 4."""
    even, odd = features[::2], features[1::2]
    n = min(len(odd), max(most, 2))
    pair = (moments(evenly(part, n)) for part in (even, odd))
    return {f"real halves, n = {n:,}": frechet_distance(*pair)}


def evenly(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows at even distances: data sets are often sorted by class."""
    return rows[torch.arange(count) * len(rows) // count]


def _has(rows: Rows, name: str) -> bool:
    return name in rows or name in rows.known_moments
