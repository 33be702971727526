"""Configurations of backbones and encoders, as methods include them, and functions that build the networks."""

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
    """Residual convolutions from data tokens on a grid to a coarser grid of latents.

    The defaults are Unified Latents': 16x downsampling per axis.

    kind: "convnet".
    channels: of each level, from fine to coarse.
    blocks: residual blocks of each level.
    patch: size of the patches of the finest level in tokens, per axis or one number for all axes.
    strides: downsampling from each level to the next, per axis or one number for all axes.
    """

    kind: Literal["convnet"] = "convnet"
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 3)
    patch: int | tuple[int, ...] = 2
    strides: Strides = (2, 2, 2)


class ViTConfig(Config):
    """A transformer over tokens in any layout; as an encoder, one latent per data token.

    kind: "vit".
    width: channels of a token; a multiple of `heads`.
    depth: number of blocks.
    heads: attention heads.
    dropout: share of activations dropped in training.
    absolute_positions: add sinusoids of each token's position to the input. Rotary attention sees only how far two
        tokens are from each other.
    """

    kind: Literal["vit"] = "vit"
    width: int = Field(default=1024, ge=1)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    absolute_positions: bool = False


class UViTConfig(Config):
    """A residual U-ViT over tokens on a grid. The defaults are Unified Latents' decoder.

    kind: "uvit".
    channels: of each level, from fine to coarse.
    blocks: of each level, on the way down and again on the way up; the coarsest level has them once.
    transformers: how many of the coarsest levels are transformers; the others are residual convolutions.
    patch: size of the patches of the finest level in tokens, per axis or one number for all axes.
    strides: downsampling from each level to the next, per axis or one number for all axes.
    heads: attention heads of the transformers.
    dropout: share of activations dropped in the transformers in training.
    """

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
        """Channels of the coarsest level."""
        return self.channels[-1]


Backbone = Annotated[ViTConfig | UViTConfig, Field(discriminator="kind")]
Encoder = Annotated[ConvEncoderConfig | ViTConfig, Field(discriminator="kind")]


def per_axis(size: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return one number per axis; ValueError if their number is wrong."""
    sizes = (size,) * axes if isinstance(size, int) else size
    if len(sizes) != axes:
        raise ValueError(
            f"patch or strides: {list(sizes)} has {len(sizes)} axes, the data has {axes}; give one number per axis, or "
            "one number for all axes"
        )
    return sizes


def make_backbone(
    config: ViTConfig | UViTConfig, channels: int, axes: int, context_channels: int | None = None,
    reads_tokens: bool = False, exact: bool = False, known_channels: int | None = None,
) -> nn.Module:  # fmt: skip
    """Build a backbone over tokens of `channels` channels.

    reads_tokens: whether it reads condition tokens too (`Conditions.give_tokens`). exact: of a transformer, whether
        values enter and leave in float32 (`nets.fields`). known_channels: of `Conditioning.known`, if it is read.
    """
    if isinstance(config, ViTConfig):
        return ViT(
            channels, config.width, config.depth, config.heads, config.dropout, context_channels,
            reads_tokens=reads_tokens, exact=exact, known_channels=known_channels,
            absolute_positions=config.absolute_positions,
        )  # fmt: skip
    return UViT(
        channels, config.channels, config.blocks, config.transformers, per_axis(config.patch, axes),
        [per_axis(stride, axes) for stride in config.strides], config.width, config.heads, config.dropout,
        context_channels, reads_tokens, known_channels,
    )  # fmt: skip


def blocks_of(network: nn.Module) -> list[nn.Module] | None:
    """Return the blocks of a transformer over one sequence of tokens, in order; None for a network on several grids."""
    network = network.vit if isinstance(network, TokenEncoder) else network
    return list(network.transformer.blocks) if isinstance(network, ViT) else None


def make_encoder(
    config: ConvEncoderConfig | ViTConfig, channels: int, latent_channels: int, axes: int,
    fields: Sequence[TokenField] | None = None,
) -> ConvEncoder | TokenEncoder:  # fmt: skip
    """Build an encoder from data tokens of `channels` channels to latents.

    fields: what the channels mean; only a transformer uses them.
    """
    if isinstance(config, ViTConfig):
        return TokenEncoder(
            channels, latent_channels, config.width, config.depth, config.heads, config.dropout, fields,
            config.absolute_positions,
        )  # fmt: skip
    strides = [per_axis(stride, axes) for stride in config.strides]
    patch = per_axis(config.patch, axes)
    return ConvEncoder(channels, latent_channels, config.channels, config.blocks, patch, strides)
