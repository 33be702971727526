"""unilatent doctor"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..files import size_text
from ..plain_text import count_of
from .command import Record, examples

LIBRARIES = {
    "core": (
        "torch", "numpy", "safetensors", "huggingface_hub", "torchdiffeq", "pydantic", "pyyaml", "typer", "rich",
        "pillow", "matplotlib", "scikit-learn", "scipy",
    ),
    "data": ("datasets", "s3fs", "gcsfs"),
    "text, eval": ("transformers", "sentencepiece"),
    "atoms": ("rdkit", "pymatgen", "SMACT", "spglib"),
    "atoms-eval": ("openbabel-wheel", "posebusters", "chgnet"),
    "video files": ("av",),
    "demo": ("gradio",),
    "logging": ("tensorboard", "wandb", "mlflow", "trackio"),
    "launching": ("accelerate",),
    "docs": ("sphinx", "myst-parser", "furo", "latex2mathml"),
    "notebooks": ("nbclient", "ipykernel"),
}  # fmt: skip
"""Part of the installation -> its libraries."""
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "asimd", "bf16")
"""Names of instruction sets that matter for speed, as the kernel writes them."""
VARIABLES = (
    "UNILATENT_CACHE", "UNILATENT_OFFLINE", "UNILATENT_DEBUG", "UNILATENT_FAULT", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE",
    "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "TRANSFORMERS_OFFLINE",
    "XDG_CACHE_HOME", "TMPDIR", "LC_ALL", "LANG", "PYTHONPATH", "PYTHONIOENCODING", "LD_PRELOAD", "MALLOC_CONF",
)  # fmt: skip
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
           "GOOGLE_APPLICATION_CREDENTIALS", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")  # fmt: skip
"""Variables whose values may be secret: only whether they are set is printed."""
PLAIN = re.compile(r"[\w.,:;=+-]*")
"""Values of variables that a report shows: no paths and no addresses."""
EACH = ("gpu", "cache", "variable")
"""Labels that are printed on each of their lines."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Line:
    """A line of the doctor. public: what a report shows in place of the text; None: nothing."""

    label: str
    text: str
    public: str | None


@examples(
    "unilatent doctor",
    "unilatent doctor --report                       # to paste into an issue",
)
def run(
    report: Annotated[
        bool,
        typer.Option("--report", help="As Markdown for an issue, without paths, user names and names of machines."),
    ] = False,
    with_paths: Annotated[
        bool, typer.Option("--with-paths", help="With --report: leave paths and names in it.")
    ] = False,
) -> Record:
    """Show what a report of a problem needs.

    Versions, devices, memory, settings and caches of this machine. Values that may be secret are never shown.
    """
    if with_paths and not report:
        raise ValueError("--with-paths: paths are left out of a --report alone; add --report")
    lines = list(_lines_of_machine())
    if report and not with_paths:
        lines = [Line(line.label, _nameless(line.public), None) for line in lines if line.public is not None]
    if report:
        print("```text")
    label = None
    for line in lines:
        print(f"{'' if line.label == label and label not in EACH else line.label:<12}{line.text}")
        label = line.label
    if report:
        print("```")
    return {
        label: [line.text for line in lines if line.label == label] for label in dict.fromkeys(x.label for x in lines)
    }


def _lines_of_machine() -> Iterator[Line]:
    import torch

    from ..devices import available_devices
    from ..pretrained import cache_folder
    from ..shards import places
    from ..version import __version__

    def line(label: str, text: str) -> Line:
        return Line(label, text, text)

    yield Line("unilatent", f"{__version__} in {Path(__file__).parents[1]}", __version__)
    yield line("python", f"{platform.python_version()}, {platform.platform()}")
    for part, names in LIBRARIES.items():
        for name in names:
            yield line(part, f"{name:<18}{_version(name)}")
    yield line("cpu", f"{_processor()}: {_cores()}, torch uses {torch.get_num_threads()} threads")
    yield line("cpu", f"instructions: {', '.join(_instructions()) or UNKNOWN}")
    yield line("cpu", _precisions("cpu"))
    total, free = _memory()
    yield line("memory", f"{_gib(total)}, {_gib(free)} available")
    for text in _gpus():
        yield line("gpu", text)
    for device in available_devices()[1:]:
        yield line("gpu", f"{device}: {_precisions(device)}")
    caches = {cache_folder(): "weights", places.cache_folder(): "data", Path(_hub_cache()): "hub"}
    for place, name in caches.items():
        yield Line("cache", f"{place}: {_size(place)}", f"{name}: {_size(place)}")
    yield line("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    yield line("hub", _hub())
    for name in (name for name in VARIABLES if name in os.environ):
        value = os.environ[name]
        public = f"{name}={value}" if PLAIN.fullmatch(value) else f"{name} is set"
        yield Line("variable", f"{name}={_without_password(value)}", public)
    for name in (name for name in SECRETS if os.environ.get(name)):
        yield line("variable", f"{name} is set")


def _nameless(text: str) -> str:
    """Return a text without this user's home folder and name, and without the name of this machine."""
    private = {str(Path.home()): "~", platform.node(): "HOST"}
    with contextlib.suppress(Exception):  # there may be no name for this user
        private[getpass.getuser()] = "USER"
    for name, replacement in private.items():
        if len(name) > 1:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", replacement, text)
    return text


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    from ..devices import cpuinfo

    return cpuinfo().get("model name") or platform.processor() or platform.machine() or UNKNOWN


def _instructions() -> list[str]:
    from ..devices import instructions

    known = instructions() or ()
    return [name for name in INSTRUCTIONS if name in known]


def _precisions(device: str) -> str:
    """Speed of matrix products in each precision, measured, and what the precision "auto" is on a device."""
    from ..devices import has_bf16, matmul_rates, resolve_precision
    from ..presets import preset, presets

    notes = {"bf16": "(emulated) " if has_bf16(device) is False else ""}
    rates = ", ".join(f"{name} {notes.get(name, '')}{rate / 1e9:.3g}" for name, rate in matmul_rates(device).items())
    of = " of one core" if device == "cpu" else ""
    own = [name for name in presets() if preset(name).training.precision != "auto"]
    return (
        f"matrix products, GFLOP/s{of}: {rates}; precision=auto is {resolve_precision('auto', device)} "
        f"(presets that name their own: {', '.join(own)})"
    )


def _cores() -> str:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return f"{count} cores" if usable == count else f"{count} cores, {usable} of them for this process"


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes of memory, with the limit of a container; None where they are unknown."""
    total = free = None
    for line in _lines(Path("/proc/meminfo")):
        if match := re.fullmatch(r"(MemTotal|MemAvailable):\s*(\d+) kB", line.strip()):
            if match[1] == "MemTotal":
                total = int(match[2]) * 1024
            else:
                free = int(match[2]) * 1024
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = "".join(_lines(Path("/sys/fs/cgroup/memory.max"))).strip()
    if limit.isdigit() and total is not None and int(limit) < total:
        used = "".join(_lines(Path("/sys/fs/cgroup/memory.current"))).strip()
        total = int(limit)
        free = max(0, total - int(used)) if used.isdigit() else free
    return total, free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []


def _gib(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count / 2**30:.1f} GiB"


def _gpus() -> Iterator[str]:
    import torch

    version = torch.version.cuda or torch.version.hip or "none"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}, CUDA {version}"
    if not torch.cuda.is_available():
        yield f"none that torch can use (built for CUDA {version}): small presets train on the CPU"


def _size(folder: Path) -> str:
    """Size of all files below a folder, in words."""
    if not folder.is_dir():
        return "not there yet"
    files, size = 0, 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                try:
                    size += path.stat().st_size
                except OSError:
                    continue
                files += 1
    return f"{size_text(size)} in {count_of(files, 'file')}"


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _hub() -> str:
    """Whether downloads are allowed; nothing is tried."""
    from ..pretrained import offline

    variable = offline()
    allowed = f"offline, by {variable}" if variable else "downloads are allowed (not tried)"
    from huggingface_hub import get_token

    return f"{allowed}; token {'set' if get_token() else 'not set'}"


def _without_password(value: str) -> str:
    """A value without what may be a password in a URL."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1...@", value)
