"""LPIPS, the learned perceptual distance between images (Zhang et al. 2018, arXiv:1801.03924), on VGG16, v0.1."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..pretrained import WeightFile, check_layout, fetch, read
from . import branches

VGG16 = WeightFile(
    name="VGG16 weights for LPIPS",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    size=553_433_881,
    licence="BSD-3-Clause",
    way_out="modality.perceptual_weights=PATH takes a local file (when evaluating: --lpips-weights PATH), "
    "modality.perceptual_weight=0 trains without it",
)
"""VGG16 trained on ImageNet-1k (Simonyan & Zisserman 2014), as torchvision publishes it.

The file name contains the first 8 hex digits of the SHA-256; this prefix is checked.
"""

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's 3x3 convolutions, with a 2x2 max-pool between stages."""

CHANNELS = tuple(stage[-1] for stage in STAGES)
"""Channels of the five feature maps: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and standard deviation per channel of ImageNet in [-1, 1], as LPIPS v0.1 rounds them."""

NORM_EPS = 1e-10
MIN_SIZE = 2 ** (len(STAGES) - 1)
"""Smallest side, in pixels: one pixel is left after four poolings."""


class LPIPS(nn.Module):
    """The LPIPS distance: frozen, always in eval mode (v0.1 uses dropout only to train its linear weights).

    It needs published weights: see `load`. Its convolutions compute in the type of their weights (`in_16_bits`). The
    distance of their features is float32; eager code computes that of bfloat16 features by `FewPassDistance`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Mapping[str, Tensor], linear: Mapping[str, Tensor] | None = None):
        """backbone: VGG16's `features.N.weight` and `features.N.bias` in torchvision's numbering; keys that do not
        start with `features.` are ignored. ValueError names a tensor that is missing, unknown or of a wrong shape.
        linear: `lin0.weight` .. `lin4.weight`, each (C,); None: the published ones, which come with the package.
        """
        super().__init__()
        with torch.device("meta"):  # no memory and no random numbers for unused initial weights
            self.features = vgg_features()
        self.features.load_state_dict(_checked(self.features, backbone), assign=True)
        linear = published_linear() if linear is None else linear
        self.linear = nn.ParameterList(linear[f"lin{i}.weight"].float() for i in range(len(CHANNELS)))
        assert [len(weight) for weight in self.linear] == list(CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, weights: str | None = None) -> LPIPS:
        """Load the published weights: VGG16's from the file `weights` (.safetensors, or a torch file), or from the
        cache after one download. ValueError if they are not available or the file is not VGG16."""
        path = fetch(VGG16, weights)
        try:
            return cls(read(path))
        except ValueError as error:
            raise ValueError(f"{VGG16.name}: {path}: {error}; the original is {VGG16.url}; {VGG16.way_out}") from None

    def in_16_bits(self, dtype: torch.dtype) -> LPIPS:
        """Convert the convolutions to a type of 16 bits, channels last, as tensor cores take them; return self."""
        self.features.to(dtype)
        for parameter in self.features.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def train(self, mode: bool = True) -> LPIPS:
        """Do nothing: the network stays in eval mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances (B,), float32, >= 0, between two batches (B, 3, H, W) in [-1, 1], H and W at least 16.

        The sum over feature maps of the spatial mean of sum_c w_c (a_c - b_c)^2, with features normalised over channels
        (eq. 1). Differentiable in both inputs; the same inside autocast. ValueError on other shapes.
        """
        _check_images(a, b)
        with torch.autocast(a.device.type, enabled=False):
            distances = [
                feature_distance(fa, fb, weight)  # (B,)
                for fa, fb, weight in zip(self.taps(a), self.taps(b), self.linear, strict=True)
            ]
            return torch.stack(distances).sum(0)  # (B,)

    def taps(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to five feature maps (B, C, h, w), each half the size of the one before."""
        h = ((x.float() - self.shift) / self.scale).to(next(self.features.parameters()).dtype)  # (B, 3, H, W)
        taps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                taps.append(h)
            h = layer(h)  # (B, C, h, w)
        return [*taps, h]


def feature_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return sum_c w_c mean_hw (unit(a) - unit(b))^2, (B,) float32, of features a and b (B, C, h, w), weight (C,)."""
    if a.dtype == torch.bfloat16 and branches.on_eager():
        return FewPassDistance.apply(a, b, weight)
    return (unit(a) - unit(b)).square().mean(dim=(2, 3)) @ weight  # (B, C) @ (C,)


def unit(features: Tensor) -> Tensor:
    """Divide (B, C, h, w) by its norm over C plus 1e-10, in float32; zeros stay zero and have a finite gradient."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + NORM_EPS)


class FewPassDistance(torch.autograd.Function):
    """`feature_distance` with maps in the type of the features, sums in float32 and a hand-written backward pass.

    It stores one map, in the type of the features. Norms stay float32: products with them are rounded when written.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        norm_a, norm_b = (torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32) for x in (a, b))
        inverse_a, inverse_b = ((norm + NORM_EPS).reciprocal_() for norm in (norm_a, norm_b))  # (B, 1, h, w)
        difference = torch.mul(a, inverse_a, out=torch.empty_like(a)).addcmul_(b, inverse_b, value=-1)
        of_a, of_b, _ = ctx.needs_input_grad
        kept = [*((a, norm_a) if of_a else (None, None)), *((b, norm_b) if of_b else (None, None))]
        ctx.save_for_backward(weight, difference, *kept)
        size = torch.linalg.vector_norm(difference, dim=(2, 3), dtype=torch.float32)  # (B, C)
        return size.square_() @ weight / difference[0, 0].numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, difference, a, norm_a, b, norm_b = ctx.saved_tensors
        slope = torch.mul(difference, weight.view(-1, 1, 1), out=torch.empty_like(difference))
        grad = grad.view(-1, 1, 1, 1) * (2 / difference[0, 0].numel())  # (B, 1, 1, 1)
        return (
            None if a is None else _through_unit(slope, a, norm_a, grad),
            None if b is None else _through_unit(slope, b, norm_b, -grad),
            None,
        )


def _through_unit(slope: Tensor, x: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
    """Return factor times the gradient of (unit(x) slope).sum() by x (B, C, h, w); norm (B, 1, h, w)."""
    length = norm + NORM_EPS
    radial = (slope * x).sum(1, keepdim=True, dtype=torch.float32) / (length * norm).clamp_min_(NORM_EPS**2)
    return torch.addcmul(slope, x, radial, value=-1, out=torch.empty_like(x)).mul_(factor / length)


def vgg_features() -> nn.Sequential:
    """Build VGG16's layers up to relu5_3, numbered as in torchvision's `features`."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def published_linear() -> dict[str, Tensor]:
    """Load LPIPS v0.1's linear weights: `lin0.weight` .. `lin4.weight`, each (C,) float32 (BSD-2, see NOTICE)."""
    return safetensors.torch.load(resources.files(__package__).joinpath("lpips_vgg_v01.safetensors").read_bytes())


def _checked(features: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `features.` tensors of a state as float32 under the module's names; ValueError if they do not fit."""
    prefix = "features."
    tensors = {key: value for key, value in state.items() if key.startswith(prefix)}
    wanted = {prefix + key: tuple(value.shape) for key, value in features.state_dict().items()}
    return {key.removeprefix(prefix): value for key, value in check_layout(tensors, wanted, "VGG16").items()}


def _check_images(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"LPIPS compares equal shapes; got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(f"LPIPS takes (B, 3, H, W) in [-1, 1]; got {tuple(a.shape)}; repeat a single channel 3 times")
    if min(a.shape[2:]) < MIN_SIZE:
        raise ValueError(f"LPIPS needs sides of at least {MIN_SIZE} pixels; got {tuple(a.shape)}; set its weight to 0")
