"""Networks by configuration: what a method names in its own, and one function for each kind of use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from ..config import Config
from .convnet import ConvEncoder, UViT
from .fields import TokenField
from .vit import TokenEncoder, ViT

Strides = tuple[int | tuple[int, ...], ...]


class ConvEncoderConfig(Config):
    """Residual convolutions from data tokens on a grid to a coarser grid of latents; strides and patch per axis, or
    one number for all axes. The paper's: 16 times fewer cells along each axis."""

    kind: Literal["convnet"] = "convnet"
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 3)
    patch: int | tuple[int, ...] = 2
    strides: Strides = (2, 2, 2)


class ViTConfig(Config):
    """A transformer over tokens in any layout: one latent for each data token."""

    kind: Literal["vit"] = "vit"
    width: int = Field(default=1024, ge=1)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class UViTConfig(Config):
    """Residual U-ViT over tokens on a grid, its last `transformers` levels attending; the paper's decoder."""

    kind: Literal["uvit"] = "uvit"
    channels: tuple[int, ...] = (128, 256, 512, 1024)
    blocks: tuple[int, ...] = (2, 2, 2, 8)
    transformers: int = Field(default=1, ge=1)
    patch: int | tuple[int, ...] = 2
    strides: Strides = (2, 2, 2)
    heads: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def width(self) -> int:
        """Of the coarsest level."""
        return self.channels[-1]


Backbone = Annotated[ViTConfig | UViTConfig, Field(discriminator="kind")]
Encoder = Annotated[ConvEncoderConfig | ViTConfig, Field(discriminator="kind")]


def per_axis(size: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for all axes, or one for each; ValueError if they are not as many as there are axes."""
    sizes = (size,) * axes if isinstance(size, int) else size
    if len(sizes) != axes:
        raise ValueError(f"patch or strides: {list(sizes)} names {len(sizes)} axes, the data has {axes}")
    return sizes


def make_backbone(
    config: ViTConfig | UViTConfig, channels: int, axes: int, context_channels: int | None = None,
    reads_tokens: bool = False,
) -> nn.Module:  # fmt: skip
    """The network a configuration describes, over tokens of `channels` channels.

    reads_tokens: whether it is told by tokens too (`Conditions.give_tokens`).
    """
    if isinstance(config, ViTConfig):
        return ViT(
            channels, config.width, config.depth, config.heads, config.dropout, context_channels,
            reads_tokens=reads_tokens,
        )  # fmt: skip
    return UViT(
        channels, config.channels, config.blocks, config.transformers, per_axis(config.patch, axes),
        [per_axis(stride, axes) for stride in config.strides], config.width, config.heads, config.dropout,
        context_channels, reads_tokens,
    )  # fmt: skip


def make_encoder(
    config: ConvEncoderConfig | ViTConfig, channels: int, latent_channels: int, axes: int,
    fields: Sequence[TokenField] | None = None,
) -> ConvEncoder | TokenEncoder:  # fmt: skip
    """Data tokens of `channels` channels to latents. fields: what the channels mean, to a network that can be told."""
    if isinstance(config, ViTConfig):
        return TokenEncoder(channels, latent_channels, config.width, config.depth, config.heads, config.dropout, fields)
    strides = [per_axis(stride, axes) for stride in config.strides]
    patch = per_axis(config.patch, axes)
    return ConvEncoder(channels, latent_channels, config.channels, config.blocks, patch, strides)
