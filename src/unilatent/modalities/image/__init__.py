"""Pictures: square patches as tokens, on a (row, column) grid that is the same for every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ...config import Config
from ...maths.streams import Streams
from ...shards.places import is_shards
from ...types import Layout, Tokens, grid_layout
from ..base import Dataset, Metric, Modality, Raw, Space, Splits
from . import agreement, fidelity, losses, made, obedience, render, shards, spaces
from . import data as files
from . import tokens as patches
from .data import SCENES, Frame, ImageData
from .metrics import Judge, Reconstruction, psnr
from .ssim import WINDOW, ssim

SMALLEST_PERCEPTUAL = 32
"""Pixels a side below which VGG16's four poolings leave nothing to compare."""


class ImageConfig(Config):
    """size: one side of a square in pixels, or [height, width]; a multiple of patch_size."""

    name: Literal["image"] = "image"
    size: int | tuple[int, int]
    patch_size: int = Field(ge=1)
    channels: Literal[1, 3] = 3
    l1_weight: float = Field(default=1.0, ge=0)
    squared_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    """Weight of LPIPS-VGG; needs three channels and sides of at least 32."""
    perceptual_weights: str | None = None
    """A local file with LPIPS's VGG16 weights; None downloads them once."""
    inception_weights: str | None = None
    """A local file with the FID Inception network of 2015-12-05; None downloads it once, when it is asked for."""
    dinov2: str | None = None
    """A local folder or hub id of the DINOv2 that evaluation may look through; None is the large one."""
    clip: str | None = None
    """A local folder or hub id of the CLIP that evaluation may look through; None is ViT-L/14 at 336."""
    flip: bool = True
    """Mirror training pictures left to right with probability 1/2; false where left and right differ (digits)."""

    @classmethod
    def small(cls) -> Self:
        """The embedded digits."""
        return cls(size=8, patch_size=2, channels=1, squared_weight=1.0, flip=False)

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @field_validator("size", mode="before")
    @classmethod
    def _sides(cls, size: Any) -> Any:
        sides = size if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
            raise ValueError("give one side of a square in pixels, or [height, width]")
        return size

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        sides, patch = (self.height, self.width), self.patch_size
        if all(side % patch == 0 for side in sides):
            return self
        above = tuple(-(-side // patch) * patch for side in sides)
        below = tuple(max(side // patch, 1) * patch for side in sides)
        fault = "smaller than" if min(sides) < patch else "not a multiple of"
        known = " or ".join(dict.fromkeys(self._written(size) for size in (below, above)))
        raise ValueError(f"size: {self._written(sides)} is {fault} patch_size {patch}; nearest that works: {known}")

    @model_validator(mode="after")
    def _terms(self) -> Self:
        if not (self.l1_weight or self.squared_weight or self.perceptual_weight):
            raise ValueError("l1_weight, squared_weight, perceptual_weight: all are 0; give one of them a weight")
        if self.perceptual_weight and self.channels != 3:
            raise ValueError(
                f"perceptual_weight: {self.perceptual_weight} needs channels 3, not {self.channels}; set 0"
            )
        if self.perceptual_weight and min(self.height, self.width) < SMALLEST_PERCEPTUAL:
            raise ValueError(
                f"perceptual_weight: {self.perceptual_weight} needs sides of at least {SMALLEST_PERCEPTUAL}, "
                f"size is {self._written((self.height, self.width))}; set 0 or a larger size"
            )
        return self

    def _written(self, sides: tuple[int, ...]) -> str:
        return str(list(sides)) if isinstance(self.size, tuple) else str(sides[0])


class Image(Modality):
    """Data are pictures (B, C, H, W) float32 in [0, 1]."""

    Config = ImageConfig
    DataConfig = ImageData
    suffixes = shards.SUFFIXES
    token_shift = token_scale = 0.5  # noise is added to pixels in [-1, 1]
    config: ImageConfig

    @property
    def channels(self) -> int:
        return self.config.patch_size**2 * self.config.channels

    @property
    def max_tokens(self) -> int:
        return (self.config.height // self.config.patch_size) * (self.config.width // self.config.patch_size)

    @property
    def axes(self) -> int:
        return 2

    @property
    def units(self) -> dict[str, int]:
        """Pixels, H W; and their channels apart, C H W."""
        pixels = self.config.height * self.config.width
        return {"pixel": pixels, "subpixel": pixels * self.config.channels}

    @property
    def frame(self) -> Frame:
        """What pictures from files are cropped to."""
        return Frame(self.config.height, self.config.width, self.config.channels, self.config.patch_size)

    def check(self, data: Any) -> Tensor:
        return patches.check(data, self.config.channels, self.config.height, self.config.width)

    def pack(self, data: Tensor) -> Tokens:
        return Tokens(patches.pack(data, self.config.patch_size), self._layout(data.device))

    def unpack(self, tokens: Tokens) -> Tensor:
        return patches.unpack(tokens.values, self.config.height, self.config.width, self.config.patch_size)

    def finish(self, data: Tensor) -> Tensor:
        return data.float().clamp(0, 1)

    def prepare(self, device: torch.device) -> None:
        """LPIPS's weights, where they have a weight."""
        if self.config.perceptual_weight:
            losses.lpips(self.config.perceptual_weights, device)

    def reconstruction_loss(self, prediction: Tokens, data: Tensor) -> dict[str, Tensor]:
        """Terms `l1`, `squared`, `perceptual` (those with a weight): means over pixels and batch, in float32."""
        weights = losses.Weights(self.config.l1_weight, self.config.squared_weight, self.config.perceptual_weight)
        return losses.terms(self.unpack(prediction), data, weights, self.config.perceptual_weights)

    def sample_layout(self, streams: Streams) -> Layout:
        """The one layout there is, shared by all samples: positions (1, N, 2)."""
        return self._layout(streams.device)

    def augment(self, data: Tensor, streams: Streams) -> Tensor:
        """Each picture mirrored left to right where its stream's uniform falls below 1/2."""
        if not self.config.flip:
            return data
        mirror = (streams.uniform() < 0.5).to(data.device)  # (B,)
        return torch.where(mirror[:, None, None, None], data.flip(-1), data)

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(samples))

    def splits(self, data: ImageData) -> Splits:
        if data.path == SCENES and self.config.flip:
            raise ValueError(
                f"modality.flip: true mirrors pictures, and captions of {SCENES!r} say left and right; set false"
            )
        source = shards if data.path is not None and is_shards(data.path, shards.SUFFIXES) else files
        return source.splits(data, self.frame)

    @classmethod
    def of_resolution(cls, resolution: tuple[int, ...]) -> Self:
        """resolution: (height, width, channels), or one number for a square in colour."""
        height, width, channels = resolution if len(resolution) == 3 else (resolution[0], resolution[0], 3)
        return cls(ImageConfig.parse({"size": [height, width], "patch_size": 1, "channels": channels}))

    @classmethod
    def resolution_of(cls, source: Path) -> tuple[int, ...] | None:
        return made.resolution_of(source)

    def made(self, source: Path) -> Dataset:
        """A folder or zip of PNG files, a .npz, or what `unilatent sample` wrote."""
        return made.dataset(source, self.frame)

    @classmethod
    def raw(cls, source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
        """Pictures of a folder or zip; `format` is jpg (default), png or webp, `quality` for those that have one."""
        if (chosen := format or "jpg") not in shards.FORMATS:
            raise ValueError(f"--format: {chosen!r} is unknown; use {', '.join(shards.FORMATS)}")
        return shards.Pictures(source, shards.Encoding(size, chosen, quality))

    def spaces(self) -> list[Space]:
        """Every view of pictures; local weight files come from the evaluation settings of the configuration."""
        c = self.config
        return [
            spaces.Pixels(),
            spaces.ClassifierSpace(),
            obedience.SceneSpace(),
            spaces.Perceptual(c.perceptual_weights),
            spaces.Inception(c.inception_weights),
            spaces.DINOv2(*[c.dinov2] if c.dinov2 else []),
            spaces.CLIP(*[c.clip] if c.clip else []),
        ]

    def metrics(self) -> list[Metric]:
        return [
            Reconstruction(), fidelity.PerceptualDistance(), fidelity.ReconstructionFidelity(), Judge(),
            fidelity.Classifier(), obedience.Obedience(), fidelity.FrechetInception(), fidelity.InceptionScore(),
            fidelity.KernelInception(), fidelity.Manifold(), fidelity.Semantic("dinov2", "DINOv2"),
            fidelity.Semantic("clip", "CLIP"), agreement.ClipScore(self.config.clip or spaces.CLIP().source),
        ]  # fmt: skip

    @property
    def preprocessing(self) -> str:
        return "adm centre crop, 8 bits"

    @property
    def resolution(self) -> tuple[int, ...]:
        return self.config.height, self.config.width, self.config.channels

    def errors(self, made: Tensor, data: Tensor) -> dict[str, list[float]]:
        """Per picture: `psnr` in dB and `l1`, for data in [0, 1]; `ssim` where its window fits."""
        found = {"psnr": psnr(made, data).tolist(), "l1": (made - data).abs().mean((1, 2, 3)).tolist()}
        if min(data.shape[-2:]) >= WINDOW:
            found["ssim"] = ssim(made, data).tolist()
        return found

    def draw_grid(
        self, rows: Sequence[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """One PNG; rows longer than `columns` continue below, rows that belong together staying together."""
        render.draw_grid(rows, path, columns, captions)

    def write(self, data: Tensor, folder: Path, start: int = 0) -> list[Path]:
        """One PNG a sample: `000000.png`, ..."""
        return render.write(data, folder, start)

    def arrays(self, data: Tensor) -> dict[str, np.ndarray]:
        """ADM's layout: `arr_0`, uint8 (B, H, W, C)."""
        return {"arr_0": render.to_uint8(data)}

    def read(self, path: Path, batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Batches of all pictures of a folder, zip archive or file, in the order of their names; or of shards, as
        they lie in them."""
        source = shards if is_shards(str(path), shards.SUFFIXES) else files
        return source.read(path, self.frame, batch_size)

    def _layout(self, device: torch.device) -> Layout:
        patch = self.config.patch_size
        return grid_layout((self.config.height // patch, self.config.width // patch), device)
