"""Video: clips of fixed length; tubelets as tokens on a (time, row, column) grid that is the same for every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ...config import Config
from ...listings import ALONE, Listings
from ...types import Given, Layout, Tokens, grid_layout
from .._media import losses
from .._media import modality as media
from .._media.given import BOX, FRAMES, read_mask
from .._media.shards import suffixes_in_shards
from .._media.values import check_values
from ..base import CheckedRecords, Dataset, Metric, Raw, Skipped, Space, Splits
from . import files, fvd, judge, motion, render, storing
from . import tokens as tubelets
from .files import KIND, VideoData
from .windows import ClipFrame

SMALLEST_PERCEPTUAL = 32
"""Smallest side of a frame in pixels that VGG16's four poolings can process."""


class VideoConfig(Config):
    """What a clip is, how wrong a reconstruction of it is, and how it is evaluated.

    frames: number of frames of a clip.
    size: of a frame in pixels, the side of a square or [height, width].
    tubelet: frames, rows and columns of a token; they divide frames and size.
    channels: 3 (RGB) or 1 (grey); files are converted.
    l1_weight: loss weight of the mean absolute error of pixels in [0, 1].
    squared_weight: loss weight of their mean squared error.
    """

    name: Literal["video"] = "video"
    frames: int = Field(ge=1)
    size: int | tuple[int, int]
    tubelet: tuple[int, int, int]
    channels: Literal[1, 3] = 3
    stride: int | tuple[int, int] = 1
    """Frames of the video from one frame of a clip to the next, or [smallest, largest]: training draws one for each
    clip, evaluation takes the smallest. Clips are counted in frames, never in seconds."""
    l1_weight: float = Field(default=1.0, ge=0)
    squared_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    """Of LPIPS, mean over all frames."""
    flip: bool = True
    """Flip training clips horizontally with probability 1/2; set false where left and right differ."""
    crop: Literal["centre", "random"] = "centre"
    """Where training cuts the longer side; evaluation cuts at the centre."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second at which clips are drawn; nothing else depends on it."""
    perceptual_weights: str | None = None
    """A local file with LPIPS' network; None: a cached download."""
    i3d_weights: str | None = None
    """A local file with FVD's network; None: a cached download."""
    given_frames: int = Field(default=0, ge=0)
    """Frames at the start of each held-out clip that an evaluation gives to the model; 0: it draws whole clips."""
    given_context: Literal["real", "decoded", "left out"] = "real"
    """What metrics see in place of given frames: these, what the model reconstructs of them, or nothing."""

    @classmethod
    def small(cls) -> Self:
        """Settings for the generated digits."""
        return cls(frames=4, size=10, tubelet=(2, 5, 5), channels=1, squared_weight=1.0, flip=False)

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Numbers of tokens along time, rows and columns."""
        t, h, w = self.tubelet
        return self.frames // t, self.height // h, self.width // w

    @property
    def strides(self) -> tuple[int, int]:
        """Smallest and largest stride."""
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    @field_validator("stride")
    @classmethod
    def _positive(cls, stride: int | tuple[int, int]) -> int | tuple[int, int]:
        smallest, largest = (stride, stride) if isinstance(stride, int) else stride
        if not 1 <= smallest <= largest:
            raise ValueError(f"stride: {stride} is no number of frames; give 1 or more, or [smallest, largest]")
        return stride

    @model_validator(mode="after")
    def _whole_tubelets(self) -> Self:
        if min(self.height, self.width) < 1 or min(self.tubelet) < 1:
            raise ValueError("size and tubelet: all numbers must be at least 1")
        lengths = {"frames": self.frames, "height": self.height, "width": self.width}
        for (name, length), part in zip(lengths.items(), self.tubelet, strict=True):
            if length % part:
                nearest = sorted({max(length // part, 1) * part, -(-length // part) * part})
                field = "frames" if name == "frames" else "size"
                raise ValueError(
                    f"{field}: {name} {length} is not a multiple of the tubelet's {part}; nearest that works: "
                    f"{' or '.join(map(str, nearest))}"
                )
        return self

    @model_validator(mode="after")
    def _some_to_make(self) -> Self:
        if self.given_frames >= self.frames:
            raise ValueError(f"given_frames: {self.given_frames} of {self.frames} leave no frame to make; give fewer")
        return self

    @model_validator(mode="after")
    def _terms(self) -> Self:
        if not (self.l1_weight or self.squared_weight or self.perceptual_weight):
            raise ValueError("l1_weight, squared_weight, perceptual_weight: all are 0; set at least one of them")
        if self.perceptual_weight and (self.channels != 3 or min(self.height, self.width) < SMALLEST_PERCEPTUAL):
            raise ValueError(
                f"perceptual_weight: {self.perceptual_weight} needs channels 3 and sides of at least "
                f"{SMALLEST_PERCEPTUAL}, not {self.channels} and {self.height} x {self.width}; set 0"
            )
        return self


class Video(media.PixelModality):
    """Data are clips (B, T, C, H, W) float32 in [0, 1]."""

    Config = VideoConfig
    DataConfig = VideoData
    hub_tasks = ("", "text-to-video")
    metric_sources = ("perceptual_weights", "i3d_weights")
    suffixes = suffixes_in_shards(KIND)
    given_kinds = (FRAMES, BOX)
    config: VideoConfig

    @property
    def channels(self) -> int:
        t, h, w = self.config.tubelet
        return t * h * w * self.config.channels

    @property
    def max_tokens(self) -> int:
        t, h, w = self.config.grid
        return t * h * w

    @property
    def axes(self) -> int:
        return 3

    def units(self, layout: Layout) -> dict[str, int | Tensor]:
        """Pixels (T * H * W), subpixels (C * T * H * W) and frames (T)."""
        c = self.config
        pixels = c.frames * c.height * c.width
        return {"pixel": pixels, "subpixel": pixels * c.channels, "frame": c.frames}

    @property
    def frame(self) -> ClipFrame:
        """The size that videos from files are cut to."""
        c = self.config
        return ClipFrame(c.height, c.width, c.channels, max(c.tubelet[1:]), c.frames, c.strides, c.crop)

    def check(self, data: Any) -> Tensor:
        c = self.config
        size = (c.frames, c.channels, c.height, c.width)
        return check_values(data, "clip", size, "axes are batch, time, channel, row and column")

    def pack(self, data: Tensor) -> Tokens:
        return Tokens(tubelets.pack(data, self.config.tubelet), self._layout(data.device))

    def unpack(self, tokens: Tokens) -> Tensor:
        c = self.config
        return tubelets.unpack(tokens.values, c.frames, c.height, c.width, c.tubelet)

    @property
    def given_frames_most(self) -> int:
        return self.config.frames - 1

    def pack_mask(self, mask: Tensor) -> Tensor:
        return tubelets.pack(mask.float(), self.config.tubelet)

    def fill(self, given: Given) -> Tensor:
        """Each pixel as it was last given, and mean grey before that."""
        last, frames = torch.full_like(given.data[:, 0], 0.5), []
        for clip, mask in zip(given.data.unbind(1), given.mask.unbind(1), strict=True):
            last = torch.where(mask, clip, last)
            frames.append(last)
        return torch.stack(frames, dim=1)

    @property
    def completes_in_evaluation(self) -> bool:
        return self.config.given_frames > 0

    def given_in_evaluation(self, data: Tensor) -> Given:
        """The first `given_frames` of each clip."""
        mask = torch.zeros(*data.shape[:2], 1, *data.shape[3:], dtype=torch.bool, device=data.device)
        mask[:, : self.config.given_frames] = True
        return Given(data, mask)

    def scored(self, made: Tensor, given: Given, reconstruct: Callable[[Tensor], Tensor]) -> Tensor:
        if self.config.given_context != "decoded":
            return made
        return torch.where(given.mask, reconstruct(given.data).to(made.device), made)

    def check_length(self, length: int, overlap: int | None) -> None:
        frames = self.config.frames
        if length < frames:
            raise ValueError(f"length: {length} is shorter than a clip; give at least {frames}, or leave it out")
        if overlap is None or not 1 <= overlap < frames:
            raise ValueError(
                f"overlap (--frames): {overlap or 'not set'}, but to reach {length} frames each window of {frames} is "
                f"given the last ones of the one before; give 1 to {frames - 1}"
            )

    def lengthen(
        self, data: Tensor, length: int, overlap: int, complete: Callable[[Given, int], Tensor]
    ) -> Tensor:  # fmt: skip
        """Clips (B, length, C, H, W): each window of `frames` begins with the last `overlap` of what is there."""
        frames, window = self.config.frames, 1
        while data.shape[1] < length:
            known = data[:, -overlap:]
            padded = torch.cat([known, known[:, -1:].expand(-1, frames - overlap, -1, -1, -1)], dim=1)
            mask = torch.zeros(*padded.shape[:2], 1, *padded.shape[3:], dtype=torch.bool)
            mask[:, :overlap] = True
            data = torch.cat([data, complete(Given(padded, mask), window)[:, overlap:]], dim=1)
            window += 1
        return data[:, :length]

    def read_given(self, path: Path, mask: Path | None, first: int | None) -> Given:
        """Read the first frames of a video (all, with a mask), or an image; and where each is to be painted.

        The frames that follow in the file are in the data too, with the last one repeated: they are not given.
        """
        c, painted = self.config, None if mask is None else read_mask(mask, self.frame)
        if first is not None and not 1 <= first <= c.frames - (painted is None):
            raise ValueError(
                f"--frames: {first}, but clips have {c.frames} frames, the model makes what is not given; give 1 to "
                f"{c.frames - 1}"
            )
        found = files.first_frames(path, self.frame, first or 1, c.frames).float() / 255  # (F, C, H, W)
        count = first or (1 if painted is None else len(found))
        data = torch.cat([found, found[-1:].expand(c.frames - len(found), -1, -1, -1)])
        given = torch.ones(c.frames, 1, c.height, c.width, dtype=torch.bool)
        given[count:] = False
        complete = len(found) == c.frames
        return Given(data[None], (given if painted is None else given & painted)[None], complete)

    def reconstruction_loss(self, prediction: Tokens, data: Tensor) -> dict[str, Tensor]:
        """Return the terms `l1`, `squared` and `perceptual` with non-zero weight: means over pixels, frames and batch,
        float32."""
        c = self.config
        weights = losses.ImageLossWeights(c.l1_weight, c.squared_weight, c.perceptual_weight)
        made, real = self.unpack(prediction).flatten(0, 1), data.flatten(0, 1)  # images (B T, C, H, W)
        return losses.terms(made, real, weights, c.perceptual_weights, self.compiles_losses)

    @property
    def augmentation(self) -> dict[str, Any]:
        c = self.config
        return {"flip": c.flip, "crop": c.crop, "strides": list(c.strides)}

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        """Stack clips (T, C, H, W): floats in [0, 1], or, as those of files are kept, 256 levels."""
        clips = torch.stack(list(samples))
        return clips.float() / 255 if clips.dtype == torch.uint8 else clips

    def splits(self, data: VideoData, listings: Listings = ALONE) -> Splits:
        return files.splits(data, self.frame, listings)

    @classmethod
    def of_resolution(cls, resolution: tuple[int, ...]) -> Self | None:
        """resolution: (frames, height, width, channels); None for other numbers of axes."""
        if len(resolution) != 4:
            return None
        frames, height, width, channels = resolution
        settings = {"frames": frames, "size": [height, width], "tubelet": [1, 1, 1], "channels": channels}
        return cls(VideoConfig.parse(settings))

    @classmethod
    def resolution_of(cls, source: Path) -> tuple[int, ...] | None:
        return files.resolution_of(source)

    def made(self, source: Path) -> Dataset:
        """Open a .npz or .npy of clips, or the output folder of `unilatent sample`."""
        return files.made(source, self.frame)

    @classmethod
    def raw(cls, source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
        """Open a folder or zip of videos. format: mp4; quality: of the stored H.264."""
        return storing.raw(source, size, format, quality)

    @classmethod
    def verify(cls, source: Path) -> CheckedRecords | None:
        return files.verify_arrays(source.expanduser())

    def spaces(self) -> list[Space]:
        """Return all feature extractors, with the weight file that the configuration names."""
        given = self.config.given_frames
        return [judge.BouncingDigits(), motion.Motion(given), fvd.Inflated(self._protocol, self.config.i3d_weights)]

    def metrics(self) -> list[Metric]:
        protocol = self._protocol
        details = protocol.of_given
        return [
            motion.ClipReconstruction(), motion.Continuation(details), judge.BouncingMetrics(protocol.given, details),
            motion.MotionMetrics(details),
            *fvd.fvd_metrics(protocol),
        ]  # fmt: skip

    @property
    def _protocol(self) -> fvd.ClipProtocol:
        c = self.config
        return fvd.ClipProtocol(c.frames, (c.height, c.width), c.strides[0], c.given_frames, c.given_context)

    @property
    def preprocessing(self) -> str:
        return f"adm centre crop, 8 bits, native rate, stride {self.config.strides[0]}"

    @property
    def resolution(self) -> tuple[int, ...]:
        c = self.config
        return c.frames, c.height, c.width, c.channels

    def errors(self, made: Tensor, data: Tensor) -> dict[str, list[float]]:
        """Return per clip `motion.reconstruction_errors`, and `l1` for data in [0, 1]."""
        errors = motion.reconstruction_errors(motion.to_clips(made), motion.to_clips(data))
        return {**errors, "l1": (made - data).abs().mean((1, 2, 3, 4)).tolist()}

    def draw_grid(
        self, rows: Sequence[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Draw a PNG of filmstrips, and beside it the same clips moving: a .webp and, with PyAV, an .mp4."""
        render.draw_grid(rows, path, columns, captions, self.config.fps)

    def write(self, data: Tensor, folder: Path, start: int = 0) -> list[Path]:
        """Write one lossless animated WebP per sample: `000000.webp`, ..."""
        return render.write(data, folder, start, self.config.fps)

    def arrays(self, data: Tensor) -> dict[str, np.ndarray]:
        """Return `arr_0`, uint8 (B, T, H, W, C)."""
        return {"arr_0": render.to_uint8(data)}

    @classmethod
    def origin_of(cls, data: VideoData) -> str:
        return files.ORIGINS.get(data.path or "", "")

    def read(self, path: Path, batch_size: int, skipped: Skipped | None = None) -> Iterator[tuple[Tensor, list[str]]]:
        """Read all videos of a folder, zip, array, shards or a single file, in clips without overlap."""
        return files.read(path, self.frame, batch_size, skipped)

    def notes(self, path: Path) -> list[str]:
        return files.notes(path)

    def _layout(self, device: torch.device) -> Layout:
        return grid_layout(self.config.grid, device)
