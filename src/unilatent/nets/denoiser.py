"""Conversion of what a backbone predicts to the clean estimate, which all other code works with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maths.paths import NoisePath
from ..maths.predictions import Prediction, to_clean
from ..types import Conditioning, Layout


class Denoiser(nn.Module):
    """denoise(z_t, t) -> clean estimate, from a backbone (values, layout, time, cond, context) -> values.

    The backbone receives the noise path's `feature` of t (logsnr / 8; on the linear path 1 - t) and predicts
    `prediction`. New backbones return zeros: as a velocity, this means the estimate alpha z_t on LogSNRPath and z_t on
    LinearPath.
    """

    def __init__(self, backbone: nn.Module, path: NoisePath, prediction: Prediction = "velocity"):
        super().__init__()
        self.backbone, self.path, self.prediction = backbone, path, prediction

    def forward(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout, context: Tensor | None = None
    ) -> Tensor:
        """z (B, N, C) at t, scalar or (B,) -> clean estimate (B, N, C), float32 whatever the backbone's type."""
        t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(len(z))
        raw = self.backbone(z, layout, self.path.feature(t), cond, context)
        return to_clean(self.prediction, raw.float(), z, t, self.path)
