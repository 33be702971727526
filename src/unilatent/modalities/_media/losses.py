"""Reconstruction losses of images and frames: means over pixels and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...nets import branches
from ...nets.gpu_formulas import counting
from ...processes import Processes


class ImageLossWeights(NamedTuple):
    """Loss weights; a term with weight 0 is not computed."""

    l1: float
    squared: float
    perceptual: float


def terms(
    prediction: Tensor, target: Tensor, weights: ImageLossWeights, lpips_file: str | None = None,
    compiled: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the weighted scalar terms between two batches of images (B, C, H, W), in float32 even under autocast.

    `l1`: mean |difference|; `squared`: mean difference^2; `perceptual`: mean LPIPS-VGG (Zhang et al. 2018, eq. 1); its
    convolutions follow autocast on a GPU.
    lpips_file: a local file with the perceptual network's weights; None: a cached download. compiled: whether that
    network is.
    """
    dtype = branches.conv_type(prediction)
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        out = {}
        if weights.l1:
            out["l1"] = weights.l1 * (prediction - target).abs().mean()
        if weights.squared:
            out["squared"] = weights.squared * (prediction - target).square().mean()
        if weights.perceptual:
            network = lpips_without_values(dtype) if counting() else lpips(lpips_file, prediction.device, dtype)
            distance = (in_one_graph(network) if compiled else network)(2 * prediction - 1, 2 * target - 1)  # (B,)
            out["perceptual"] = weights.perceptual * distance.mean()
    return out


LOADED: dict[tuple[str | None, torch.device, torch.dtype], nn.Module] = {}
"""Perceptual networks by weight file (None: the published one), device and type of their convolutions."""


def prepare(weights: str | None, device: torch.device, processes: Processes | None = None) -> None:
    """Load the perceptual network before first use; for a GPU in both types that it may train in. ValueError if it
    cannot be had.

    processes: all call this; the first one reads the weights and sends them to the others.
    """
    device = torch.empty(0, device=device).device  # cuda is cuda:0
    key = (weights, device, torch.float32)
    if processes is not None and processes.highest(key not in LOADED):
        network = processes.share(lambda: lpips(weights, device))
        with torch.inference_mode(False):
            LOADED.setdefault(key, network.to(device))
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        lpips(weights, device, dtype)


def lpips(weights: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the perceptual network, cached here and not part of any model, so not in checkpoints or EMA weights.

    dtype: of its convolutions; evaluation uses float32.
    """
    from ...nets.lpips import LPIPS

    device = torch.empty(0, device=device).device
    if (found := LOADED.get((weights, device, dtype))) is not None:
        return found
    with torch.inference_mode(False):  # gradients must work later even if the first use is in inference mode
        if dtype == torch.float32:
            network = LPIPS.load(weights).to(device)
        else:
            network = cast(LPIPS, copy.deepcopy(lpips(weights, device))).in_16_bits(dtype)
    LOADED[weights, device, dtype] = network
    return network


@cache
def lpips_without_values(dtype: torch.dtype) -> nn.Module:
    """Return the perceptual network with weights that hold nothing, where only shapes are counted (`counting`).

    It is made outside all modes, so that no count depends on whether it was there before.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    from ...nets.lpips import LPIPS, vgg_features

    with _disable_current_modes(), torch.device("cpu"):
        network = LPIPS({f"features.{name}": torch.empty_like(w) for name, w in vgg_features().state_dict().items()})
        return network if dtype == torch.float32 else network.in_16_bits(dtype)


@cache
def in_one_graph(network: nn.Module) -> Callable[..., Tensor]:
    """Return the network, compiled."""
    return cast("Callable[..., Tensor]", torch.compile(network, fullgraph=True))
