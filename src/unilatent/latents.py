"""Latents on disk: safetensors shards with the fingerprint of the model that encoded them.

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

from .devices import resolve_precision
from .files import expanded, read_json, readable, write_json
from .methods.base import LatentModel
from .modalities.base import CountedBatches, Skipped
from .model_config import SamplingConfig
from .model_folder import read_weights
from .outputs import Outputs
from .records import HEADER
from .sampling import computing
from .types import move, take

INDEX = "index.json"
FIELDS = {"model": str, "seed": int, "precision": str, "shard_size": int, "names": list, "shards": list}
SHARD = re.compile(r"latents_\d{5,}\.safetensors")
NAME_SIZE = 64
"""Bytes of a name in the index, about."""


def encode_to_shards(
    model: LatentModel, source: Path, out: Path, *, seed: int = 0, batch_size: int = 64, shard_size: int = 4096,
    precision: str = "auto", progress: Callable[[int, int | None], None] | None = None, skipped: Skipped | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Encode all samples of `source` to shards in the folder `out`; latents already there are not encoded again.

    precision: as for `sample`. progress: called after each batch, with its size and the number of all samples (None:
    unknown); if it raises, all latents encoded so far are on disk.
    skipped: as in `Modality.read`.
    Returns the number of latents and how many of them were there before. ValueError if the folder has latents of
    another model, other settings or other data, or files of others.
    """
    outputs = encoded_outputs(out, source)
    precision = resolve_precision(precision, model.device, model.precision)
    header = {"model": model.tokenizer_fingerprint(), "seed": seed, "precision": precision, "shard_size": shard_size}
    left_out: list[str] = []

    def note(reason: str) -> None:
        left_out.append(reason)
        assert skipped is not None
        skipped(reason)

    batches = model.modality.read(source, batch_size, None if skipped is None else note)
    total = CountedBatches.total_of(batches)
    pending: list[Tensor] = []
    index: dict[str, Any] = {}
    folder, done = None, 0
    count = 0
    for data, names in batches:
        if folder is None:
            folder = outputs.begin()
            index, pending = _open_index(folder, header)
            done = len(index["names"])
        start, count = count, count + len(names)
        fresh = max(0, done - start)
        if index["names"][start : min(count, done)] != names[:fresh]:
            raise ValueError(f"{folder}: has latents of other data than {source}; choose another folder")
        if fresh < len(names):
            with computing(model, precision):
                pending.append(model.encode(take(data, slice(fresh, None)), seed=seed, start=start + fresh).cpu())
            index["names"] += names[fresh:]
        pending = _flush(outputs, index, pending, shard_size, last=False)
        if progress:
            try:
                progress(len(names), total)
            except BaseException:
                _flush(outputs, index, pending, shard_size, last=True)
                raise
    if folder is None:
        reason = f"the first: {left_out[0]}" if left_out else "give data of the modality of the model"
        raise ValueError(f"{source}: has no sample that can be encoded; {reason}")
    _flush(outputs, index, pending, shard_size, last=True)
    return count, done


def encoded_outputs(out: Path, source: Path) -> Outputs:
    """Return the folder of the latents of `source`; ValueError if it holds files of others, or is part of the source.

    Latents without a record are those that the index names. Beside them, files of others may lie.
    """
    named: set[str] = set()
    with suppress(ValueError):
        named = {INDEX, *_read_index(expanded(out) / INDEX)["shards"]}
    return Outputs(out, "encode", [source], shared=bool(named), keep=True, known=lambda name: name in named)


def count_latents(folder: Path) -> int | None:
    """Return how many latents a folder of shards has; None if its index cannot be read."""
    with suppress(ValueError):
        return len(_read_index(expanded(folder) / INDEX)["names"])
    return None


def decode_shards(
    model: LatentModel, folder: Path, batch_size: int = 64, settings: SamplingConfig | None = None,
    precision: str = "auto",
) -> Iterator[Any]:  # fmt: skip
    """Yield batches of data from a folder of shards; ValueError if another model encoded them.

    settings: of `LatentModel.decode`. precision: as for `sample`.
    """
    folder = expanded(folder)
    path = folder / INDEX
    if not path.is_file():
        views = " without --views" if (folder / HEADER).is_file() else ""
        raise ValueError(f"{folder}: no {INDEX} in it; give a folder written by `unilatent encode`{views}")
    index = _read_index(path)
    if index["model"] not in (model.tokenizer_fingerprint(), model.fingerprint()):  # as earlier versions wrote it
        raise ValueError(
            f"{folder}: latents of another model (fingerprint {index['model'][:12]}); decode with that one"
        )
    start = 0
    for shard in index["shards"]:
        for batch in _read_shard(folder / shard).split(batch_size):
            with computing(model, precision):
                decoded = model.decode(batch.to(model.device), seed=index["seed"], start=start, settings=settings)
            yield move(decoded, "cpu")
            start += len(batch)


def _open_index(folder: Path, header: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the index of the full shards with the names of all stored latents, and the latents of a shorter last
    shard, which is written again because more data may follow."""
    path = folder / INDEX
    if not path.is_file():
        return {**header, "names": [], "shards": []}, []
    index = _read_index(path)
    for field, value in header.items():
        if index.get(field) != value:
            raise ValueError(f"{folder}: has latents with another {field}; choose another folder or delete it")
    size = header["shard_size"]
    num_full = min(len(index["names"]) // size, len(index["shards"]))
    last, names = index["shards"][num_full:], index["names"]
    index = {**index, "shards": index["shards"][:num_full]}
    with suppress(ValueError):  # a damaged shard is encoded again
        latents = _read_shard(folder / last[0]) if last else torch.empty(0)
        if num_full * size + len(latents) == len(names):
            return index, [latents] if last else []
    return {**index, "names": names[: num_full * size]}, []


def _read_index(path: Path) -> dict[str, Any]:
    """Read an index; ValueError unless every field has its type and every shard is a file name of this folder."""
    way_out = "encode the data again with `unilatent encode`"
    index = read_json(path, way_out)
    for field, kind in FIELDS.items():
        if type(index.get(field)) is not kind:
            raise ValueError(f"{path}: {field} is {index.get(field)!r:.40}, not {kind.__name__}; {way_out}")
    for name in index["shards"]:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(f"{path}: shards: {name!r:.80} is not the name of a shard; {way_out}")
    return index


def _read_shard(path: Path) -> Tensor:
    tensors = read_weights(path)
    if "latents" not in tensors or tensors["latents"].ndim != 3:
        raise ValueError(f"{path}: holds no latents (B, K, D); encode the data again with `unilatent encode`")
    return tensors["latents"]


def _flush(outputs: Outputs, index: dict[str, Any], pending: list[Tensor], size: int, last: bool) -> list[Tensor]:
    """Write every full shard (on the last call also a shorter one) and return the latents that remain."""
    if not pending or (not last and sum(map(len, pending)) < size):
        return pending
    latents = torch.cat(pending)
    while len(latents) >= size or (last and len(latents)):
        name = f"latents_{len(index['shards']):05d}.safetensors"
        shard = latents[:size].contiguous()
        with outputs.writing(shard.nbytes) as new:
            save_file({"latents": shard}, new / name)
            readable(new / name)
        index["shards"].append(name)
        named = min(len(index["shards"]) * size, len(index["names"]))
        with outputs.writing(NAME_SIZE * named) as new:
            write_json(new / INDEX, {**index, "names": index["names"][:named]})
        latents = latents[size:]
    return [latents] if len(latents) else []
