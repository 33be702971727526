"""Device and precision of a model's computations."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch

PRECISIONS = ("auto", "fp32", "bf16")
"""Names that `resolve_precision` takes."""
PRODUCTS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
"""Precisions that matrix products are measured in, and the type of their matrices; tf32: of GPUs."""
PAYS_OFF = 0.75
"""Up to this share of the time in float32, bfloat16 is taken where that is measured. Processors are far from it, at a
quarter or at twice the time, so that a busy machine chooses as an idle one does."""
CPUINFO = Path("/proc/cpuinfo")


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


def peak_memory(device: torch.device | str) -> int | None:
    """Return the most bytes that this process has used so far: of a GPU's memory, or else of the machine's; None if
    the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resolve_precision(
    name: str, device: torch.device | str, trained: str | None = None, field: str = "precision"
) -> Literal["fp32", "bf16"]:  # fmt: skip
    """Return "fp32" or "bf16" for a precision of that name on a device.

    "auto" is bf16 where the hardware multiplies it faster (`prefers_bf16`), else fp32. trained: what a model was
    trained in; "auto" then keeps fp32, and bf16 where it is faster. ValueError names `field` if the name is unknown.
    """
    if name not in PRECISIONS:
        raise ValueError(f"{field}: {name!r} is unknown; use {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
    if name in ("fp32", "bf16"):
        return cast(Literal["fp32", "bf16"], name)
    return "bf16" if trained != "fp32" and prefers_bf16(device) else "fp32"


def prefers_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 is the faster type for products, on a device that has instructions for it.

    On GPUs and CPUs with AMX it is. Other CPUs are measured, once (0.15 s): with AVX512-BF16, some multiply bfloat16
    four times as fast as float32, and others half as fast.
    """
    if not has_bf16(device):
        return False
    trusted = torch.device(device).type == "cuda" or "amx_bf16" in (instructions() or ())
    return trusted or _bf16_factor(str(device)) < PAYS_OFF


@cache
def _bf16_factor(device: str) -> float:
    """Return how many times as long as in float32 a product takes in bfloat16."""
    seconds = matmul_seconds(device, ("fp32", "bf16"))
    return seconds["bf16"] / seconds["fp32"]


def bf16_drawback(device: torch.device | str) -> str | None:
    """Return one line, with a measured factor, if a device emulates bfloat16, or if a CPU's instructions for it are
    slower than those for float32; else None.

    None too where the instructions are not known (`has_bf16`). Measuring takes 0.15 s.
    """
    known = has_bf16(device)
    if known is None or prefers_bf16(device):
        return None
    factor = _bf16_factor(str(device))
    what = "has slow bf16 instructions"
    if not known:
        what = f"has no bf16 instructions and emulates them{', which is slow' if factor > 1 else ''}"
    return f"this {kind(device)} {what}: a matrix product takes {factor:.2g} times as long as in fp32"


def kind(device: torch.device | str) -> str:
    """GPU or CPU."""
    return "GPU" if torch.device(device).type == "cuda" else "CPU"


def has_bf16(device: torch.device | str) -> bool | None:
    """Whether a device has bfloat16 instructions; None if that is not known (a CPU that is not described by Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    known = instructions()
    return None if known is None else not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(known)


def cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor as Linux describes it; {} where there is no such file."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def instructions() -> list[str] | None:
    """Return the names of the processor's instruction sets, as the kernel of x86 or ARM writes them; None: unknown."""
    info = cpuinfo()
    known = info.get("flags", info.get("Features"))
    return None if known is None else known.split()


def matmul_seconds(
    device: torch.device | str, precisions: Sequence[str], size: int = 256, seconds: float = 0.15
) -> dict[str, float]:
    """Return the seconds of a product of two (size, size) matrices in each of PRODUCTS that is asked for.

    On one core of a CPU: several wait for each other where the machine has other work. The shortest of all that fit
    into `seconds`, taken in turn, so that such work does not count; one of each if they do not fit.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    matrices = {name: torch.ones(size, size, device=device, dtype=PRODUCTS[name]) for name in precisions}
    wait = torch.cuda.synchronize if cuda else lambda: None
    shortest, before = dict.fromkeys(precisions, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for matrix in matrices.values() if cuda else ():
            matrix @ matrix  # loads the library
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or float("inf") in shortest.values():
            for name, matrix in matrices.items():
                with float32_products(tf32=name == "tf32") if cuda else nullcontext():
                    wait()
                    begun = time.perf_counter()
                    matrix @ matrix
                    wait()
                    shortest[name] = min(shortest[name], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return shortest


def matmul_rates(device: torch.device | str, seconds: float = 0.3) -> dict[str, float]:
    """Return the FLOP/s of large matrix products in each precision, on a GPU or one core of a CPU.

    The best of sizes that double from 256 on, as long as the next one fits into about `seconds` for each precision:
    emulated products can be 60 times slower.
    """
    cuda, rates = torch.device(device).type == "cuda", dict[str, float]()
    for name in PRODUCTS if cuda else ("fp32", "bf16"):
        size, rates[name] = 256, 0.0
        while True:
            taken = matmul_seconds(device, (name,), size, seconds / 4)[name]
            rates[name] = max(rates[name], 2 * size**3 / taken)
            if size >= (8192 if cuda else 1024) or 24 * taken > seconds:
                break
            size *= 2
    return rates


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return a context: autocast to bfloat16 for precision "bf16", no autocast for "fp32"."""
    assert precision in ("fp32", "bf16")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def set_float32_products(device: torch.device | str, precision: str) -> None:
    """Let the float32 products and convolutions of a GPU use TF32, unless the precision is "fp32".

    It holds for the whole process, and is for those who own one: commands and training. Nothing changes on a CPU.
    """
    if torch.device(device).type == "cuda":
        _set_tf32(precision != "fp32")


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Compute float32 products and convolutions of GPUs in full float32, or in TF32, inside this context."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _set_tf32(tf32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _set_tf32(tf32: bool) -> None:
    """In the older of torch's two interfaces: its compiler still reads that one, which fails once the newer is used."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
