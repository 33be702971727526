"""Device and precision of a model's computations."""

from __future__ import annotations

import torch


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, else a CUDA GPU, else the CPU (Apple's GPUs lack float64, which `maths` needs)."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return a context: autocast to bfloat16 for precision "bf16", nothing for "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
