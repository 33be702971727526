"""What images and videos have in common: values are pixels in [0, 1], and any of them may be given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ...maths.streams import Streams
from ...processes import Processes
from ...types import Given, Layout
from ..base import Modality
from . import losses, render
from .given import BOX, draw_masks
from .similarity import masked_psnr


class PixelModality(Modality):
    """Data (B, ..., C, H, W) float32 in [0, 1]; a configuration has `channels`, `flip`, `perceptual_weight` and
    `perceptual_weights`.

    Masks of given parts are (B, ..., 1, H, W).
    """

    token_shift = token_scale = 0.5  # noise is added to pixels in [-1, 1]
    tokens_are_data = True
    given_kinds: ClassVar[tuple[str, ...]] = (BOX,)

    def finish(self, data: Tensor) -> Tensor:
        return data.float().clamp(0, 1)

    def prepare(self, device: torch.device, processes: Processes | None = None) -> None:
        """Load LPIPS if it has a loss weight; for a GPU in both types that it may train in."""
        if self.config.perceptual_weight:
            losses.prepare(self.config.perceptual_weights, device, processes)

    def sample_layout(self, streams: Streams, values: dict[str, Tensor] | None = None) -> Layout:
        """Return the grid of tokens, which is the same for all samples: positions (1, N, A)."""
        return self._layout(streams.device)

    def augment(self, data: Tensor, streams: Streams) -> Tensor:
        """Flip each sample horizontally if its stream draws a uniform number below 1/2."""
        if not self.config.flip:
            return data
        mirror = (streams.uniform() < 0.5).to(data.device)  # (B,)
        return torch.where(mirror.view(-1, *[1] * (data.ndim - 1)), data.flip(-1), data)

    def check_given(self, given: Given) -> Given:
        data, mask = self.check(given.data), given.mask
        shape = (*data.shape[:-3], 1, *data.shape[-2:])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"given: expected a mask of bools {shape}, True where data are given, got {got}")
        return replace(given, data=data)

    @property
    def mask_channels(self) -> int:
        return self.channels // self.config.channels

    def draw_mask(self, data: Tensor, streams: Streams, kinds: Sequence[str]) -> Tensor:
        """See `given.draw_masks`."""
        shape = (*data.shape[1:-3], 1, *data.shape[-2:])
        return draw_masks(streams, shape, kinds).to(data.device)

    def fill(self, given: Given) -> Tensor:
        """Mean grey where pixels are not given."""
        return torch.where(given.mask, given.data, 0.5)

    def put_back(self, data: Tensor, given: Given) -> Tensor:
        return torch.where(given.mask, given.data, data)

    def pictures(self, data: Tensor, folder: Path, start: int = 0) -> list[Path]:
        """Write the files of `write`: a browser shows them as they are."""
        return self.write(data, folder, start)

    def drawable(self, data: Tensor) -> Tensor:
        """Return levels (B, T, C, H, W) of 0 to 255, uint8 on the CPU."""
        return render.to_levels(data).cpu()

    def errors_of_rest(self, made: Tensor, data: Tensor, given: Given) -> dict[str, list[float]]:
        """Return `rest_psnr` and `filled_rest_psnr` in dB: of the pixels that are not given; 100 where all are."""
        return {
            "rest_psnr": masked_psnr(made, data, ~given.mask).tolist(),
            "filled_rest_psnr": masked_psnr(self.fill(given), data, ~given.mask).tolist(),
        }

    @abstractmethod
    def _layout(self, device: torch.device) -> Layout:
        """Return the grid of tokens."""
