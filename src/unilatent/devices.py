"""Which device to use when nobody said."""

from __future__ import annotations

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else a CUDA GPU, else the CPU (Apple's GPUs lack float64, which the maths uses)."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
