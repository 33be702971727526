"""The InceptionV3 of FID: Szegedy et al. 2015 (arXiv:1512.00567), the TensorFlow graph of 2015-12-05.

It differs from other InceptionV3s: average pools exclude padding, the last block uses max pooling, there are 1008
classes, and the graph itself resizes images, without half-pixel centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pretrained import WeightFile, fetch, filled, read
from .resizing import stretch_tf1, stretch_torch

PUBLISHED = WeightFile(
    name="InceptionV3 weights for FID",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    size=95_628_359,
    licence="Apache-2.0",
    way_out="--inception-weights PATH takes a local file (as modality.inception_weights=PATH does in a configuration); "
    "--metrics without fid, sfid, kid, is, precision, recall, density, coverage and rfid does without",
)
"""Google's weights of 2015-12-05 as torch-fidelity publishes them; pytorch-fid's pt_inception-2015-12-05-6726825d.pth
is identical. The file name contains the first 8 hex digits of the SHA-256."""

SIDE = 299
"""Images are resized to SIDE x SIDE pixels."""
NORM_EPS = 1e-3
POOL, SPATIAL, LOGITS = 2048, 2023, 1008
"""Values per image of each feature."""
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
"""TensorFlow's `mixed_6/conv`, the first seven channels of 17 x 17 (Nash et al. 2021; ADM's evaluation)."""


class Features(NamedTuple):
    """Features of a batch.

    pool: (B, 2048), for FID, KID, precision and recall. spatial: (B, 2023) in (row, column, channel) order, for sFID.
    logits_unbiased: (B, 1008), logits without bias, for the Inception Score.
    """

    pool: Tensor
    spatial: Tensor
    logits_unbiased: Tensor


@dataclass(frozen=True)
class Conv:
    """A convolution, batch norm and ReLU: its name in the weight file, output channels, kernel (rows, columns)."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)

    @property
    def parallel(self) -> tuple[Conv, ...]:
        return (self,)


@dataclass(frozen=True)
class Fork:
    """A 1 x 3 and a 3 x 1 convolution on the same input, concatenated."""

    name: str

    @property
    def parallel(self) -> tuple[Conv, ...]:
        return (Conv(f"{self.name}a", 384, (1, 3)), Conv(f"{self.name}b", 384, (3, 1)))


ROW, COLUMN, SQUARE, LARGE = (1, 7), (7, 1), (3, 3), (5, 5)
Chain = tuple[Conv | Fork, ...]
"""Layers in sequence."""


def _a(pool: int) -> tuple[Chain, ...]:
    """Return the branches of a block at 35 x 35."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, LARGE)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, SQUARE), Conv("branch3x3dbl_3", 96, SQUARE)),
        (Conv("branch_pool", pool),),
    )


def _c(inner: int) -> tuple[Chain, ...]:
    """Return the branches of a block at 17 x 17, with factorised 7 x 7 convolutions."""
    double = (("1", inner, (1, 1)), ("2", inner, COLUMN), ("3", inner, ROW), ("4", inner, COLUMN), ("5", 192, ROW))
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, ROW), Conv("branch7x7_3", 192, COLUMN)),
        tuple(Conv(f"branch7x7dbl_{name}", width, kernel) for name, width, kernel in double),
        (Conv("branch_pool", 192),),
    )


B: tuple[Chain, ...] = (
    (Conv("branch3x3", 384, SQUARE),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, SQUARE), Conv("branch3x3dbl_3", 96, SQUARE)),
    (),
)
D: tuple[Chain, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, SQUARE)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, ROW),
        Conv("branch7x7x3_3", 192, COLUMN),
        Conv("branch7x7x3_4", 192, SQUARE),
    ),
    (),
)
E: tuple[Chain, ...] = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), Fork("branch3x3_2")),
    (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, SQUARE), Fork("branch3x3dbl_3")),
    (Conv("branch_pool", 192),),
)


def average(x: Tensor) -> Tensor:
    """3 x 3 average pooling that excludes padding; the size stays."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


MIXED: dict[str, tuple[tuple[Chain, ...], Callable[[Tensor], Tensor]]] = {
    "Mixed_5b": (_a(32), average),
    "Mixed_5c": (_a(64), average),
    "Mixed_5d": (_a(64), average),
    "Mixed_6a": (B, halve),
    "Mixed_6b": (_c(128), average),
    "Mixed_6c": (_c(160), average),
    "Mixed_6d": (_c(160), average),
    "Mixed_6e": (_c(192), average),
    "Mixed_7a": (D, halve),
    "Mixed_7b": (E, average),
    "Mixed_7c": (E, maximum),
}
"""Branches of each block, and the pooling at the start of its last branch. A block that halves the size does so in
every branch."""


class ConvNorm(nn.Module):
    """relu(norm(conv(x))): (B, in, h, w) -> (B, out, h', w'); the size stays if padded and without stride."""

    def __init__(self, channels: int, width: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated over channels; the last one starts with pooling."""

    def __init__(self, channels: int, chains: tuple[Chain, ...], pooling: Callable[[Tensor], Tensor]):
        super().__init__()
        self.chains, self.pooling = chains, pooling
        self.channels = 0
        """Output channels."""
        for chain in chains:
            width = channels
            for i, link in enumerate(chain):
                stride = 2 if pooling is halve and i == len(chain) - 1 else 1
                for conv in link.parallel:
                    layer = ConvNorm(width, conv.width, conv.kernel, stride=stride, padded=stride == 1)
                    self.add_module(conv.name, layer)
                width = sum(conv.width for conv in link.parallel)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, h, w)
        out = []
        for chain in self.chains:
            h = self.pooling(x) if chain is self.chains[-1] else x
            for link in chain:
                h = torch.cat([self.get_submodule(conv.name)(h) for conv in link.parallel], dim=1)
            out.append(h)
        return torch.cat(out, dim=1)


class Network(nn.Module):
    """The network from resized images to features; parameter names are those of the official files."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, SQUARE, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, SQUARE, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, SQUARE)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, SQUARE, padded=False)
        channels = 192
        for name, (chains, pooling) in MIXED.items():
            block = Mixed(channels, chains, pooling)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, LOGITS)

    def forward(self, h: Tensor) -> Features:  # (B, 3, 299, 299) in [-1, 1]
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))  # (B, 64, 147, 147)
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(h)))  # (B, 192, 71, 71)
        h = halve(h)  # (B, 192, 35, 35)
        for name in MIXED:
            h = self.get_submodule(name)(h)  # to (B, 768, 17, 17), then (B, 2048, 8, 8)
            if name == SPATIAL_BLOCK:
                spatial = h[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        pool = h.mean(dim=(2, 3))  # (B, 2048)
        return Features(pool, spatial, pool @ self.fc.weight.T)


class InceptionV3(nn.Module):
    """Images to features: frozen, in eval mode, float32. It needs published weights: see `load`."""

    def __init__(self, state: Mapping[str, Tensor], resize: str = "tf1"):
        """state: tensors of an official file; ValueError names one that is missing, unknown or of a wrong shape.
        resize: a key of RESIZES, part of the protocol of a published number.
        """
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize {resize!r} is unknown; one of {', '.join(RESIZES)}")
        self.resize = resize
        self.network = filled(Network, state, "the FID InceptionV3")
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, weights: str | None = None, resize: str = "tf1") -> InceptionV3:
        """Load the published weights from the file `weights` (.safetensors, or either official torch file), or from the
        cache after one download. ValueError if they are not available or the file has other contents."""
        path = fetch(PUBLISHED, weights)
        try:
            return cls(read(path), resize)
        except ValueError as error:
            raise ValueError(
                f"{PUBLISHED.name}: {path}: {error}; the original is {PUBLISHED.url}; {PUBLISHED.way_out}"
            ) from None

    def train(self, mode: bool = True) -> InceptionV3:
        """Do nothing: the network stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """(B, 3, H, W) uint8, of any size, to float32 features; ValueError on other inputs.

        Autocast is disabled; convolutions are deterministic and do not use TF32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"Inception takes (B, 3, H, W) uint8; got {tuple(images.shape)} {images.dtype}")
        precise: Any = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), precise:
            return self.network(RESIZES[self.resize](images.float()))


def resize_tf1(levels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 255] to (B, 3, 299, 299) in about [-1, 1], as in the original graph: (x - 128) / 128 after
    TensorFlow 1's bilinear resize."""
    return (stretch_tf1(levels, SIDE) - 128) / 128


def resize_torch(levels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 255] to (B, 3, 299, 299) in [-1, 1], as in pytorch-fid, with half-pixel centres."""
    return 2 * stretch_torch(levels / 255, SIDE) - 1


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {"tf1": resize_tf1, "torch": resize_torch}
