"""Write samples to shards in parallel: the same bytes for any number of workers, and after any interruption.

Unfinished, the folder contains `plan.json` (a hash of samples and settings) and a `.done` file for each finished tar.
When all are finished, `shards.json` replaces them.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from ..faults import reach
from ..files import room, write_json, write_text
from ..maths.streams import generator
from ..outputs import Outputs
from ..plain_text import count_of
from .index import index
from .places import MANIFEST, Manifest, Shard, fetch

BAD = "bad_samples.jsonl"
PLAN = "plan.json"
LEFTOVER = re.compile(r"(shard-\d{6,}\.(tar|done)|plan\.json|shards\.json|bad_samples\.jsonl)\.tmp-\d+")
"""Names of what a killed call leaves."""
LONGEST = 200
"""Largest number of characters of a key."""


class RawSamples(Protocol):
    """Raw samples by number. Pickled for the worker processes."""

    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    """How they are encoded; stored in the manifest."""

    def encode(self, number: int) -> tuple[str, bytes]:
        """Return suffix and content of a sample's data; ValueError if it is damaged."""

    def stamp(self, number: int) -> str:
        """Return metadata that identifies a sample without reading it."""

    def check(self, number: int) -> str:
        """Raise ValueError if a sample is damaged. Return a remark on one that is not; "" without."""

    def beside(self, number: int) -> Sequence[tuple[str, bytes]]:
        """Return suffix and content of a sample's other members (captions); ValueError if one is damaged."""

    def adopt(self, class_names: Sequence[str]) -> None:
        """Number the classes as an earlier version of this package did, where it numbered the same ones otherwise."""


@dataclass(frozen=True)
class Summary:
    """Numbers of samples written (total), shards, bad samples, and shards that were already valid (reused)."""

    total: int
    shards: int
    bad: int
    reused: int


@dataclass(frozen=True)
class _Plan:
    samples: RawSamples
    keys: list[str]
    order: list[int]
    shard_size: int
    folder: Path
    sha256: str

    @property
    def shards(self) -> range:
        return range(-(-len(self.order) // self.shard_size))

    def name(self, shard: int) -> str:
        return f"shard-{shard:06d}.tar"

    def size(self, shard: int) -> int:
        """Return the number of samples in a shard, including bad ones."""
        return min(self.shard_size, len(self.order) - shard * self.shard_size)


def write(
    samples: RawSamples, folder: Path, shard_size: int, seed: int | None, workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:  # fmt: skip
    """Write shards of `shard_size` samples and their manifest. Valid shards of an earlier call are reused.

    seed: of the order; None for the order of names. progress: called with (samples done, samples in all).
    ValueError if the folder contains something else.
    """
    if (folder / MANIFEST).is_file():
        samples.adopt(_read_manifest(folder).class_names)
    plan = _plan(samples, folder, shard_size, seed)
    manifest = _finished(plan)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink()
    if manifest is not None:
        return _repair(plan, manifest, workers, progress)
    write_json(folder / PLAN, {"sha256": plan.sha256})
    records = {shard: record for shard in plan.shards if (record := _done(plan, shard))}
    reused = len(records)
    count = sum(record["samples"] for record in records.values())
    if progress:
        progress(count, len(plan.order))
    missing = [shard for shard in plan.shards if shard not in records]
    for shard, record in _each(plan, missing, workers):
        records[shard] = record
        count += record["samples"]
        if progress:
            progress(count, len(plan.order))
    return _close(plan, seed, [records[shard] for shard in plan.shards], reused)


def _plan(samples: RawSamples, folder: Path, shard_size: int, seed: int | None) -> _Plan:
    number = len(samples.names)
    order = list(range(number))
    if seed is not None:
        order = torch.randperm(number, generator=generator("prepare", seed)).tolist()
    digest = hashlib.sha256(json.dumps([samples.settings, shard_size, seed, samples.class_names]).encode())
    for i, name in enumerate(samples.names):
        label = samples.labels[i] if samples.labels else ""
        digest.update(f"{name}\0{samples.stamp(i)}\0{label}\0".encode("utf-8", "surrogateescape"))
    return _Plan(samples, keys(samples.names), order, shard_size, folder, digest.hexdigest())


def keys(names: Sequence[str]) -> list[str]:
    """Return a unique key per name: the name without its suffix, and without dots, which would end a key."""
    used: set[str] = set()
    unique_keys = []
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = file.rpartition(".")[0] or file
        key = f"{folder}/{stem.replace('.', '_')}".lstrip("/")[-LONGEST:].lstrip("/")
        unique, count = key, 1
        while unique in used:
            count += 1
            unique = f"{key}~{count}"
        used.add(unique)
        unique_keys.append(unique)
    return unique_keys


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    return Manifest.parse(path.read_text(encoding="utf-8"), str(path))


def _finished(plan: _Plan) -> Manifest | None:
    """Return the manifest of an earlier, complete call; ValueError if the folder contains something else."""
    folder, hint = plan.folder, "choose another --out, or delete it"
    if (folder / MANIFEST).is_file():
        manifest = _read_manifest(folder)
        if manifest.made.get("plan") != plan.sha256:
            raise ValueError(f"{folder}: contains shards of other images or settings; {hint}")
        return manifest
    with suppress(OSError, ValueError, KeyError):
        if json.loads((folder / PLAN).read_text())["sha256"] == plan.sha256:
            return None
        raise ValueError
    if (folder / PLAN).exists() or any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: contains unfinished shards of other samples or settings; {hint}")
    Outputs(folder, "data prepare")  # refuses a folder of others
    return None


def _repair(plan: _Plan, manifest: Manifest, workers: int, progress: Callable[[int, int], None] | None) -> Summary:
    """Check every shard against the manifest, and write missing or damaged ones again."""
    facts: list[dict[str, Any]] = []
    damaged = []
    count = 0
    for number, shard in enumerate(manifest.shards):
        facts.append(shard)
        if _is_valid(plan.folder / shard["name"], shard["sha256"]):
            count += plan.size(number)
        else:
            damaged.append(number)
        if progress:
            progress(count, len(plan.order))
    for number, record in _each(plan, damaged, workers):
        facts[number] = record["shard"]
        count += plan.size(number)
        if progress:
            progress(count, len(plan.order))
    total = sum(shard["count"] for shard in facts)
    if facts != list(manifest.shards):  # another version of a library may encode differently
        write_text(plan.folder / MANIFEST, Manifest(total, manifest.class_names, manifest.made, tuple(facts)).text())
    _clear(plan)
    return Summary(total, len(facts), len(plan.order) - total, len(facts) - len(damaged))


def _is_valid(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _done(plan: _Plan, shard: int) -> dict[str, Any] | None:
    """Return the record of a shard if it is complete."""
    path = plan.folder / plan.name(shard)
    with suppress(OSError, ValueError, KeyError):
        record: dict[str, Any] = json.loads(path.with_suffix(".done").read_text())
        if _sha256(path) == record["shard"]["sha256"]:
            return record
    return None


def _each(plan: _Plan, shards: list[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write shards and yield their records as they are finished."""
    if workers <= 1 or len(shards) <= 1:
        for shard in shards:
            yield shard, _write_shard(plan, shard)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), initializer=_start, initargs=(plan,)) as pool:
        futures = {pool.submit(_write_in_worker, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_WORKER_INPUT: list[Any] = []
"""The argument of `_start` in a worker process: a plan, or samples."""


def _start(work: Any) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    torch.set_num_threads(1)
    _WORKER_INPUT[:] = [work]


def _exit_with_parent() -> None:
    """Exit when the main process ends; otherwise workers would wait for ever after it was killed.

    A fork server may be their parent, so the parent's process id does not help.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write_in_worker(shard: int) -> dict[str, Any]:
    return _write_shard(_WORKER_INPUT[0], shard)


def _write_shard(plan: _Plan, shard: int) -> dict[str, Any]:
    """Write one tar atomically, and the record of its contents."""
    path = plan.folder / plan.name(shard)
    members = plan.order[shard * plan.shard_size : (shard + 1) * plan.shard_size]
    bad: list[dict[str, str]] = []
    done, size = 0, 0

    def needed() -> int:
        """Bytes that the samples which are left take, judged by those before."""
        return (len(members) - done) * (size // max(done, 1) + 2 * tarfile.BLOCKSIZE)

    with room(plan.folder, needed), _atomic_tar(path) as tar:
        for i in members:
            try:
                parts = [plan.samples.encode(i), *plan.samples.beside(i)]
            except ValueError as error:
                bad.append({"sample": plan.samples.names[i], "reason": " ".join(str(error).split())})
                continue
            if plan.samples.labels is not None:
                _add(tar, f"{plan.keys[i]}.cls", str(plan.samples.labels[i]).encode())
            for suffix, raw in parts:
                size += len(raw)
                _add(tar, f"{plan.keys[i]}.{suffix}", raw)
            done += 1
    facts = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
    record = {"shard": {**facts, "count": len(members) - len(bad)}, "samples": len(members), "bad": bad}
    write_json(path.with_suffix(".done"), record)
    return record


@contextmanager
def _atomic_tar(path: Path) -> Iterator[tarfile.TarFile]:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                yield tar
            file.flush()
            os.fsync(file.fileno())
        reach("shards.before_rename")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    """Add a member, without time and owner in its header."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(raw), 0o444
    tar.addfile(member, io.BytesIO(raw))


def _close(plan: _Plan, seed: int | None, records: list[dict[str, Any]], reused: int) -> Summary:
    """Write the list of bad samples and the manifest, then delete what only an interrupted call needs."""
    shards = tuple(record["shard"] for record in records)
    total = sum(shard["count"] for shard in shards)
    bad = [line for record in records for line in record["bad"]]
    if not total:
        raise ValueError(
            f"{plan.folder}: not one of {count_of(len(bad), 'sample')} could be read; the first: {bad[0]['reason']}"
        )
    if bad:
        write_text(plan.folder / BAD, "".join(json.dumps(line) + "\n" for line in bad))
    settings = {**plan.samples.settings, "shard_size": plan.shard_size, "seed": seed, "plan": plan.sha256}
    write_text(plan.folder / MANIFEST, Manifest(total, plan.samples.class_names, settings, shards).text())
    _clear(plan)
    return Summary(total, len(shards), len(bad), reused)


def _clear(plan: _Plan) -> None:
    for path in (plan.folder / PLAN, *[(plan.folder / plan.name(i)).with_suffix(".done") for i in plan.shards]):
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checking ------------------------------------------------------------------------------------------------------


def check_all(samples: RawSamples, workers: int) -> Iterator[tuple[str, str]]:
    """Yield the fault of each raw sample, in order, and a remark on a valid one; "" without."""
    if workers <= 1:
        yield from (_checked(samples, number) for number in range(len(samples.names)))
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(samples,)) as pool:
        yield from pool.map(_check_in_worker, range(len(samples.names)), chunksize=32)


def _check_in_worker(number: int) -> tuple[str, str]:
    return _checked(_WORKER_INPUT[0], number)


def _checked(samples: RawSamples, number: int) -> tuple[str, str]:
    try:
        return "", samples.check(number)
    except ValueError as error:
        return " ".join(str(error).split()), ""


def verify(shards: Sequence[Shard], labelled: bool, suffixes: frozenset[str]) -> Iterator[tuple[Shard, list[str]]]:
    """Yield each shard with its faults: differences from the manifest, and errors in the tar.

    labelled: whether every sample must have a class.
    """
    for shard in shards:
        yield shard, _faults(shard, labelled, suffixes)


def _faults(shard: Shard, labelled: bool, suffixes: frozenset[str]) -> list[str]:
    faults: list[str] = []
    try:
        path = fetch(shard)
        size, content = path.stat().st_size, index(path, suffixes)
        if shard.sha256 and (actual := _sha256(path)) != shard.sha256:
            faults.append(f"SHA-256 is {actual}, the manifest says {shard.sha256}")
    except OSError as error:
        return [error.strerror or str(error)]
    if shard.bytes not in (None, size):
        faults.append(f"{size:,} bytes, the manifest says {shard.bytes:,}")
    if shard.count not in (None, len(content.keys)):
        faults.append(f"{count_of(len(content.keys), 'sample')}, the manifest says {shard.count:,}")
    faults += [content.end] if content.end else []
    faults += content.refused
    faults += [fault for fault in dict.fromkeys(content.faults) if fault and fault not in content.refused]
    if labelled:
        rows = zip(content.keys, content.labels, content.faults, strict=True)
        faults += [f"{key}: no class" for key, label, fault in rows if label < 0 and not fault]
    faults += [f"{name}: not read, its format can run code when decoded" for name in content.pickles]
    return faults
