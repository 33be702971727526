"""Frozen text encoders of the `transformers` package, and a cache of their embeddings on disk.

CACHE/embeddings/HASH-LENGTH/NAME.rows    float32 (rows, W): for each text its pooled vector, then its tokens
                            /NAME.index   for each text 16 bytes of its hash, its first row and its number of rows

Each process appends to its own pair of files, rows before index, and knows all that existed when it started; of the
processes of one run, the first one reads their indices for all. If it finds many files that have not changed for an
hour, it merges them into one. If that removes a file which another process uses, that process computes the embeddings
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..plain_text import count_of
from ..pretrained import cache_folder, offline
from ..processes import Processes
from ..types import decode_texts, move

EXTRA = "pip install 'unilatent[text]'"
WAY_OUT = (
    "give a folder or hub id of a text encoder, or conditions.text.encoder=null for one that is trained with the model"
)
HASHED = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that determine an encoder's output: weights, settings, vocabulary. No others are loaded:
pickled weights (.bin) can run code, and are not part of the hash."""
MANY = 8
"""Number of idle files above which they are merged."""
IDLE_SECONDS = 3600.0
"""Seconds without a new row after which the process that wrote a file is assumed to have ended."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The weight file, or the index of its shards."""
ROWS_FILE = re.compile(r"(\d+-[0-9a-f]{8}|merged-[0-9a-f]{32})\.rows")
"""Names of the cache's own files; others in its folder are neither read nor merged."""
ENTRY = struct.Struct("<16sQI")
"""An index entry: hash of the text, first row, number of rows."""


_Entries = dict[bytes, tuple[Path, int, int]]


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder's output width W, its maximum number of tokens (None: no limit), and the hash that identifies it."""

    width: int
    max_tokens: int | None
    hash: str


DESCRIBED: dict[tuple[str, str | None], EncoderDescription] = {}
"""What `describe` has found out, by source and revision: it reads all files of an encoder to hash them."""


def describe(source: str, revision: str | None = None) -> EncoderDescription:
    """Describe an encoder without loading its weights; ValueError names what is missing."""
    if (source, revision) not in DESCRIBED:
        DESCRIBED[source, revision] = _described(source, revision)
    return DESCRIBED[source, revision]


def share_description(source: str, revision: str | None, processes: Processes) -> None:
    """Let the first process `describe` an encoder for all; collective."""
    if processes.highest((source, revision) not in DESCRIBED):
        DESCRIBED[source, revision] = processes.from_main(lambda: describe(source, revision))


def _described(source: str, revision: str | None) -> EncoderDescription:
    config = _load("AutoConfig", source, revision)
    text_config = config.get_text_config()
    folder = Path(source).expanduser()
    version = _hash_of(folder) if folder.is_dir() else getattr(config, "_commit_hash", None)
    if version is None:
        raise ValueError(f"conditions.text.encoder: {source} has no commit hash, so its version is unknown; {WAY_OUT}")
    return EncoderDescription(
        int(text_config.hidden_size), getattr(text_config, "max_position_embeddings", None), version
    )


@lru_cache(maxsize=4)
def text_encoder(source: str, revision: str | None, max_length: int, cache: bool) -> TextEncoder:
    """Return the encoder that all models of this process share."""
    return TextEncoder(source, revision, max_length, cache)


class TextEncoder:
    """A frozen encoder. It is not an `nn.Module`, so its weights are in no model's parameters and no checkpoint.

    The weights are loaded when the first text comes that is not in the cache.
    """

    def __init__(self, source: str, revision: str | None, max_length: int, cache: bool):
        self.source, self.revision, self.max_length = source, revision, max_length
        description = describe(source, revision)
        self.width = description.width
        folder = cache_folder() / "embeddings" / f"{description.hash[:32]}-{max_length}"
        self.cache = EmbeddingCache(folder, description.width) if cache else None
        self.network: nn.Module | None = None
        self.tokenizer: Any = None

    def prepare(self, processes: Processes | None = None) -> None:
        """Check that new texts can be embedded; ValueError names what is missing.

        Loads the weights, unless the cache has entries: then it may hold all texts, and the weights only have to exist.
        processes: all call this; the first one reads index, tokenizer and weights for all. A process that meets a new
        text later loads the weights itself.
        """
        processes = processes or Processes.alone()
        if self.cache is not None:
            self.cache.share(processes)
        if processes.highest(self.tokenizer is None):
            self.tokenizer = processes.from_main(self._load_tokenizer)
        if not processes.highest(self.network is None):
            return
        if self.cache is not None and processes.highest(len(self.cache.entries)):
            processes.on_main(lambda: _find_weights(self.source, self.revision))
        else:
            self.network = processes.share(self.load)

    def load(self) -> nn.Module:
        """Load weights and tokenizer; ValueError names what is missing."""
        if self.network is None:
            self._load_tokenizer()
            with torch.random.fork_rng():  # loading must not change the random numbers of training
                network = _load("text model", self.source, self.revision)
            self.network = network.eval().requires_grad_(False)
        return self.network

    def length(self, text: str) -> int:
        """Return the number of tokens of a text, without truncation."""
        return len(self._load_tokenizer()(text)["input_ids"])

    def __call__(self, values: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Texts (B, W) uint8 -> vectors (B, L, H), mask (B, L) and pooled (B, H), float32, on `device`.

        Cached texts whose values are on the CPU need no wait for the device.
        """
        texts = decode_texts(values)
        embeddings: dict[str, np.ndarray] = {}  # of each text its pooled vector, then its tokens
        if self.cache:
            embeddings |= {text: cached for text in set(texts) if (cached := self.cache.get(text)) is not None}
        if missing := sorted(set(texts) - embeddings.keys()):
            computed = self._compute(missing, device)
            embeddings |= computed
            if self.cache:
                self.cache.add(computed)
        rows = [embeddings[text] for text in texts]
        lengths = torch.tensor([len(row) - 1 for row in rows])
        out = torch.zeros(len(rows), int(lengths.max()), self.width)
        for i, row in enumerate(rows):
            out[i, : len(row) - 1] = torch.tensor(row[1:])
        pooled = torch.from_numpy(np.stack([row[0] for row in rows]))
        mask = torch.arange(out.shape[1]) < lengths[:, None]
        return _to_device(out, device), _to_device(mask, device), _to_device(pooled, device)

    @torch.no_grad()
    def _compute(self, texts: list[str], device: torch.device) -> dict[str, np.ndarray]:
        network = self.load().to(device)
        inputs = self._load_tokenizer()(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        mask = inputs["attention_mask"].bool()
        with torch.autocast(device.type, enabled=False):
            out = network(input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device))
        hidden = out.last_hidden_state.float().cpu()  # (B, L, H)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            weight = mask[..., None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        rows = torch.cat([pooled.float().cpu()[:, None], hidden], dim=1)
        keep = torch.cat([torch.ones(len(texts), 1, dtype=torch.bool), mask], dim=1)
        return {text: row[real].numpy() for text, row, real in zip(texts, rows, keep, strict=True)}

    def _load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = _load("AutoTokenizer", self.source, self.revision)
            self.tokenizer.padding_side = "right"
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
        return self.tokenizer


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, to a GPU from pinned memory, so that the copy is asynchronous."""
    return move(tensor.pin_memory() if device.type == "cuda" else tensor, device)


class EmbeddingCache:
    """Embeddings (1 + tokens, W) of texts on disk. If writing fails, it warns once and new texts are not cached."""

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width
        self.path = self._new_path()  # of this process's rows
        self.files: dict[Path, BinaryIO] = {}
        self.rows, self.full = 0, False

    @cached_property
    def entries(self) -> _Entries:
        """File, first row and number of rows of each text, by its hash; read from the folder when first asked for."""
        entries = self._read_indices()
        idle = [path for path in self._own_files() if _is_idle(path)]
        return self._read_indices() if len(idle) > MANY and self._merge(idle, entries) else entries

    def share(self, processes: Processes) -> None:
        """Let the first process read the folder for all, unless that is done; collective.

        If a process lacks a file that the first one found, on a machine with a cache of its own, each reads its own.
        """
        if processes.highest("entries" not in vars(self)):
            entries = processes.from_main(lambda: self.entries)
            if not processes.highest(not all(path.is_file() for path in {path for path, _, _ in entries.values()})):
                self.entries = entries

    def _new_path(self) -> Path:
        return self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.rows"

    def _own_files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.rows")) if ROWS_FILE.fullmatch(path.name)]

    def _read_indices(self) -> _Entries:
        entries: _Entries = {}
        for path in self._own_files():
            try:
                size = path.stat().st_size // (4 * self.width)
                for key, first, count in _entries(path.with_suffix(".index")):
                    if first + count <= size:
                        entries[key] = (path, first, count)
            except FileNotFoundError:  # just merged by another process
                continue
        return entries

    def _merge(self, paths: list[Path], entries: _Entries) -> bool:
        """Merge files into one and delete them once it is complete; return whether this succeeded.

        If two processes merge at the same time, each text is stored twice.
        """
        new = self.folder / f"merged-{uuid.uuid4().hex}.rows"
        part, merged = new.with_suffix(".part"), set(paths)
        try:
            with part.open("wb") as rows, new.with_suffix(".index").open("wb") as index:
                start = 0
                for key, (path, first, count) in entries.items():
                    if path in merged:
                        rows.write(self._rows(path, first, count).tobytes())
                        index.write(ENTRY.pack(key, start, count))
                        start += count
            part.replace(new)
            for path in paths:
                path.unlink(missing_ok=True)
                path.with_suffix(".index").unlink(missing_ok=True)
        except OSError:  # another process was first, or the disk is full
            for path in (part, *(() if new.exists() else (new.with_suffix(".index"),))):
                path.unlink(missing_ok=True)
        self.files.clear()
        return new.exists()

    def get(self, text: str) -> np.ndarray | None:
        """Return the embedding of a text, or None if it is not cached."""
        entry = self.entries.get(_key(text))
        if entry is None:
            return None
        try:
            return self._rows(*entry)
        except OSError:  # merged by another process
            return None

    def _rows(self, path: Path, first: int, count: int) -> np.ndarray:
        """Read rows without mmap: access to a mapped file that another machine has deleted would kill the process."""
        if path not in self.files:
            self.files[path] = path.open("rb")
        self.files[path].seek(4 * self.width * first)
        raw = self.files[path].read(4 * self.width * count)
        if len(raw) < 4 * self.width * count:
            raise OSError(f"{path}: is truncated")
        return np.frombuffer(raw, np.float32).reshape(count, self.width)

    def add(self, embeddings: dict[str, np.ndarray]) -> None:
        """Append embeddings of new texts."""
        if self.full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rows and not self.path.exists():  # merged by another process: start a new, empty file
                self.rows, self.path = 0, self._new_path()
            with self.path.open("ab") as rows, self.path.with_suffix(".index").open("ab") as index:
                for embedding in embeddings.values():
                    rows.write(np.ascontiguousarray(embedding, np.float32).tobytes())
                rows.flush()
                for text, embedding in embeddings.items():
                    index.write(ENTRY.pack(_key(text), self.rows, len(embedding)))
                    self.entries[_key(text)] = (self.path, self.rows, len(embedding))
                    self.rows += len(embedding)
        except OSError as error:
            self.full = True
            for text in embeddings:
                self.entries.pop(_key(text), None)
            warnings.warn(
                f"{self.folder}: {error.strerror}; embeddings of new texts are not cached, but computed each time"
            )


def _entries(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield the complete entries of an index; a killed process may have left an incomplete one at the end."""
    content = path.read_bytes() if path.is_file() else b""
    yield from ENTRY.iter_unpack(content[: len(content) // ENTRY.size * ENTRY.size])


def _is_idle(path: Path) -> bool:
    """Whether no process has written to a file lately."""
    try:
        return time.time() - path.stat().st_mtime > IDLE_SECONDS
    except FileNotFoundError:
        return False


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in HASHED and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _find_weights(source: str, revision: str | None) -> None:
    """Check that safetensors weights exist, in the folder, the cache or (if downloads are allowed) on the hub; else
    ValueError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        names = [name for name in WEIGHTS if (folder / name).is_file()]
        shards = _shards(folder / names[0]) if names else set()
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ValueError(f"conditions.text.encoder: {source} has no {missing[0]}; copy it there, or {WAY_OUT}")
        found = bool(names)
    else:
        from huggingface_hub import file_exists, try_to_load_from_cache

        revision = revision or "main"
        found = any(isinstance(try_to_load_from_cache(source, name, revision=revision), str) for name in WEIGHTS)
        if not found and offline() is None:
            try:
                found = any(file_exists(source, name, revision=revision) for name in WEIGHTS)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"conditions.text.encoder: {source} cannot be loaded ({reason}); {WAY_OUT}") from None
    if not found:
        raise ValueError(
            f"conditions.text.encoder: {source} has no {WEIGHTS[0]}, and weights in other formats are not read; "
            "save it again with save_pretrained of a recent version of transformers"
        )


def _shards(index: Path) -> set[str]:
    """Return the file names in an index of weight shards; none for an unsharded file."""
    if index.name == WEIGHTS[0]:
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"conditions.text.encoder: {index} cannot be read ({error}); copy it again, or {WAY_OUT}"
        ) from None


def _load(what: str, source: str, revision: str | None) -> Any:
    """Load an "AutoConfig", "AutoTokenizer" or "text model"; ValueError names what is missing."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS
    except ImportError:
        raise ValueError(f"conditions.text.encoder: needs the package transformers: {EXTRA}; or {WAY_OUT}") from None
    if what == "text model":
        _find_weights(source, revision)
    options: dict[str, Any] = {"revision": revision or "main", "local_files_only": offline() is not None}
    problem = f"conditions.text.encoder: {source}"
    try:
        if what != "text model":
            return getattr(transformers, what).from_pretrained(source, **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        kinds = [config.get_text_config().model_type, config.model_type]
        name = next((ENCODERS[kind] for kind in kinds if kind in ENCODERS), "AutoModel")
        options |= {"output_loading_info": True, "dtype": torch.float32, "use_safetensors": True}
        network, report = getattr(transformers, name).from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{problem} cannot be loaded ({reason}); {WAY_OUT}") from None
    if missing := sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", ())]:
        raise ValueError(f"{problem} lacks {count_of(len(missing), 'tensor')}, for example {missing[0]}; {WAY_OUT}")
    return network
