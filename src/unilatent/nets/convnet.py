"""Networks over tokens that fill a grid of 2 or 3 axes: a convolutional encoder, and a residual U-ViT.

Inside, values are (B, C, *grid). All strides are given per axis, so that time may be halved less often than space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Conditioning, Layout, grid_layout
from .attention import join_masks
from .embeddings import TimeEmbedding, rotary
from .layers import Repeated, RMSNorm, in_compute_dtype, linear, modulate, zero_init
from .transformer import Block

CONVS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
Grid = tuple[int, ...]


def grid_of(layout: Layout, axes: int) -> Grid:
    """The grid of A axes that N tokens fill; ValueError if they are a set, or fill one of other axes."""
    if layout.grid is None:
        raise ValueError("layout: its tokens are a set, but a convolution needs a grid; use a transformer instead")
    if len(layout.grid) != axes:
        raise ValueError(f"layout: its grid {list(layout.grid)} has {len(layout.grid)} axes, this network has {axes}")
    assert layout.mask is None and math.prod(layout.grid) == layout.num_tokens, "a grid has neither padding nor gaps"
    return layout.grid


def coarser(grid: Grid, strides: Sequence[Grid]) -> Grid:
    """The grid after all strides; ValueError names the nearest grids that divide evenly."""
    whole = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
    if len(whole) != len(grid):
        raise ValueError(f"layout: its grid {list(grid)} has {len(grid)} axes, this network has {len(whole)}")
    if any(size % stride for size, stride in zip(grid, whole, strict=True)):
        below = [max(size // stride, 1) * stride for size, stride in zip(grid, whole, strict=True)]
        above = [-(-size // stride) * stride for size, stride in zip(grid, whole, strict=True)]
        known = f"{below} or {above}" if below != above else f"{below}"
        raise ValueError(
            f"layout: a grid of {list(grid)} tokens is not a multiple of {list(whole)} (patch times downsampling); "
            f"crop or resize the data: nearest that works: {known}"
        )
    return tuple(size // stride for size, stride in zip(grid, whole, strict=True))


def to_grid(values: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) to (B, C, *grid); no copy, so convolutions see channels last."""
    return values.transpose(1, 2).unflatten(2, grid)


def to_tokens(h: Tensor) -> Tensor:
    """(B, C, *grid) to (B, N, C)."""
    return h.flatten(2).transpose(1, 2)


def gather_patches(h: Tensor, patch: Grid) -> Tensor:
    """(B, C, *grid) to (B, C prod(patch), *grid / patch)."""
    axes = len(patch)
    split = h.reshape(*h.shape[:2], *[n for size, p in zip(h.shape[2:], patch, strict=True) for n in (size // p, p)])
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return split.permute(0, 1, *inner, *outer).flatten(1, 1 + axes)


def scatter_patches(h: Tensor, patch: Grid) -> Tensor:
    """The inverse of `gather_patches`."""
    axes = len(patch)
    split = h.unflatten(1, (-1, *patch))  # (B, C, *patch, *grid)
    order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    return split.permute(0, 1, *order).reshape(
        h.shape[0], -1, *[size * p for size, p in zip(h.shape[2:], patch, strict=True)]
    )


def pool(h: Tensor, stride: Grid) -> Tensor:
    """(B, C, *grid) averaged over cells of `stride`."""
    split = h.reshape(*h.shape[:2], *[n for size, s in zip(h.shape[2:], stride, strict=True) for n in (size // s, s)])
    return split.mean(list(range(3, 3 + 2 * len(stride), 2)))


def nearest(h: Tensor, stride: Grid) -> Tensor:
    """(B, C, *grid) with every cell repeated `stride` times."""
    return F.interpolate(h, scale_factor=[float(s) for s in stride], mode="nearest")


def conv(axes: int, in_channels: int, out_channels: int, kernel: int = 3) -> nn.Module:
    """A convolution that keeps the grid; AdamW trains it."""
    return CONVS[axes](in_channels, out_channels, kernel, padding=kernel // 2)


class GroupNorm(nn.GroupNorm):
    """Over each sample's own grid and at most 32 groups of channels; in float32, in and out in the type of h."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).to(h.dtype)


class ResBlock(Repeated):
    """h + conv(SiLU(FiLM(norm(conv(SiLU(norm(h))))))), the last convolution zero at first.

    cond_dim: D of the vector behind FiLM; None leaves FiLM out.
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
            branch = torch.addcmul(shift, branch, 1 + scale)
        return h + self.conv2(F.silu(branch))


class ConvLevel(nn.ModuleList):
    """Residual blocks that keep channels and grid."""

    def __init__(self, axes: int, width: int, count: int, cond_dim: int | None = None):
        super().__init__([ResBlock(axes, width, cond_dim) for _ in range(count)])

    def forward(self, h: Tensor, c: Tensor | None = None, cond: Conditioning | None = None) -> Tensor:
        """h (B, C, *grid), c (B, D) -> (B, C, *grid); cond: not read, its vector is in c."""
        for block in self:
            h = block(h, c)
        return h


class ConvEncoder(nn.Module):
    """Data tokens on a grid to one latent per cell of a coarser grid: deterministic, no time, no condition.

    channels, blocks: of each level; strides: from each level to the next, per axis, one fewer than levels; patch:
    tokens that the first convolution takes together, per axis. Downsampling is patch times all strides.

    Unified Latents' encoder (channels 128, 256, 512, 512, blocks 2, 2, 2, 3, patch 2, three strides of 2: 16x, 32
    latent channels) has 30.6 M parameters and takes 144 G multiply-adds for 512 x 512 pixels.
    """

    def __init__(
        self, in_channels: int, latent_channels: int, channels: Sequence[int], blocks: Sequence[int], patch: Grid,
        strides: Sequence[Grid],
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
        """Layout of the latents of data laid out so; ValueError if that is no grid, or not a multiple of ours."""
        grid = grid_of(layout, self.axes)
        return grid_layout(coarser(grid, [self.patch, *self.strides]), layout.positions.device)

    def forward(self, values: Tensor, layout: Layout) -> Tensor:
        """values (B, N, C) -> latents (B, K, D), in `latent_layout`."""
        grid = grid_of(layout, self.axes)
        coarser(grid, [self.patch, *self.strides])
        h = self.patch_in(gather_patches(to_grid(in_compute_dtype(values), grid), self.patch))  # (B, C0, *grid / patch)
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.down):
                h = self.down[i](h)  # (B, C_i+1, *grid / stride)
        return to_tokens(self.out(F.silu(self.out_norm(h))))


class TransformerLevel(nn.Module):
    """AdaLN blocks over the cells of a grid, at rotary positions that are its indices.

    reads_tokens: condition tokens, `cond_dim` wide, join at the first block and leave after the last one.
    """

    def __init__(self, width: int, count: int, cond_dim: int, heads: int, dropout: float, reads_tokens: bool = False):
        super().__init__()
        self.head_dim = width // heads
        self.cond = nn.Identity() if cond_dim == width else linear(cond_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, block_norm=False, dropout=dropout) for _ in range(count))
        self.reads_tokens = reads_tokens
        self.tokens = linear(cond_dim, width) if reads_tokens and cond_dim != width else None

    def forward(self, h: Tensor, c: Tensor, cond: Conditioning | None = None) -> Tensor:
        """h (B, C, *grid), c (B, D); cond: only its tokens (B, L, D) are read -> (B, C, *grid)."""
        grid = tuple(h.shape[2:])
        positions = grid_layout(grid, h.device).positions
        tokens, c, mask, prefix = to_tokens(h), self.cond(c), None, 0
        if self.reads_tokens and cond is not None:
            assert cond.tokens is not None
            said = in_compute_dtype(cond.tokens)  # (B, L, D)
            said = said if self.tokens is None else self.tokens(said)  # (B, L, C)
            prefix = said.shape[1]
            mask = join_masks(cond.mask, None, prefix, tokens.shape[1])
            tokens = torch.cat([said.to(tokens.dtype), tokens], dim=1)  # (B, L + N, C)
            positions = F.pad(positions, (0, 0, prefix, 0))
        rotation = rotary(positions, self.head_dim)
        for block in self.blocks:
            tokens = block(tokens, c, rotation, mask)
        return to_grid(tokens[:, prefix:], grid)


class UViT(nn.Module):
    """Residual U-ViT (Hoogeboom et al. 2024): levels on ever coarser grids, the last of them transformers.

    A level runs its blocks, hands h on to the next coarser one, and adds what that changed: up(h_out - h_in) + h, no
    concatenated skips. All levels but the coarsest have their blocks twice, on the way down and on the way up.

    channels, blocks: of each level (and side). transformers: how many of the last levels are. strides, patch: as in
        `ConvEncoder`. heads: every transformer's head has width // heads channels of the coarsest level's width.
    cond_dim: D of the condition vector, to which the time features are added. dropout: in transformer levels.
    context_channels: D' of context tokens (B, K, D'), one per cell of the coarsest grid: they are added there, and
        joined, repeated, to the patched input; None: no context.
    reads_tokens: transformer levels read condition tokens, see `Transformer`.

    Sizes of Unified Latents, with parameters, those of them in attention and MLPs (AdaLN's modulations are many but
    cost no time), and multiply-adds for one 512 x 512 picture with 32 x 32 latents:
        decoder   channels 128, 256, 512, 1024; blocks 2, 2, 2, 8; 1 transformer; patch 2    198 M   101 M   393 G
        base      channels 512, 1024; blocks 6, 16; 2 transformers; patch 1                  364 M   239 M   106 G
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], blocks: Sequence[int], transformers: int, patch: Grid,
        strides: Sequence[Grid], cond_dim: int, heads: int = 16, dropout: float = 0.0,
        context_channels: int | None = None, reads_tokens: bool = False,
    ):  # fmt: skip
        super().__init__()
        _check_levels(channels, blocks, strides)
        if not 1 <= transformers <= len(channels):
            raise ValueError(f"transformers {transformers} must be between 1 and the {len(channels)} levels there are")
        head_dim = channels[-1] // heads
        odd = [width for width in channels[len(channels) - transformers :] if width % head_dim]
        if channels[-1] % heads or odd:
            raise ValueError(
                f"channels {[*odd, channels[-1]]} must be multiples of the head width: {heads} heads do not fit"
            )
        axes = self.axes = len(patch)
        self.patch, self.strides = tuple(patch), [tuple(stride) for stride in strides]
        first, attends = channels[0], [i >= len(channels) - transformers for i in range(len(channels))]
        kernels = [1 if a else 3 for a in attends]
        joined = 0 if context_channels is None else first

        def level(i: int) -> nn.Module:
            if attends[i]:
                return TransformerLevel(
                    channels[i], blocks[i], cond_dim, channels[i] // head_dim, dropout, reads_tokens
                )
            return ConvLevel(axes, channels[i], blocks[i], cond_dim)

        self.reads_tokens = reads_tokens
        self.time = TimeEmbedding(cond_dim)
        self.patch_in = conv(axes, in_channels * math.prod(patch) + joined, first, kernels[0])
        self.down_levels = nn.ModuleList(level(i) for i in range(len(strides)))
        self.down = nn.ModuleList(conv(axes, a, b, k) for (a, b), k in zip(pairwise(channels), kernels, strict=False))
        self.middle = level(len(strides))
        self.up = nn.ModuleList(conv(axes, b, a, k) for (a, b), k in zip(pairwise(channels), kernels, strict=False))
        self.up_levels = nn.ModuleList(level(i) for i in range(len(strides)))
        self.out_norm: nn.Module = RMSNorm(first) if attends[0] else GroupNorm(first)
        self.out_modulation = zero_init(nn.Linear(cond_dim, 2 * first))
        self.out = zero_init(conv(axes, first, in_channels * math.prod(patch), kernels[0]))
        self.context_fine = None if context_channels is None else linear(context_channels, first)
        self.context_coarse = None if context_channels is None else linear(context_channels, channels[-1])

    def forward(
        self, values: Tensor, layout: Layout, time: Tensor, cond: Conditioning, context: Tensor | None = None
    ) -> Tensor:
        """values (B, N, C), time (B,) as the path's `feature`, context (B, K, D') -> (B, N, C), zero at first."""
        assert (cond.tokens is not None) == self.reads_tokens, "built for another kind of condition"
        cond = cond.trimmed()
        grid = grid_of(layout, self.axes)
        coarsest = coarser(grid, [self.patch, *self.strides])
        c = in_compute_dtype(self.time(time) + cond.vector)  # (B, D)
        h = gather_patches(to_grid(in_compute_dtype(values), grid), self.patch)  # (B, C prod(patch), *grid / patch)
        coarse: Tensor | None = None
        if self.context_fine is not None and self.context_coarse is not None:
            if context is None or context.shape[1] != math.prod(coarsest):
                found = "none" if context is None else f"{context.shape[1]} tokens"
                raise ValueError(f"context: expected {math.prod(coarsest)} tokens, one per cell of {list(coarsest)}, "
                                 f"got {found}")  # fmt: skip
            context = in_compute_dtype(context)
            whole = tuple(math.prod(axis) for axis in zip(*self.strides, strict=True)) or (1,) * self.axes
            h = torch.cat([h, nearest(to_grid(self.context_fine(context), coarsest), whole)], dim=1)
            coarse = to_grid(self.context_coarse(context), coarsest)  # (B, C_last, *coarsest)
        h = self.patch_in(h)  # (B, C0, *grid / patch)
        kept: list[tuple[Tensor, Tensor]] = []
        for level, down, stride in zip(self.down_levels, self.down, self.strides, strict=True):
            before = level(h, c, cond)
            h = down(pool(before, stride))  # (B, C_i+1, *grid / stride)
            kept.append((before, h))
        h = self.middle(h if coarse is None else h + coarse, c, cond)
        for i in reversed(range(len(kept))):
            before, after = kept[i]
            h = nearest(self.up[i](h - after), self.strides[i]) + before  # (B, C_i, *grid)
            h = self.up_levels[i](h, c, cond)
        return to_tokens(scatter_patches(self._last(h, c), self.patch))

    def _last(self, h: Tensor, c: Tensor) -> Tensor:
        """Modulated norm and the last, zero convolution."""
        shift, scale = self.out_modulation(F.silu(c)).chunk(2, dim=-1)  # (B, C0) each
        if isinstance(self.out_norm, RMSNorm):
            tokens = modulate(self.out_norm(to_tokens(h)), shift, scale)  # (B, N, C0)
        else:
            tokens = F.silu(modulate(to_tokens(self.out_norm(h)), shift, scale))
        return self.out(to_grid(tokens, tuple(h.shape[2:])))


def _kernel(stride: int) -> int:
    """Of a strided convolution along one axis: 3 where it moves, 1 where it does not."""
    return 3 if stride > 1 else 1


def _check_levels(channels: Sequence[int], blocks: Sequence[int], strides: Sequence[Grid]) -> None:
    if not len(channels) == len(blocks) == len(strides) + 1:
        raise ValueError(
            f"channels, blocks and strides must name as many levels: {len(channels)}, {len(blocks)} and "
            f"{len(strides) + 1} (strides lie between levels)"
        )
