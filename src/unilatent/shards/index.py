"""Index of a tar file, from its headers: nothing is extracted, no member is trusted.

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

VERSION = 3
LARGEST = 512 * 2**20
"""Largest accepted member, in bytes."""
LARGEST_HEADER = 2**20
"""Largest accepted extended header, in bytes."""
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK)  # fmt: skip
LARGEST_LABEL = 2**20
"""Bytes that are read of a .cls or .json member."""
PICKLES = frozenset({"npy", "npz", "pickle", "pkl", "pt", "pth", "pyd"})
"""Suffixes whose decoders can run code from the file; such members are not read."""
NO_DATA = "no data beside its class; looked for ."
"""How the fault of a sample without data begins; the suffixes follow."""
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class Index:
    """Samples in the order of their first member. The fingerprint of shards without a manifest is a hash of these lists
    (`reading`), the texts of `faults` included: a change of any text makes old runs refuse their data.

    Lists with one entry per sample: keys; places: (offset, bytes) of the data in the file; labels: class numbers, -1 if
    there is none; texts: (offset, bytes, suffix) of the member with the texts, suffix "" if there is none; faults:
    error of the sample, "" if it is valid.
    Of the file: unread: names of members with other suffixes that belong to no sample; refused: names of refused
    members with the reason; pickles: names of members that are not read because
    decoding could run code; end: error at the end of the file, "" if there is none.
    """

    keys: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    texts: list[tuple[int, int, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pickles: list[str] = field(default_factory=list)
    end: str = ""

    def __post_init__(self) -> None:
        """Convert lists from JSON to tuples, so that a cached index has the same fingerprint."""
        self.places = [(offset, size) for offset, size in self.places]
        self.texts = [(offset, size, suffix) for offset, size, suffix in self.texts]


@dataclass
class _Sample:
    place: tuple[int, int] | None = None
    classed: bool = False
    label: int = -1
    json_label: int = -1
    """The label in its .json; .cls takes precedence."""
    text: tuple[int, int, str] = (0, 0, "")
    fault: str = ""


class _Header(tarfile.TarInfo):
    """A header that rejects negative sizes, and extended headers that would fill memory: `tarfile` reads them whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]  # None in some versions of typeshed
        if header.size < 0 or (header.type in EXTENDED and header.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def index(path: Path, suffixes: Collection[str], cache: Path | None = None) -> Index:
    """Index one uncompressed tar; cached in the folder `cache` if given.

    suffixes: those of the samples' data. A damaged tar yields the samples before the damage. OSError if the file cannot
    be read.
    """
    if cache is None:
        return _scan(path, suffixes)
    stat = path.stat()
    key = repr((VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, sorted(suffixes)))
    cached = cache / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Index(**json.loads(cached.read_text(encoding="utf-8")))
    content = _scan(path, suffixes)
    with suppress(OSError, UnicodeEncodeError):  # without a cache the next call scans again
        cache.mkdir(parents=True, exist_ok=True)
        write_text(cached, json.dumps(asdict(content)))
    return content


def _scan(path: Path, suffixes: Collection[str]) -> Index:
    samples: dict[str, _Sample] = {}
    others: dict[str, str] = {}  # key -> name of a member that is not read
    content = Index()
    with path.open("rb") as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while member := tar.next():
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.name}: {member.size} bytes")
                    _add(member, file.fileno(), size, suffixes, samples, others, content)
                    tar.members = []  # type: ignore[attr-defined]  # otherwise every header stays in memory
                    offset = tar.offset
            content.end = _end(os.pread(file.fileno(), tarfile.BLOCKSIZE, offset), offset, size)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            content.end = f"damaged after byte {offset:,} of {size:,} ({reason})" if size else "empty file"
    content.unread = [name for key, name in others.items() if key not in samples or samples[key].place is None]
    for key, sample in samples.items():
        if sample.place is None and not sample.classed and not sample.fault:
            continue  # a .json without a sample
        content.keys.append(key.partition("\0")[0])
        content.places.append(sample.place or (0, 0))
        content.labels.append(sample.label if sample.classed else sample.json_label)
        content.texts.append(sample.text)
        missing = "" if sample.place else f"{NO_DATA}{', .'.join(sorted(suffixes))}"
        content.faults.append(sample.fault or missing)
    return content


def _end(block: bytes, offset: int, size: int) -> str:
    """Return the error if a tar does not end with blocks of zeros: members may be missing."""
    if not block:
        return f"no end-of-archive mark after byte {offset:,}: the file may be truncated"
    return "" if not any(block) else f"damaged header at byte {offset:,} of {size:,}; nothing after it can be read"


def _add(
    member: tarfile.TarInfo, fd: int, size: int, suffixes: Collection[str], samples: dict[str, _Sample],
    others: dict[str, str], content: Index,
) -> None:  # fmt: skip
    """Add one member to its sample."""
    reason = _refusal(member)
    if reason:
        content.refused.append(f"{member.name}: {reason}")
    parts = KEY.fullmatch(member.name)
    if parts is None or (member.isdir() and not reason):
        return
    key, suffix = parts[1], parts[2].lower()
    if suffix.rpartition(".")[2] in PICKLES:
        content.pickles.append(member.name)
        return
    if suffix not in suffixes and suffix not in ("cls", "json", "txt"):
        others[key] = member.name
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
    if sample.place is not None:  # the class could belong to either
        sample.fault = f"{member.name}: its key appears more than once"
        samples[f"{key}\0{member.offset}"] = sample
    sample.place = (member.offset_data, member.size)


def _add_label(member: tarfile.TarInfo, suffix: str, sample: _Sample, raw: bytes) -> None:
    if suffix == "json":
        with suppress(ValueError, RecursionError):
            content = json.loads(raw)
            content = content if isinstance(content, dict) else {}
            label = content.get("label")
            sample.json_label = label if type(label) is int and 0 <= label < 2**31 else -1
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
    """Return why a member is refused; "" if it is not."""
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
