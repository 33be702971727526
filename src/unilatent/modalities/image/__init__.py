"""Images: square patches as tokens, on a (row, column) grid that is the same for every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ...config import Config
from ...listings import ALONE, Listings
from ...types import Given, Layout, Tokens, grid_layout
from .._media import losses, render
from .._media import modality as media
from .._media.given import read_mask
from .._media.pixels import Frame
from .._media.shards import suffixes_in_shards
from .._media.similarity import WINDOW, psnr, ssim
from .._media.values import check_values
from ..base import CheckedRecords, Dataset, Metric, Raw, Skipped, Space, Splits
from . import clip_score, fidelity, generated, relative, scene_metrics, spaces, storing
from . import tokens as patches
from .data import KIND, ORIGINS, ImageData, verify_arrays
from .data import notes as notes_on_images
from .data import read as read_images
from .data import splits as load_splits
from .metrics import ImageReconstruction, PixelMetrics
from .scenes import SCENES

SMALLEST_PERCEPTUAL = 32
"""Smallest image side in pixels that VGG16's four poolings can process."""


class ImageConfig(Config):
    """What an image is, how wrong a reconstruction of it is, and which networks measure it.

    size: side of a square in pixels, or [height, width]; multiples of patch_size.
    patch_size: side of the square patches that become tokens, in pixels.
    channels: 3 (RGB) or 1 (grey); files are converted.
    l1_weight: loss weight of the mean absolute error of pixels in [0, 1].
    squared_weight: loss weight of their mean squared error.
    """

    name: Literal["image"] = "image"
    size: int | tuple[int, int]
    patch_size: int = Field(ge=1)
    channels: Literal[1, 3] = 3
    l1_weight: float = Field(default=1.0, ge=0)
    squared_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    """Loss weight of LPIPS-VGG; needs three channels and sides of at least 32 pixels."""
    perceptual_weights: str | None = None
    """A local file with LPIPS's VGG16 weights; None: a cached download."""
    inception_weights: str | None = None
    """A local file with the FID Inception network of 2015-12-05; None: a cached download, when first needed."""
    dinov2: str | None = None
    """A local folder or hub id of the DINOv2 model used in evaluation; None: facebook/dinov2-large."""
    clip: str | None = None
    """A local folder or hub id of the CLIP model used in evaluation; None: openai/clip-vit-large-patch14-336."""
    flip: bool = True
    """Flip training images horizontally with probability 1/2; set false where left and right differ (digits)."""

    @classmethod
    def small(cls) -> Self:
        """Settings for the built-in digits."""
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
            raise ValueError("give the side of a square in pixels, or [height, width]")
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
            raise ValueError("l1_weight, squared_weight, perceptual_weight: all are 0; set at least one of them")
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


class Image(media.PixelModality):
    """Data are images (B, C, H, W) float32 in [0, 1]."""

    Config = ImageConfig
    DataConfig = ImageData
    hub_tasks = ("unconditional-image-generation", "text-to-image")
    metric_sources = ("perceptual_weights", "inception_weights", "dinov2", "clip")
    suffixes = suffixes_in_shards(KIND)
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

    def units(self, layout: Layout) -> dict[str, int | Tensor]:
        """Pixels (H * W) and subpixels (C * H * W)."""
        pixels = self.config.height * self.config.width
        return {"pixel": pixels, "subpixel": pixels * self.config.channels}

    @property
    def frame(self) -> Frame:
        """The size that images from files are cropped to."""
        return Frame(self.config.height, self.config.width, self.config.channels, self.config.patch_size)

    def check(self, data: Any) -> Tensor:
        size = (self.config.channels, self.config.height, self.config.width)
        return check_values(data, "image", size, "crop or resize them, or convert their channels")

    def pack(self, data: Tensor) -> Tokens:
        return Tokens(patches.pack(data, self.config.patch_size), self._layout(data.device))

    def unpack(self, tokens: Tokens) -> Tensor:
        return patches.unpack(tokens.values, self.config.height, self.config.width, self.config.patch_size)

    def pack_mask(self, mask: Tensor) -> Tensor:
        return patches.pack(mask.float(), self.config.patch_size)

    def read_given(self, path: Path, mask: Path | None, first: int | None) -> Given:
        """Read an image, and the mask of where it is to be painted."""
        if first is not None:
            raise ValueError(f"--frames: {first}, but samples of this model are images; leave it out")
        if mask is None:
            raise ValueError("--mask: not set; give an image that is white where the model is to paint")
        found = [images for images, _ in read_images(path, self.frame, 1)]
        if len(found) != 1:
            raise ValueError(f"--given: {path} holds {len(found):,} images; give one of them")
        return Given(found[0], read_mask(mask, self.frame)[None], complete=True)

    def reconstruction_loss(self, prediction: Tokens, data: Tensor) -> dict[str, Tensor]:
        """Return the terms `l1`, `squared`, `perceptual` with non-zero weight: means over pixels and batch, float32."""
        c = self.config
        weights = losses.ImageLossWeights(c.l1_weight, c.squared_weight, c.perceptual_weight)
        compiled = self.compiles_losses
        return losses.terms(self.unpack(prediction), data, weights, c.perceptual_weights, compiled)

    @property
    def augmentation(self) -> dict[str, Any]:
        return {"flip": self.config.flip}

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(samples))

    def splits(self, data: ImageData, listings: Listings = ALONE) -> Splits:
        if data.path == SCENES and self.config.flip:
            raise ValueError(
                f"modality.flip: true mirrors images, but captions of {SCENES!r} contain left and right; set false"
            )
        return load_splits(data, self.frame, listings)

    @classmethod
    def of_resolution(cls, resolution: tuple[int, ...]) -> Self | None:
        """resolution: (height, width, channels), or (side,) for a square RGB image; None for other numbers of axes."""
        if len(resolution) not in (1, 3):
            return None
        height, width, channels = resolution if len(resolution) == 3 else (resolution[0], resolution[0], 3)
        return cls(ImageConfig.parse({"size": [height, width], "patch_size": 1, "channels": channels}))

    @classmethod
    def resolution_of(cls, source: Path) -> tuple[int, ...] | None:
        return generated.resolution_of(source)

    def made(self, source: Path) -> Dataset:
        """Open a folder or zip of PNG files, a .npz, or the output folder of `unilatent sample`."""
        return generated.dataset(source, self.frame)

    @classmethod
    def raw(cls, source: Path, size: tuple[int, int] | None, format: str | None, quality: int) -> Raw:
        """Open a folder or zip of images. format: jpg (default), png or webp; quality: of jpg and webp."""
        if (chosen := format or "jpg") not in storing.FORMATS:
            raise ValueError(f"--format: {chosen!r} is unknown; use {', '.join(storing.FORMATS)}")
        return storing.ImagesToStore(source, storing.Encoding(size, chosen, quality))

    @classmethod
    def verify(cls, source: Path) -> CheckedRecords | None:
        return verify_arrays(source.expanduser())

    def spaces(self) -> list[Space]:
        """Return all feature extractors, with the weight files that the configuration names."""
        c = self.config
        return [
            spaces.Pixels(),
            spaces.ClassifierSpace(),
            scene_metrics.SceneSpace(),
            spaces.Perceptual(c.perceptual_weights),
            spaces.Inception(c.inception_weights),
            spaces.DINOv2(*[c.dinov2] if c.dinov2 else []),
            spaces.CLIP(*[c.clip] if c.clip else []),
        ]

    def metrics(self) -> list[Metric]:
        return [
            ImageReconstruction(),
            fidelity.PerceptualDistance(),
            fidelity.ReconstructionFID(),
            PixelMetrics(),
            fidelity.ClassifierMetrics(),
            relative.RelativeDistance("frechet_ratio", "Frechet distance / that of real images", relative.STAND_INS),
            *scene_metrics.scene_accuracies(),
            fidelity.FrechetInceptionDistance(),
            fidelity.InceptionScore(),
            fidelity.KernelInceptionDistance(),
            fidelity.ManifoldMetrics(),
            fidelity.FeatureFrechetDistance("dinov2", "DINOv2"),
            fidelity.FeatureFrechetDistance("clip", "CLIP"),
            relative.RelativeDistance("fdr", "FDr over 3 features, relative to real images", relative.PUBLISHED),
            clip_score.ClipScore(self.config.clip or spaces.CLIP().source),
        ]

    @property
    def preprocessing(self) -> str:
        return "adm centre crop, 8 bits"

    @property
    def resolution(self) -> tuple[int, ...]:
        return self.config.height, self.config.width, self.config.channels

    def errors(self, made: Tensor, data: Tensor) -> dict[str, list[float]]:
        """Return per image `psnr` in dB, `l1` for data in [0, 1], and `ssim` if the image is at least one window."""
        errors = {"psnr": psnr(made, data).tolist(), "l1": (made - data).abs().mean((1, 2, 3)).tolist()}
        if min(data.shape[-2:]) >= WINDOW:
            errors["ssim"] = ssim(made, data).tolist()
        return errors

    def draw_grid(
        self, rows: Sequence[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Draw one PNG; rows are wrapped after `columns` images, and corresponding parts stay together."""
        render.draw_grid(rows, path, columns, captions)

    def write(self, data: Tensor, folder: Path, start: int = 0) -> list[Path]:
        """Write one PNG per sample: `000000.png`, ..."""
        return render.write(data, folder, start)

    def arrays(self, data: Tensor) -> dict[str, np.ndarray]:
        """Return ADM's layout: `arr_0`, uint8 (B, H, W, C)."""
        return {"arr_0": render.to_uint8(data)}

    @classmethod
    def origin_of(cls, data: ImageData) -> str:
        return ORIGINS.get(data.path or "", "")

    def read(self, path: Path, batch_size: int, skipped: Skipped | None = None) -> Iterator[tuple[Tensor, list[str]]]:
        """Read all images of a folder, zip archive or file in batches, sorted by name; shards are read in their
        order."""
        return read_images(path, self.frame, batch_size, skipped)

    def notes(self, path: Path) -> list[str]:
        return notes_on_images(path)

    def _layout(self, device: torch.device) -> Layout:
        patch = self.config.patch_size
        return grid_layout((self.config.height // patch, self.config.width // patch), device)
