"""Networks over tokens that fill a grid of 2 or 3 axes: a convolutional encoder and a residual U-ViT.

Their internal values are (B, C, *grid). Strides are per axis, so that time can be downsampled less than space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Conditioning, Layout, grid_layout
from .attention import join_masks, trim
from .embeddings import TimeEmbedding, rotary
from .layers import Repeated, RMSNorm, affine, in_compute_dtype, linear, modulate, zero_init
from .transformer import Block

PerAxis = tuple[int, ...]
"""One number per axis of a grid: its size, a patch or a stride."""


class _CentredOnFlatAxes(nn.modules.conv._ConvNd):
    """A convolution that reads the centre alone of its kernel along axes of one cell, where all else meets padding.

    The result is the same. A 3 x 3 x 3 kernel on frames of one token each takes a ninth of the operations.
    """

    def forward(self, input: Tensor) -> Tensor:
        assert self.dilation == (1,) * len(self.kernel_size) and self.groups == 1 and self.padding_mode == "zeros"
        weight, padding = self.weight, [int(p) for p in self.padding]
        for axis, size in enumerate(input.shape[2:]):
            if size == 1 and weight.shape[2 + axis] == 2 * padding[axis] + 1:
                weight = weight.narrow(2 + axis, padding[axis], 1)
                padding[axis] = 0
        function = F.conv2d if input.ndim == 4 else F.conv3d
        return function(input, weight, self.bias, self.stride, padding)


class Conv2d(_CentredOnFlatAxes, nn.Conv2d): ...


class Conv3d(_CentredOnFlatAxes, nn.Conv3d): ...


CONVS: dict[int, type[Conv2d] | type[Conv3d]] = {2: Conv2d, 3: Conv3d}


def grid_of(layout: Layout, axes: int) -> PerAxis:
    """Return the grid that the tokens fill; ValueError if they are a set, or the number of axes differs."""
    if layout.grid is None:
        raise ValueError("layout: the tokens are a set, but a convolution needs a grid; use a transformer (kind: vit)")
    if len(layout.grid) != axes:
        raise ValueError(f"layout: the grid {list(layout.grid)} has {len(layout.grid)} axes, this network has {axes}")
    assert layout.mask is None and math.prod(layout.grid) == layout.num_tokens, "a grid has no padding and no gaps"
    return layout.grid


def coarser(grid: PerAxis, strides: Sequence[PerAxis]) -> PerAxis:
    """Return the grid after all strides; if they do not divide it, ValueError names the nearest grids that work."""
    total = _product(strides)
    if len(total) != len(grid):
        raise ValueError(f"layout: the grid {list(grid)} has {len(grid)} axes, this network has {len(total)}")
    if any(size % stride for size, stride in zip(grid, total, strict=True)):
        below = [max(size // stride, 1) * stride for size, stride in zip(grid, total, strict=True)]
        above = [-(-size // stride) * stride for size, stride in zip(grid, total, strict=True)]
        valid = f"{below} or {above}" if below != above else f"{below}"
        raise ValueError(
            f"layout: a grid of {list(grid)} tokens is not a multiple of {list(total)} (patch times downsampling); "
            f"crop or resize the data to {valid}"
        )
    return tuple(size // stride for size, stride in zip(grid, total, strict=True))


def to_grid(values: Tensor, grid: PerAxis) -> Tensor:
    """(B, N, C) to (B, C, *grid); a view, so convolutions run channels-last."""
    return values.transpose(1, 2).unflatten(2, grid)


def to_tokens(h: Tensor) -> Tensor:
    """(B, C, *grid) to (B, N, C)."""
    return h.flatten(2).transpose(1, 2)


def gather_patches(h: Tensor, patch: PerAxis) -> Tensor:
    """(B, C, *grid) to (B, C prod(patch), *grid / patch), channels last in memory."""
    axes = len(patch)
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return _split(h, patch).permute(0, *outer, 1, *inner).flatten(1 + axes).movedim(-1, 1)


def scatter_patches(h: Tensor, patch: PerAxis) -> Tensor:
    """Invert `gather_patches`."""
    axes = len(patch)
    split = h.unflatten(1, (-1, *patch))  # (B, C, *patch, *grid)
    order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    return split.permute(0, 1, *order).reshape(
        h.shape[0], -1, *[size * p for size, p in zip(h.shape[2:], patch, strict=True)]
    )


def pool(h: Tensor, stride: PerAxis) -> Tensor:
    """(B, C, *grid) averaged over cells of `stride`, channels last in memory."""
    axes = len(stride)
    return _split(h, stride).movedim(1, -1).mean(list(range(2, 2 + 2 * axes, 2))).movedim(-1, 1)


def _split(h: Tensor, cell: PerAxis) -> Tensor:
    """(B, C, n1, n2, ...) to (B, C, n1 / c1, c1, n2 / c2, c2, ...)."""
    return h.reshape(*h.shape[:2], *[n for size, c in zip(h.shape[2:], cell, strict=True) for n in (size // c, c)])


def nearest(h: Tensor, stride: PerAxis) -> Tensor:
    """(B, C, *grid) with every cell repeated `stride` times."""
    return F.interpolate(h, scale_factor=[float(s) for s in stride], mode="nearest")


def conv(axes: int, in_channels: int, out_channels: int, kernel: int = 3) -> nn.Module:
    """Return a convolution with padding that preserves the grid; AdamW trains it."""
    return CONVS[axes](in_channels, out_channels, kernel, padding=kernel // 2)


class GroupNorm(nn.GroupNorm):
    """Group norm over at most 32 groups of channels, in float32; the output has the type of h."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).to(h.dtype)


class ResBlock(Repeated):
    """h + conv(SiLU(FiLM(norm(conv(SiLU(norm(h))))))); the last convolution is initialised to zero.

    cond_dim: D of the vector that FiLM reads; None: no FiLM.
    """

    def __init__(self, axes: int, channels: int, cond_dim: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = conv(axes, channels, channels)
        self.norm2 = GroupNorm(channels)
        self.conv2 = zero_init(conv(axes, channels, channels))
        self.film = None if cond_dim is None else zero_init(linear(cond_dim, 2 * channels))

    def forward(self, h: Tensor, c: Tensor | None = None) -> Tensor:
        """h (B, C, *grid), c (B, D) -> (B, C, *grid)."""
        branch = self.norm2(self.conv1(F.silu(self.norm1(h))))
        if self.film is not None:
            assert c is not None
            film = self.film(F.silu(c)).unflatten(1, (-1, *[1] * (h.ndim - 2)))  # (B, 2C, 1, ...)
            shift, scale = film.chunk(2, dim=1)
            branch = affine(branch, 1 + scale, shift)
        return h + self.conv2(F.silu(branch))


class ConvLevel(nn.ModuleList):
    """Residual blocks; channels and grid stay."""

    def __init__(self, axes: int, width: int, count: int, cond_dim: int | None = None):
        super().__init__([ResBlock(axes, width, cond_dim) for _ in range(count)])

    def forward(self, h: Tensor, c: Tensor | None = None, cond: Conditioning | None = None) -> Tensor:
        """h (B, C, *grid), c (B, D) -> (B, C, *grid); cond: unused, c includes its vector."""
        for block in self:
            h = block(h, c)
        return h


class ConvEncoder(nn.Module):
    """Data tokens on a grid to one latent per cell of a coarser grid: deterministic, no time, no condition.

    channels, blocks: per level. strides: per axis, from each level to the next, one fewer than levels. patch: per axis,
    tokens that are merged before the first convolution. The downsampling is patch times all strides.

    Unified Latents' encoder (channels 128, 256, 512, 512, blocks 2, 2, 2, 3, patch 2, three strides of 2: 16x, 32
    latent channels) has 30.6 M parameters and takes 144 G multiply-adds for 512 x 512 pixels.
    """

    def __init__(
        self, in_channels: int, latent_channels: int, channels: Sequence[int], blocks: Sequence[int], patch: PerAxis,
        strides: Sequence[PerAxis],
    ):  # fmt: skip
        super().__init__()
        _check_levels(channels, blocks, strides)
        axes = self.axes = len(patch)
        self.patch, self.strides = tuple(patch), [tuple(stride) for stride in strides]
        self.patch_in = conv(axes, in_channels * math.prod(patch), channels[0])
        self.levels = nn.ModuleList(
            ConvLevel(axes, width, count) for width, count in zip(channels, blocks, strict=True)
        )
        self.down = nn.ModuleList(
            CONVS[axes](a, b, [_kernel(s) for s in stride], stride, [_kernel(s) // 2 for s in stride])  # type: ignore
            for (a, b), stride in zip(pairwise(channels), self.strides, strict=True)
        )
        self.out_norm = GroupNorm(channels[-1])
        self.out = conv(axes, channels[-1], latent_channels)

    def latent_layout(self, layout: Layout) -> Layout:
        """Return the layout of the latents; ValueError if the data has no grid that the downsampling divides."""
        grid = grid_of(layout, self.axes)
        return grid_layout(coarser(grid, [self.patch, *self.strides]), layout.positions.device)

    def forward(self, values: Tensor, layout: Layout) -> Tensor:
        """values (B, N, C) -> latents (B, K, D), in `latent_layout`."""
        grid = grid_of(layout, self.axes)
        coarser(grid, [self.patch, *self.strides])
        values = in_compute_dtype(values, self.out_norm.weight)
        h = self.patch_in(gather_patches(to_grid(values, grid), self.patch))  # (B, C0, *grid / patch)
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.down):
                h = self.down[i](h)  # (B, C_i+1, *grid / stride)
        return to_tokens(self.out(F.silu(self.out_norm(h))))


class TransformerLevel(nn.Module):
    """AdaLN blocks over the cells of a grid; rotary positions are the cells' indices.

    reads_tokens: condition tokens, `cond_dim` wide, are prepended before the first block and removed after the last.
    """

    def __init__(self, width: int, count: int, cond_dim: int, heads: int, dropout: float, reads_tokens: bool = False):
        super().__init__()
        self.head_dim = width // heads
        self.cond = nn.Identity() if cond_dim == width else linear(cond_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, block_norm=False, dropout=dropout) for _ in range(count))
        self.reads_tokens = reads_tokens
        self.tokens = linear(cond_dim, width) if reads_tokens and cond_dim != width else None

    def forward(self, h: Tensor, c: Tensor, cond: Conditioning | None = None) -> Tensor:
        """h (B, C, *grid), c (B, D), cond (only its tokens (B, L, D) are read) -> (B, C, *grid)."""
        grid = tuple(h.shape[2:])
        positions = grid_layout(grid, h.device).varying
        tokens, c, mask, prefix = to_tokens(h), F.silu(self.cond(c)), None, 0
        if self.reads_tokens and cond is not None:
            assert cond.tokens is not None
            prepended = in_compute_dtype(cond.tokens, tokens)  # (B, L, D)
            prepended = prepended if self.tokens is None else self.tokens(prepended)  # (B, L, C)
            prefix = prepended.shape[1]
            mask = join_masks(cond.mask, None, prefix, tokens.shape[1])
            tokens = torch.cat([prepended.to(tokens.dtype), tokens], dim=1)  # (B, L + N, C)
            positions = F.pad(positions, (0, 0, prefix, 0))
        rotation = rotary(positions, self.head_dim, tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, c, rotation, mask)
        return to_grid(tokens[:, prefix:], grid)


class UViT(nn.Module):
    """Residual U-ViT (Hoogeboom et al. 2024): levels on coarser and coarser grids, the last ones transformers.

    A level runs its blocks, passes h to the next coarser level, and adds the change: up(h_out - h_in) + h; skips are
    not concatenated. All levels but the coarsest have two sets of blocks, for downsampling and upsampling.

    channels, blocks: per level (blocks: of each set). transformers: number of transformer levels. strides, patch: as in
        `ConvEncoder`. heads: of the coarsest level; all transformers have its head width.
    cond_dim: D of the condition vector, to which the time embedding is added. dropout: in transformer levels.
    context_channels: D' of context tokens (B, K, D'), one per cell of the coarsest grid. They are added there, and
        repeated and concatenated to the input. None: no context.
    reads_tokens: transformer levels read condition tokens, see `Transformer`.
    known_channels: of `Conditioning.known`, which is concatenated to the input; None: it is not read.

    Sizes of Unified Latents: parameters, those in attention and MLPs (AdaLN has many parameters but few operations),
    and multiply-adds for one 512 x 512 image with 32 x 32 latents:
        decoder   channels 128, 256, 512, 1024; blocks 2, 2, 2, 8; 1 transformer; patch 2    198 M   101 M   393 G
        base      channels 512, 1024; blocks 6, 16; 2 transformers; patch 1                  364 M   239 M   106 G
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], blocks: Sequence[int], transformers: int, patch: PerAxis,
        strides: Sequence[PerAxis], cond_dim: int, heads: int = 16, dropout: float = 0.0,
        context_channels: int | None = None, reads_tokens: bool = False, known_channels: int | None = None,
    ):  # fmt: skip
        super().__init__()
        _check_levels(channels, blocks, strides)
        if not 1 <= transformers <= len(channels):
            raise ValueError(f"transformers {transformers} must be between 1 and the number of levels, {len(channels)}")
        head_dim = channels[-1] // heads
        indivisible = [width for width in channels[len(channels) - transformers :] if width % head_dim]
        if channels[-1] % heads or indivisible:
            raise ValueError(
                f"channels {[*indivisible, channels[-1]]} of transformer levels must be multiples of the head width "
                f"{channels[-1]} / {heads}; choose other heads or channels"
            )
        axes = self.axes = len(patch)
        self.patch, self.strides = tuple(patch), [tuple(stride) for stride in strides]
        first, is_transformer = channels[0], [i >= len(channels) - transformers for i in range(len(channels))]
        kernels = [1 if attends else 3 for attends in is_transformer]
        concatenated = 0 if context_channels is None else first

        def level(i: int) -> nn.Module:
            if is_transformer[i]:
                return TransformerLevel(
                    channels[i], blocks[i], cond_dim, channels[i] // head_dim, dropout, reads_tokens
                )
            return ConvLevel(axes, channels[i], blocks[i], cond_dim)

        self.reads_tokens, self.known_channels = reads_tokens, known_channels
        self.time = TimeEmbedding(cond_dim)
        read = (in_channels + (known_channels or 0)) * math.prod(patch)
        self.patch_in = conv(axes, read + concatenated, first, kernels[0])
        self.down_levels = nn.ModuleList(level(i) for i in range(len(strides)))
        self.down = nn.ModuleList(conv(axes, a, b, k) for (a, b), k in zip(pairwise(channels), kernels, strict=False))
        self.middle = level(len(strides))
        self.up = nn.ModuleList(conv(axes, b, a, k) for (a, b), k in zip(pairwise(channels), kernels, strict=False))
        self.up_levels = nn.ModuleList(level(i) for i in range(len(strides)))
        self.out_norm: nn.Module = RMSNorm(first) if is_transformer[0] else GroupNorm(first)
        self.out_modulation = zero_init(nn.Linear(cond_dim, 2 * first))
        self.out = zero_init(conv(axes, first, in_channels * math.prod(patch), kernels[0]))
        self.context_fine = None if context_channels is None else linear(context_channels, first)
        self.context_coarse = None if context_channels is None else linear(context_channels, channels[-1])

    def forward(
        self, values: Tensor, layout: Layout, time: Tensor, cond: Conditioning, context: Tensor | None = None
    ) -> Tensor:
        """values (B, N, C), time (B,) as `NoisePath.feature`, context (B, K, D') -> (B, N, C), initially 0."""
        assert (cond.tokens is not None) == self.reads_tokens, "reads_tokens must match the condition"
        cond = trim(cond)
        grid = grid_of(layout, self.axes)
        coarsest = coarser(grid, [self.patch, *self.strides])
        weight = self.time.out.weight
        if self.known_channels is not None:
            known = cond.known_of(values.shape[1], self.known_channels)
            values = torch.cat([values, known.to(values.dtype)], dim=2)  # (B, N, C + C')
        values = in_compute_dtype(values, weight)
        c = in_compute_dtype(self.time(time) + cond.vector, weight)  # (B, D)
        h = gather_patches(to_grid(values, grid), self.patch)  # (B, C prod(patch), *grid / patch)
        coarse: Tensor | None = None
        if self.context_fine is not None and self.context_coarse is not None:
            if context is None or context.shape[1] != math.prod(coarsest):
                got = "none" if context is None else f"{context.shape[1]} tokens"
                raise ValueError(f"context: expected {math.prod(coarsest)} tokens, one per cell of {list(coarsest)}, "
                                 f"got {got}")  # fmt: skip
            context = in_compute_dtype(context, weight)
            total = _product(self.strides) or (1,) * self.axes
            h = torch.cat([h, nearest(to_grid(self.context_fine(context), coarsest), total)], dim=1)
            coarse = to_grid(self.context_coarse(context), coarsest)  # (B, C_last, *coarsest)
        h = self.patch_in(h)  # (B, C0, *grid / patch)
        skips: list[tuple[Tensor, Tensor]] = []  # of each level, h before and after downsampling
        for level, down, stride in zip(self.down_levels, self.down, self.strides, strict=True):
            before = level(h, c, cond)
            h = down(pool(before, stride))  # (B, C_i+1, *grid / stride)
            skips.append((before, h))
        h = self.middle(h if coarse is None else h + coarse, c, cond)
        for i in reversed(range(len(skips))):
            before, after = skips[i]
            h = nearest(self.up[i](h - after), self.strides[i]) + before  # (B, C_i, *grid)
            h = self.up_levels[i](h, c, cond)
        return to_tokens(scatter_patches(self._last(h, c), self.patch))

    def _last(self, h: Tensor, c: Tensor) -> Tensor:
        """Apply the modulated output norm and the output convolution."""
        shift, scale = self.out_modulation(F.silu(c)).chunk(2, dim=-1)  # (B, C0) each
        if isinstance(self.out_norm, RMSNorm):
            tokens = modulate(self.out_norm(to_tokens(h)), shift, scale)  # (B, N, C0)
        else:
            tokens = F.silu(modulate(to_tokens(self.out_norm(h)), shift, scale))
        return self.out(to_grid(tokens, tuple(h.shape[2:])))


def _product(strides: Sequence[PerAxis]) -> PerAxis:
    """Return the product of all strides per axis."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def _kernel(stride: int) -> int:
    """Return the kernel size of a downsampling convolution along one axis: 1 along axes without a stride."""
    return 3 if stride > 1 else 1


def _check_levels(channels: Sequence[int], blocks: Sequence[int], strides: Sequence[PerAxis]) -> None:
    if not len(channels) == len(blocks) == len(strides) + 1:
        raise ValueError(
            f"channels, blocks and strides describe {len(channels)}, {len(blocks)} and {len(strides) + 1} levels; give "
            "as many channels as blocks, and one stride fewer"
        )
