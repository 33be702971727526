"""Device and precision of a model's computations."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch


def pick_device(name: str | torch.device | None = None, field: str = "device") -> torch.device:
    """Return the named device, else a CUDA GPU, else the CPU (Apple's GPUs lack float64, which `maths` needs).

    ValueError names `field` and the devices of this machine, if the name is unknown or there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = available_devices()
    if isinstance(name, str | torch.device) and str(name) in (*known, "cpu:0", *(["cuda"] if len(known) > 1 else [])):
        return torch.device(name)
    reason = "is not there" if re.fullmatch(r"cuda(:\d+)?", str(name)) else "is unknown or not supported"
    raise ValueError(f"{field}: {str(name)!r} {reason}; this machine has {', '.join(known)}")


def available_devices() -> list[str]:
    """Return the names of all devices that can be used here."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def bf16_emulated(device: torch.device | str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return one line if a device has no bfloat16 instructions and emulates them, with a measured factor; else None.

    None too where the instructions are not known (`has_bf16`). Measuring takes 0.15 s.
    """
    device = torch.device(device)
    if has_bf16(device, cpuinfo) is not False:
        return None
    factor = _slowdown(device)
    return (
        f"this {'GPU' if device.type == 'cuda' else 'CPU'} has no bf16 instructions and emulates them"
        f"{', which is slow' if factor > 1 else ''}: a matrix product takes {factor:.2g} times as long as in fp32"
    )


def has_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether a device has bfloat16 instructions; None if that is not known (a CPU that is not described by Linux)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)  # x86, ARM
    return None if flags is None else not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def _slowdown(device: torch.device, size: int = 256, seconds: float = 0.15) -> float:
    """How many times longer a matrix product takes in bfloat16 than in float32, on one thread of a CPU.

    The shortest of all that fit into `seconds`, taken in turn, so that other load on the machine does not count.
    """
    matrices = [torch.ones(size, size, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    shortest, threads = [float("inf")] * 2, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or float("inf") in shortest:
            for i, matrix in enumerate(matrices):
                wait()
                begun = time.perf_counter()
                matrix @ matrix
                wait()
                shortest[i] = min(shortest[i], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return shortest[1] / shortest[0]


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return a context: autocast to bfloat16 for precision "bf16", nothing for "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
