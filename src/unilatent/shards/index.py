"""What a tar holds and where, from its headers alone: nothing is ever extracted, no member is trusted.

A sample is the members that share a key: `cat/7.jpg` and `cat/7.cls` are sample `cat/7`. Its class is the number in
`.cls`, or `label` in `.json`; its texts are in `.txt`, or `caption` or `captions` in `.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from ..files import write_text

VERSION = 2
LARGEST = 512 * 2**20
"""Bytes of a member, above which it is refused."""
LARGEST_HEADER = 2**20
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK)  # fmt: skip
LARGEST_LABEL = 2**20
PICKLES = frozenset({"npy", "npz", "pickle", "pkl", "pt", "pth", "pyd"})
"""Suffixes whose decoders run code that the file brings along; they are left alone."""
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class Index:
    """Samples in the order of their first member; every list has one entry a sample.

    places: (offset, bytes) of the data in the file. labels: class numbers, -1 where there is none. texts: (offset,
    bytes, suffix) of the member with its texts, the suffix "" where there is none.
    faults: what is wrong with a sample, "" if nothing is. refused: members that are not what they should be, with the
    reason. pickles: members left alone. end: what is wrong with the end of the file, "" if nothing is.
    """

    keys: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    texts: list[tuple[int, int, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pickles: list[str] = field(default_factory=list)
    end: str = ""

    def __post_init__(self) -> None:
        """From JSON, which knows no tuples, the same as from the tar: fingerprints are made of these."""
        self.places = [(offset, size) for offset, size in self.places]
        self.texts = [(offset, size, suffix) for offset, size, suffix in self.texts]


@dataclass
class _Sample:
    place: tuple[int, int] | None = None
    classed: bool = False
    label: int = -1
    noted: int = -1
    """The label in its .json, which .cls overrules."""
    text: tuple[int, int, str] = (0, 0, "")
    fault: str = ""


class _Header(tarfile.TarInfo):
    """Extended headers are read whole by `tarfile`: none of a size that fills memory, or that leads backwards."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]  # None in some versions of typeshed
        if header.size < 0 or (header.type in EXTENDED and header.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def index(path: Path, suffixes: Collection[str], cache: Path | None = None) -> Index:
    """Of one uncompressed tar, whose samples' data have one of those suffixes; kept in the folder `cache` if given.

    A damaged tar gives what is whole before the damage. OSError if the file cannot be read.
    """
    if cache is None:
        return _scan(path, suffixes)
    stat = path.stat()
    key = repr((VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, sorted(suffixes)))
    kept = cache / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Index(**json.loads(kept.read_text(encoding="utf-8")))
    found = _scan(path, suffixes)
    with suppress(OSError, UnicodeEncodeError):  # a cache that cannot be written only costs time
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(asdict(found)))
    return found


def _scan(path: Path, suffixes: Collection[str]) -> Index:
    samples: dict[str, _Sample] = {}
    found = Index()
    with path.open("rb") as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while member := tar.next():
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.name}: {member.size} bytes")
                    _add(member, file.fileno(), size, suffixes, samples, found)
                    tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                    offset = tar.offset
            found.end = _end(os.pread(file.fileno(), tarfile.BLOCKSIZE, offset), offset, size)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            found.end = f"damaged after byte {offset:,} of {size:,} ({reason})" if size else "empty file"
    for key, sample in samples.items():
        if sample.place is None and not sample.classed and not sample.fault:
            continue  # a .json of something else
        found.keys.append(key.partition("\0")[0])
        found.places.append(sample.place or (0, 0))
        found.labels.append(sample.label if sample.classed else sample.noted)
        found.texts.append(sample.text)
        missing = "" if sample.place else f"no data beside its class; looked for .{', .'.join(sorted(suffixes))}"
        found.faults.append(sample.fault or missing)
    return found


def _end(block: bytes, offset: int, size: int) -> str:
    """A tar closes with blocks of zeros; where it does not, members may be missing."""
    if not block:
        return f"no closing mark after byte {offset:,}: it may have been cut short"
    return "" if not any(block) else f"damaged header at byte {offset:,} of {size:,}; nothing after it can be read"


def _add(
    member: tarfile.TarInfo, fd: int, size: int, suffixes: Collection[str], samples: dict[str, _Sample], found: Index
) -> None:
    """One member to its sample."""
    reason = _refusal(member)
    if reason:
        found.refused.append(f"{member.name}: {reason}")
    parts = KEY.fullmatch(member.name)
    if parts is None or (member.isdir() and not reason):
        return
    key, suffix = parts[1], parts[2].lower()
    if suffix.rpartition(".")[2] in PICKLES:
        found.pickles.append(member.name)
        return
    if suffix not in suffixes and suffix not in ("cls", "json", "txt"):
        return
    sample = samples.setdefault(key, _Sample())
    if reason:
        sample.fault = f"{member.name}: {reason}"
    elif member.offset_data + member.size > size:
        sample.fault = f"{member.name}: cut short, {max(0, size - member.offset_data):,} of {member.size:,} bytes"
    elif suffix in suffixes:
        _add_data(member, key, sample, samples)
    elif suffix == "txt":
        sample.text = (member.offset_data, member.size, "txt")
    else:
        _add_label(member, suffix, sample, os.pread(fd, min(member.size, LARGEST_LABEL), member.offset_data))


def _add_data(member: tarfile.TarInfo, key: str, sample: _Sample, samples: dict[str, _Sample]) -> None:
    if sample.place is not None:  # nobody can tell which of them the class belongs to
        sample.fault = f"{member.name}: its key appears more than once"
        samples[f"{key}\0{member.offset}"] = sample
    sample.place = (member.offset_data, member.size)


def _add_label(member: tarfile.TarInfo, suffix: str, sample: _Sample, raw: bytes) -> None:
    if suffix == "json":
        with suppress(ValueError, RecursionError):
            content = json.loads(raw)
            content = content if isinstance(content, dict) else {}
            label = content.get("label")
            sample.noted = label if type(label) is int and 0 <= label < 2**31 else -1
            if sample.text[2] != "txt" and not content.keys().isdisjoint(("caption", "captions")):
                sample.text = (member.offset_data, member.size, "json")
        return
    if sample.classed:
        sample.fault = f"{member.name}: its key appears more than once"
    sample.classed = True
    text = raw[:64].strip()
    if text.isdigit() and len(text) < 10:
        sample.label = int(text)
    else:
        sample.fault = f"{member.name}: {text[:20].decode('ascii', 'replace')!r} is no class number"


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; "" if it is."""
    parts = re.split(r"[/\\]", member.name)
    if parts[0] == "" or re.match(r"[A-Za-z]:", member.name):
        return "an absolute path, refused"
    if ".." in parts:
        return "leads out of the archive, refused"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname}, refused"
    if member.issparse():
        return "a sparse file, refused"
    if not (member.isreg() or member.isdir()):
        return "neither a file nor a folder, refused"
    if member.size > LARGEST:
        return f"{member.size:,} bytes, more than {LARGEST:,}, refused"
    return ""
