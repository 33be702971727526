"""References of distances: the run's own data, other real samples, or published statistics."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batches import collate, spread_evenly
from ..config import read_yaml
from ..listings import ALONE, Listings
from ..maths.frechet import Moments, RunningMoments
from ..modalities.base import Dataset, Modality, Splits
from ..registry import available, find
from ..version import __version__
from .evaluate import Interrupted, SampleSet

MOMENTS = (("pool", "mu", "sigma", 2048), ("spatial", "mu_s", "sigma_s", 2023))
"""(tensor of the Inception space, names of its mean and covariance in ADM's .npz files, D)."""
PROVENANCE = "provenance"
"""Name of a JSON text that this package stores with the moments: which data and weights they are from."""


def splits_of(
    modality: Modality, run: Path | None, data_path: str | None, listings: Listings = ALONE
) -> Splits | None:  # fmt: skip
    """Open the data a run was trained on, from its config.yaml or at another path; None if unknown.

    The training data of a model folder is unknown: the data at `data_path` is then used for both splits. listings: who
    looks at files.
    """
    settings = find("modalities", modality.config.name).DataConfig
    if run is None:
        if data_path is None:
            return None
        dataset = modality.splits(settings.parse({"path": data_path}), listings).train
        return Splits(dataset, dataset)
    content = listings.share(lambda: read_yaml(run / "config.yaml").get("data"))
    if not isinstance(content, dict):
        raise ValueError(f"{run / 'config.yaml'}: has no field `data`; give the model/ folder of the run and --data")
    chosen = settings.parse(content if data_path is None else {**content, "path": data_path})
    return modality.splits(chosen, listings)


def find_reference(modality: Modality, source: str, listings: Listings = ALONE) -> SampleSet:
    """Open real samples in a folder, archive or .npz, or statistics in a .npz of ADM's layout, or both.

    listings: who looks at files: with processes, the first one for all. ValueError names the path and the fault.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() != ".npz":
        dataset = _dataset(modality, source, listings)
        fingerprint = listings.share(lambda: dataset.fingerprint)
        return SampleSet(
            path.name or source, fingerprint, dataset, preprocessing=modality.preprocessing,
            resolution=modality.resolution,
        )  # fmt: skip
    has_samples, moments, about, digest = listings.share(lambda: _statistics(path))
    samples = _dataset(modality, source, listings) if has_samples else None
    resolution = modality.resolution if samples is not None else about.get("resolution")
    return SampleSet(
        path.name, digest, samples, moments, size=about.get("num_samples", 0),
        preprocessing=about.get("preprocessing"), resolution=resolution and tuple(resolution),
    )  # fmt: skip


def find_samples(modality: Modality, source: str, listings: Listings = ALONE) -> SampleSet:
    """Open externally generated samples for evaluation. listings: who looks at files."""

    def open_here() -> tuple[Dataset, str]:
        opened = modality.made(Path(source))
        return opened, opened.fingerprint

    dataset, fingerprint = listings.share(open_here)
    return SampleSet(
        Path(source).name, fingerprint, dataset, preprocessing=modality.preprocessing,
        resolution=modality.resolution,
    )  # fmt: skip


def modality_for(samples: Path, listings: Listings = ALONE) -> Modality:
    """Return a modality for externally generated samples, by their size; ValueError if no modality can read them.

    listings: who looks at files.
    """

    def look() -> tuple[str, tuple[int, ...]]:
        for name in available("modalities"):
            if (resolution := find("modalities", name).resolution_of(samples)) is not None:
                return name, resolution
        raise ValueError(f"--samples {samples}: in no format that can be evaluated without a model; give MODEL as well")

    name, resolution = listings.share(look)
    modality = find("modalities", name).of_resolution(resolution)
    assert modality is not None
    return modality


def modality_of_size(size: str) -> Modality:
    """Return a modality for samples of this size: "256", or "256x128x3"; ValueError if it is not a size."""
    numbers = size.lower().split("x")
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"--size: {size!r} is not a size; give e.g. 256, or height x width x channels as 256x128x3")
    for name in available("modalities"):
        modality = find("modalities", name).of_resolution(tuple(map(int, numbers)))
        if modality is not None:
            return modality
    raise ValueError(f"--size: {size!r}: no modality has samples of a size")


def write_reference(
    place: Callable[[], Path], modality: Modality, source: str, batch_size: int, device: torch.device,
    progress: Callable[[int, int], None] = lambda more, total: None, stop: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Write the Inception moments of a data set to a .npz with ADM's names; return the number of samples.

    place: returns the file to write; called after all checks, before the first sample is read. ValueError if the
    modality has no Inception space. Interrupted if `stop` returns True; then no file is written.
    """
    space = next((space for space in modality.spaces() if space.name == "inception"), None)
    if space is None:
        raise ValueError("reference: this modality has no Inception statistics")
    dataset = _dataset(modality, source)
    space.prepare(device)
    path = place()
    running = {name: RunningMoments() for name, *_ in MOMENTS}
    total, replaced = len(dataset), 0
    samples = spread_evenly(dataset, range(total), total)
    while items := list(islice(samples, batch_size)):
        if stop():
            raise Interrupted("the statistics")
        replaced += sum(fault is not None for _, fault in items)
        features = space(collate([example for example, _ in items], modality).data)
        for name, moments in running.items():
            moments.add(features[name])
        progress(len(items), total)
    about = {
        "source": Path(source).name, "data": dataset.fingerprint, "num_samples": total, "replaced": replaced,
        "preprocessing": modality.preprocessing, "resolution": modality.resolution, "weights": space.weights,
        "unilatent": __version__, "torch": torch.__version__,
    }  # fmt: skip
    arrays: dict[str, Any] = {PROVENANCE: np.array(json.dumps(about))}
    for name, mean, covariance, _ in MOMENTS:
        mu, sigma = running[name].moments()
        arrays |= {mean: mu.cpu().numpy(), covariance: sigma.cpu().numpy()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
    return total


def _dataset(modality: Modality, source: str, listings: Listings = ALONE) -> Dataset:
    settings = find("modalities", modality.config.name).DataConfig
    try:
        return modality.splits(settings.parse({"path": source, "held_out": 0}), listings).train
    except ValueError as error:
        raise ValueError(f"--reference: {error}") from None


def _statistics(path: Path) -> tuple[bool, dict[str, Moments], dict[str, Any], str]:
    """Return whether a .npz holds samples, its moments, what this package stored about them, and its hash."""
    names, arrays = _arrays(path)
    moments = _moments(arrays, path)
    if not moments and "arr_0" not in names:
        raise ValueError(f"--reference {path}: has {', '.join(names) or 'nothing'}; give mu and sigma, or arr_0")
    return "arr_0" in names, moments, _provenance(arrays, path), _hash(path)


def _arrays(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of all arrays, and the statistics among them; samples are not read here."""
    statistics = {PROVENANCE, *(name for _, *names, _ in MOMENTS for name in names)}
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("not an archive")
            return file.files, {name: file[name] for name in file.files if name in statistics}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--reference {path}: cannot be read as plain arrays ({reason}); write it again") from None


def _moments(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Moments]:
    moments = {}
    for tensor, mean, covariance, width in MOMENTS:
        if mean not in arrays or covariance not in arrays:
            continue
        mu, sigma = arrays[mean], arrays[covariance]
        shapes = f"{mean} {mu.shape} and {covariance} {sigma.shape}"
        if mu.shape != (width,) or sigma.shape != (width, width):
            raise ValueError(f"--reference {path}: {shapes}, not a mean ({width},) and covariance ({width}, {width})")
        if not all(np.issubdtype(x.dtype, np.floating) and np.isfinite(x).all() for x in (mu, sigma)):
            raise ValueError(f"--reference {path}: {shapes} are not finite numbers; compute it again")
        moments[tensor] = (torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())
    return moments


def _provenance(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """Return what this package stored about the statistics; {} for those of other software."""
    if PROVENANCE not in arrays:
        return {}
    about, kinds = {}, None
    try:
        about = json.loads(str(arrays[PROVENANCE]))
        kinds = type(about["num_samples"]), type(about["preprocessing"]), {type(side) for side in about["resolution"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    if kinds != (int, str, {int}):
        raise ValueError(f"--reference {path}: its {PROVENANCE} is damaged; write it again")
    return about


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
