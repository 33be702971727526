"""Locations of shards (a folder, a brace pattern or a URL), their manifest, and cached downloads.

shards.json   {"format", "total", "class_names", "made", "shards": [{"name", "bytes", "sha256", "count"}], "sha256"};
              the last is a hash of the rest. Without a manifest, any WebDataset folder or pattern is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from ..pretrained import CHUNK, TIMEOUT, offline

MANIFEST = "shards.json"
FORMAT = 1
ATTEMPTS = 4
"""Attempts per download, with pauses of 1, 2 and 4 seconds between them."""
SCHEMES = {"http": "", "https": "", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""Accepted URL schemes, and the package that opens each. Never `pipe:`, which runs a shell command."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
NAME = re.compile(r"[A-Za-z0-9_-][\w .+@=-]*\.tar")
MANY = 1_000_000
"""Largest number of shards in a brace range."""


@dataclass(frozen=True)
class Shard:
    """One tar. name: its file name. place: its path or URL. count, bytes, sha256: from the manifest, else None."""

    name: str
    place: str
    count: int | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Contents of shards.json. total: number of samples. class_names: () without classes. made: the settings they were
    written with. shards: {"name", "bytes", "sha256", "count"} of each."""

    total: int
    class_names: tuple[str, ...]
    made: dict[str, Any]
    shards: tuple[dict[str, Any], ...]

    def text(self) -> str:
        """Return the exact text of the file, which ends with a hash of the rest."""
        body = {"format": FORMAT, **asdict(self)}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest}, indent=1) + "\n"

    @property
    def sha256(self) -> str:
        return str(json.loads(self.text())["sha256"])

    @staticmethod
    def parse(text: str, where: str) -> Manifest:
        """Parse the text of a manifest at `where`; ValueError if it is damaged or of a newer format."""
        try:
            content = json.loads(text)
            version = content["format"]
            if type(version) is int and version > FORMAT:
                raise ValueError(f"{where}: format {version}, this version reads up to {FORMAT}; update unilatent")
            shards = tuple(dict(shard) for shard in content["shards"])
            manifest = Manifest(content["total"], tuple(content["class_names"]), dict(content["made"]), shards)
            valid = manifest.text() == text and sum(shard["count"] for shard in shards) == manifest.total
            valid = valid and all(NAME.fullmatch(shard["name"]) and shard["count"] >= 0 for shard in shards)
            valid = valid and all(shard.keys() == {"name", "bytes", "sha256", "count"} for shard in shards)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
            valid = False
        if not valid:
            raise ValueError(f"{where}: damaged; copy it again, or delete it to read the shards without it")
        return manifest


# ---- paths ---------------------------------------------------------------------------------------------------------


def is_shards(path: str, suffixes: Collection[str]) -> bool:
    """Return whether a path names shards: a URL, a brace pattern, a tar, a folder with a manifest or with tars.

    suffixes: those of the data. A folder that also contains folders or files with these suffixes does not count, nor
    does a data set "hf:OWNER/NAME".
    """
    if path.startswith("hf:") and not path.startswith("hf://"):
        return False
    local = Path(path).expanduser()
    if os.path.isdir(local):
        return (local / MANIFEST).is_file() or _only_tars(local, suffixes)
    if os.path.exists(local):
        return local.suffix.lower() == ".tar" or local.name == MANIFEST
    return SCHEME.match(path) is not None or path.lower().endswith(".tar") or local.name == MANIFEST


def _only_tars(folder: Path, suffixes: Collection[str]) -> bool:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    kinds = {"/" if entry.is_dir() else entry.name.lower().rpartition(".")[2] for entry in entries}
    return "tar" in kinds and kinds.isdisjoint({"/", *suffixes})


def find(path: str, field: str) -> tuple[list[Shard], Manifest | None]:
    """Return the shards at a path, in order, and their manifest, if any.

    field: name of the setting; ValueError starts with it, and says what is missing and what to do.
    """
    if os.path.exists(Path(path).expanduser()) or not (scheme := SCHEME.match(path)):
        return _local(path, field)
    if scheme[1].lower() not in SCHEMES:
        refused = "runs a shell command and is refused" if scheme[1].lower() == "pipe" else "has an unknown URL scheme"
        raise ValueError(f"{field}: {path!r} {refused}; give a folder, a .tar, or a URL: {', '.join(SCHEMES)}")
    if urlsplit(path).path.lower().endswith(".tar"):
        return [Shard(_name(url, field), url) for url in expand(path)], None
    base = path.removesuffix(MANIFEST).rstrip("/")
    manifest = Manifest.parse(_text(f"{base}/{MANIFEST}", field), f"{base}/{MANIFEST}")
    return [Shard(place=f"{base}/{shard['name']}", **shard) for shard in manifest.shards], manifest


def _local(path: str, field: str) -> tuple[list[Shard], Manifest | None]:
    folder = Path(path).expanduser()
    if folder.name == MANIFEST:
        folder = folder.parent
    if (folder / MANIFEST).is_file():
        manifest = Manifest.parse((folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST))
        shards = [Shard(place=str(folder / shard["name"]), **shard) for shard in manifest.shards]
    else:
        manifest = None
        tars = sorted(folder.glob("*.tar")) if folder.is_dir() else [Path(p) for p in expand(str(folder))]
        shards = [Shard(tar.name, str(tar)) for tar in tars]
    missing = [shard.place for shard in shards if not Path(shard.place).is_file()]
    if missing or not shards:
        what = f"{missing[0]} does not exist" if missing else f"{path} contains no .tar"
        more = f" ({len(missing)} of {len(shards)} shards are missing)" if len(missing) > 1 else ""
        raise ValueError(f"{field}: {what}{more}; copy the shards again, or create them with `unilatent data prepare`")
    return shards, manifest


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: `a-{000..003}.tar`, `{train,val}-0.tar`."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if i % 2 else None
        if span:
            first, last = int(span[1]), int(span[2])
            if not 0 <= last - first < MANY:
                raise ValueError(f"{pattern}: {{{piece}}} is not a range of shards; write {{000000..000099}}")
            choices.append([str(n).zfill(len(span[1])) for n in range(first, last + 1)])
        else:
            choices.append(piece.split(",") if i % 2 else [piece])
    return ["".join(parts) for parts in product(*choices)]


def _name(url: str, field: str) -> str:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not NAME.fullmatch(name):
        raise ValueError(f"{field}: {url!r} does not end with the name of a .tar")
    return name


def is_local(shard: Shard) -> bool:
    """Whether a shard is a file, which needs no download."""
    return not SCHEME.match(shard.place) or os.path.exists(shard.place)


# ---- downloads -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of downloaded shards and indices: `shards` in $UNILATENT_CACHE, or in ~/.cache/unilatent."""
    chosen = os.environ.get("UNILATENT_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unilatent") / "shards"


def fetch(shard: Shard) -> Path:
    """Return the shard's local file. A URL is downloaded once, and checked if the manifest has its hash.

    Several processes may call this at the same time. ValueError if the download fails.
    """
    if is_local(shard):
        return Path(shard.place)
    from filelock import FileLock

    folder = cache_folder() / hashlib.sha256(shard.place.rpartition("/")[0].encode()).hexdigest()[:16]
    cached = folder / (f"{shard.sha256[:16]}-{shard.name}" if shard.sha256 else shard.name)
    if cached.exists():
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not cached.exists():
            _download(shard, cached)
    return cached


def _download(shard: Shard, target: Path) -> None:
    """Download to a temporary file, check its hash, then rename it to `target`."""
    part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        actual = _receive(shard.place, part)
        if shard.sha256 not in (None, actual):
            raise ValueError(
                f"shard {shard.place}: the download was discarded, its SHA-256 is {actual} and the manifest says "
                f"{shard.sha256}; upload the shard or its manifest again"
            )
        os.replace(part, target)
    except OSError as error:
        raise ValueError(
            f"shard {shard.place}: cannot be stored at {target} ({error.strerror}); free space there"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _receive(url: str, part: Path) -> str:
    """Download a URL to `part` and return its SHA-256; retry after transient errors."""
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256()
        try:
            with part.open("wb") as out:
                for chunk in _chunks(url):
                    digest.update(chunk)
                    out.write(chunk)
            return digest.hexdigest()
        except _Failed as error:
            if attempt == ATTEMPTS - 1 or not error.transient:
                raise ValueError(f"shard {url}: download failed ({error}); resume when it is reachable") from None
        time.sleep(2**attempt)
    raise AssertionError


def _text(url: str, field: str) -> str:
    try:
        return b"".join(_chunks(url)).decode("utf-8", "replace")
    except _Failed as error:
        way_out = "give shards without a manifest as a pattern, URL/name-{000000..000099}.tar"
        raise ValueError(f"{field}: {url} cannot be read ({error}); {way_out}") from None


class _Failed(Exception):
    """A failed download. transient: another attempt may succeed."""

    def __init__(self, error: Exception, transient: bool = True):
        super().__init__(" ".join(str(error).split()) or type(error).__name__)
        self.transient = transient


def _chunks(url: str) -> Iterator[bytes]:
    """Yield the contents of a URL in chunks; _Failed if it cannot be opened, or breaks off."""
    scheme = urlsplit(url).scheme.lower()
    if variable := offline():
        raise ValueError(f"{url}: {variable}={os.environ[variable]} forbids downloads; unset it, or use a local copy")
    try:
        yield from _from_web(url) if not SCHEMES[scheme] else _from_store(url)
    except ImportError as error:
        raise ValueError(f"{url}: needs {SCHEMES[scheme]}; pip install 'unilatent[data]'") from error
    except HTTPError as error:
        raise _Failed(error, transient=error.code >= 500 or error.code in (408, 429)) from None
    except FileNotFoundError as error:
        raise _Failed(error, transient=False) from None
    except Exception as error:  # storage clients have their own exception types
        raise _Failed(error) from None


def _from_web(url: str) -> Iterator[bytes]:
    with urlopen(url, timeout=TIMEOUT) as response:
        announced, received = response.headers.get("Content-Length"), 0
        while chunk := response.read(CHUNK):
            received += len(chunk)
            yield chunk
    if announced is not None and received < int(announced):
        raise ConnectionError(f"broke off after {received:,} of {int(announced):,} bytes")


def _from_store(url: str) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as response:
        while chunk := response.read(CHUNK):
            yield chunk
