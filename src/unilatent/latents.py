"""Latents on disk: safetensors shards that say which model made them.

index.json              {"model", "seed", "precision", "shard_size", "names", "shards"}; written after each shard
latents_00000.safetensors   {"latents": (n, K, D)}, n = shard_size in all but the last
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .files import read_json, write_json
from .methods.base import LatentModel, SamplingConfig, read_weights
from .types import move, take

INDEX = "index.json"
FIELDS = {"model": str, "seed": int, "precision": str, "shard_size": int, "names": list, "shards": list}
SHARD = re.compile(r"latents_\d{5,}\.safetensors")


def encode_to_shards(
    model: LatentModel, source: Path, make_folder: Callable[[], Path], *, seed: int = 0, batch_size: int = 64,
    shard_size: int = 4096, precision: str = "fp32", progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """All samples of `source` as shards in a folder; latents of the same model and settings are kept.

    progress: called after each batch; what it raises leaves everything encoded so far on disk.
    Returns how many latents there are, and how many of them were there before. ValueError if the folder holds the
    latents of another model or with other settings.
    """
    header = {"model": model.fingerprint(), "seed": seed, "precision": precision, "shard_size": shard_size}
    batches = model.modality.read(source, batch_size)
    pending: list[Tensor] = []
    index: dict[str, Any] = {}
    folder, done = None, 0
    count = 0
    for data, names in batches:
        if folder is None:
            folder = make_folder()
            index, pending = _open_index(folder, header)
            done = len(index["names"])
        start, count = count, count + len(names)
        fresh = max(0, done - start)
        if index["names"][start : min(count, done)] != names[:fresh]:
            raise ValueError(f"{folder}: was made from other data than {source}; choose another folder")
        if fresh < len(names):
            pending.append(model.encode(take(data, slice(fresh, None)), seed=seed, start=start + fresh).cpu())
            index["names"] += names[fresh:]
        pending = _flush(folder, index, pending, shard_size, last=False)
        if progress:
            try:
                progress(len(names))
            except BaseException:
                _flush(folder, index, pending, shard_size, last=True)
                raise
    if folder is None:
        raise ValueError(f"{source}: nothing to encode in it")
    _flush(folder, index, pending, shard_size, last=True)
    return count, done


def decode_shards(
    model: LatentModel, folder: Path, batch_size: int = 64, settings: SamplingConfig | None = None
) -> Iterator[Any]:
    """Batches of data from a folder of shards; ValueError if another model made them. settings: as for `decode`."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder}: no {INDEX} in it; give a folder written by `unilatent encode`")
    index = _read_index(path)
    if index["model"] != model.fingerprint():
        raise ValueError(
            f"{folder}: latents of another model (fingerprint {index['model'][:12]}); decode with that one"
        )
    start = 0
    for shard in index["shards"]:
        for batch in _read_shard(folder / shard).split(batch_size):
            made = model.decode(batch.to(model.device), seed=index["seed"], start=start, settings=settings)
            yield move(made, "cpu")
            start += len(batch)


def _open_index(folder: Path, header: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The index of whole shards with the names of all latents that are there, and those of a shorter last shard, which
    is to be written again: more data may have come."""
    path = folder / INDEX
    if not path.is_file():
        return {**header, "names": [], "shards": []}, []
    index = _read_index(path)
    for field, value in header.items():
        if index.get(field) != value:
            raise ValueError(f"{folder}: holds latents with another {field}; choose another folder or delete it")
    size = header["shard_size"]
    whole = min(len(index["names"]) // size, len(index["shards"]))
    rest, names = index["shards"][whole:], index["names"]
    index = {**index, "shards": index["shards"][:whole]}
    with suppress(ValueError):  # a damaged one is encoded again
        latents = _read_shard(folder / rest[0]) if rest else torch.empty(0)
        if whole * size + len(latents) == len(names):
            return index, [latents] if rest else []
    return {**index, "names": names[: whole * size]}, []


def _read_index(path: Path) -> dict[str, Any]:
    """ValueError unless every field is there and of its type, and no shard lies elsewhere."""
    way_out = "make the latents again with `unilatent encode`"
    index = read_json(path, way_out)
    for field, kind in FIELDS.items():
        if type(index.get(field)) is not kind:
            raise ValueError(f"{path}: {field} is {index.get(field)!r:.40}, not {kind.__name__}; {way_out}")
    for name in index["shards"]:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(f"{path}: shards: {name!r:.80} is no name of a shard; {way_out}")
    return index


def _read_shard(path: Path) -> Tensor:
    tensors = read_weights(path)
    if "latents" not in tensors or tensors["latents"].ndim != 3:
        raise ValueError(f"{path}: holds no latents (B, K, D); make them again with `unilatent encode`")
    return tensors["latents"]


def _flush(folder: Path, index: dict[str, Any], pending: list[Tensor], size: int, last: bool) -> list[Tensor]:
    """Writes every full shard (and the rest if this is the last call) and returns what is left."""
    if not pending or (not last and sum(map(len, pending)) < size):
        return pending
    latents = torch.cat(pending)
    while len(latents) >= size or (last and len(latents)):
        name = f"latents_{len(index['shards']):05d}.safetensors"
        temporary = folder / f"{name}.tmp"
        save_file({"latents": latents[:size].contiguous()}, temporary)
        temporary.replace(folder / name)
        index["shards"].append(name)
        named = min(len(index["shards"]) * size, len(index["names"]))
        write_json(folder / INDEX, {**index, "names": index["names"][:named]})
        latents = latents[size:]
    return [latents] if len(latents) else []
