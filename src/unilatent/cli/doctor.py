"""unilatent doctor"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

CORE = (
    "torch",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "scikit-learn",
    "pillow",
    "matplotlib",
)


def run() -> None:
    """Show versions, devices and caches of this machine."""
    import torch

    from ..pretrained import cache_folder
    from ..training.loggers import LOGGERS
    from ..version import __version__

    print(f"unilatent   {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in (*CORE, *(logger.library for logger in LOGGERS.values())):
        print(f"  {name:<16} {_version(name)}")
    print(f"devices     cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"            cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        print("            mps")
    if not torch.cuda.is_available():
        print("            no CUDA device: small presets train on the CPU")
    print(f"weights     {cache_folder()}")
    print(f"disk        {shutil.disk_usage('.').free / 2**30:.1f} GiB free here")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
