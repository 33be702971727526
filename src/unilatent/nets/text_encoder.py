"""Frozen text encoders of the `transformers` package, and what they made of texts, kept on disk.

CACHE/embeddings/HASH-LENGTH/NAME.rows    float32 (rows, W): of each text its pooled vector, then its tokens
                            /NAME.index   of each text 16 bytes of its hash, where its rows begin and how many they are

Every process appends to files of its own name, rows before index, and reads those of all that were there when it began.
One that begins where many lie that nobody has written to for an hour makes one of them. Whoever misses a file then, or
its own, makes again what was in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..pretrained import cache_folder, offline
from ..types import decode_texts, move

EXTRA = "pip install 'unilatent[text]'"
WAY_OUT = "give a folder or hub id of a text encoder, or conditions.text.encoder=null for one that is trained along"
HASHED = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that decide what an encoder gives: weights, settings, vocabulary. No others are read: weights
in pickles (.bin) would run what is in them, and two encoders that differ in nothing else would have one hash."""
MANY = 8
"""Files above which those that are at rest become one."""
AT_REST = 3600.0
"""Seconds without a new row after which a file's process is taken to be gone."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Whole, or the list of their parts."""
ENTRY = struct.Struct("<16sQI")
"""Of an index: hash of a text, first row, number of rows."""


@dataclass(frozen=True)
class Description:
    """W, width of what it gives; the most tokens it reads (None: any number); which encoder it is."""

    width: int
    most_tokens: int | None
    hash: str


@lru_cache(maxsize=8)
def describe(source: str, revision: str | None = None) -> Description:
    """Without its weights being loaded; ValueError says what is missing."""
    config = _load("AutoConfig", source, revision)
    own = config.get_text_config()
    folder = Path(source).expanduser()
    known = _hash_of(folder) if folder.is_dir() else getattr(config, "_commit_hash", None)
    if known is None:
        raise ValueError(f"conditions.text.encoder: {source} does not say which version it is; {WAY_OUT}")
    return Description(int(own.hidden_size), getattr(own, "max_position_embeddings", None), known)


@lru_cache(maxsize=4)
def text_encoder(source: str, revision: str | None, max_length: int, cache: bool) -> TextEncoder:
    """One for all models of this process."""
    return TextEncoder(source, revision, max_length, cache)


class TextEncoder:
    """A frozen encoder; no module, so that its weights are nobody's parameters and in no checkpoint.

    They are loaded when a text comes that is not kept on disk.
    """

    def __init__(self, source: str, revision: str | None, max_length: int, cache: bool):
        self.source, self.revision, self.max_length = source, revision, max_length
        about = describe(source, revision)
        self.width = about.width
        folder = cache_folder() / "embeddings" / f"{about.hash[:32]}-{max_length}"
        self.kept = Kept(folder, about.width) if cache else None
        self.network: nn.Module | None = None
        self.tokenizer: Any = None

    def prepare(self) -> None:
        """Makes sure that new texts can be embedded. Where some are kept, maybe all that will come, the weights are
        looked for and not loaded."""
        if self.kept and self.kept.places and self.network is None:
            self._load_tokenizer()
            _find_weights(self.source, self.revision)
        else:
            self.load()

    def load(self) -> nn.Module:
        """Its weights and its tokenizer; ValueError says what is missing."""
        if self.network is None:
            self._load_tokenizer()
            with torch.random.fork_rng():  # what is loaded when changes no random number of training
                network = _load("text model", self.source, self.revision)
            self.network = network.eval().requires_grad_(False)
        return self.network

    def length(self, text: str) -> int:
        """Tokens of a text, however many they are."""
        return len(self._load_tokenizer()(text)["input_ids"])

    def __call__(self, values: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Texts (B, W) uint8 -> vectors (B, L, H), mask (B, L) and pooled (B, H), float32, on that device; texts on the
        CPU that are kept are given without waiting for it."""
        if type(values) is not Tensor:  # shapes without numbers: what a step would need is being estimated
            n, most = len(values), self.max_length
            some = torch.ones(n, most, dtype=torch.bool, device=device)
            return (torch.zeros(n, most, self.width, device=device), some,
                    torch.zeros(n, self.width, device=device))  # fmt: skip
        texts = decode_texts(values)
        found: dict[str, np.ndarray] = {}
        if self.kept:
            found |= {text: known for text in set(texts) if (known := self.kept.get(text)) is not None}
        if missing := sorted(set(texts) - found.keys()):
            made = self._made(missing, device)
            found |= made
            if self.kept:
                self.kept.add(made)
        rows = [found[text] for text in texts]  # of each its pooled vector and its tokens
        lengths = torch.tensor([len(row) - 1 for row in rows])
        out = torch.zeros(len(rows), int(lengths.max()), self.width)
        for i, row in enumerate(rows):
            out[i, : len(row) - 1] = torch.tensor(row[1:])
        pooled = torch.from_numpy(np.stack([row[0] for row in rows]))
        mask = torch.arange(out.shape[1]) < lengths[:, None]
        return _sent(out, device), _sent(mask, device), _sent(pooled, device)

    @torch.no_grad()
    def _made(self, texts: list[str], device: torch.device) -> dict[str, np.ndarray]:
        network = self.load().to(device)
        given = self._load_tokenizer()(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        mask = given["attention_mask"].bool()
        with torch.autocast(device.type, enabled=False):
            out = network(input_ids=given["input_ids"].to(device), attention_mask=given["attention_mask"].to(device))
        hidden = out.last_hidden_state.float().cpu()  # (B, L, H)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            weight = mask[..., None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        rows = torch.cat([pooled.float().cpu()[:, None], hidden], dim=1)
        keep = torch.cat([torch.ones(len(texts), 1, dtype=torch.bool), mask], dim=1)
        return {text: row[some].numpy() for text, row, some in zip(texts, rows, keep, strict=True)}

    def _load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = _load("AutoTokenizer", self.source, self.revision)
            self.tokenizer.padding_side = "right"
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
        return self.tokenizer


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, the only one from which nobody waits for a copy."""
    return move(tensor.pin_memory() if device.type == "cuda" else tensor, device)


class Kept:
    """Rows (1 + tokens, W) of texts on disk. What cannot be written is made again each time, with one warning."""

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width
        self.own = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.rows"
        self.places: dict[bytes, tuple[Path, int, int]] = {}
        self.files: dict[Path, BinaryIO] = {}
        self.rows, self.full = 0, False
        self._look()
        resting = [path for path in sorted(folder.glob("*.rows")) if _is_at_rest(path)]
        if len(resting) > MANY and self._merge(resting):
            self._look()

    def _look(self) -> None:
        """Which texts are there."""
        self.places = {}
        for path in sorted(self.folder.glob("*.rows")):
            try:
                size = path.stat().st_size // (4 * self.width)
                for key, first, count in _entries(path.with_suffix(".index")):
                    if first + count <= size:
                        self.places[key] = (path, first, count)
            except FileNotFoundError:  # merged in this moment
                continue

    def _merge(self, paths: list[Path]) -> bool:
        """One file in their place, whole before they go. Two processes that do so at once leave each text twice."""
        new = self.folder / f"merged-{uuid.uuid4().hex}.rows"
        part, some = new.with_suffix(".part"), set(paths)
        try:
            with part.open("wb") as rows, new.with_suffix(".index").open("wb") as index:
                at = 0
                for key, (path, first, count) in self.places.items():
                    if path in some:
                        rows.write(self._rows(path, first, count).tobytes())
                        index.write(ENTRY.pack(key, at, count))
                        at += count
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
        """Rows of a text, if they are there."""
        place = self.places.get(_key(text))
        if place is None:
            return None
        try:
            return self._rows(*place)
        except OSError:  # merged by another process
            return None

    def _rows(self, path: Path, first: int, count: int) -> np.ndarray:
        """Read, not mapped: touching the map of a file that another machine removed would end the process."""
        if path not in self.files:
            self.files[path] = path.open("rb")
        self.files[path].seek(4 * self.width * first)
        raw = self.files[path].read(4 * self.width * count)
        if len(raw) < 4 * self.width * count:
            raise OSError(f"{path}: ends too early")
        return np.frombuffer(raw, np.float32).reshape(count, self.width)

    def add(self, made: dict[str, np.ndarray]) -> None:
        """Rows of new texts."""
        if self.full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rows and not self.own.exists():  # merged by another process: what is added there begins at 0
                self.rows = 0
                self.own = self.own.with_name(f"{os.getpid()}-{uuid.uuid4().hex[:8]}.rows")
            with self.own.open("ab") as rows, self.own.with_suffix(".index").open("ab") as index:
                for row in made.values():
                    rows.write(np.ascontiguousarray(row, np.float32).tobytes())
                rows.flush()
                for text, row in made.items():
                    index.write(ENTRY.pack(_key(text), self.rows, len(row)))
                    self.places[_key(text)] = (self.own, self.rows, len(row))
                    self.rows += len(row)
        except OSError as error:
            self.full = True
            for text in made:
                self.places.pop(_key(text), None)
            warnings.warn(f"{self.folder}: {error.strerror}; embeddings of new texts are not kept, but made each time")


def _entries(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Whole ones of an index; a process that was killed may have left half of one."""
    content = path.read_bytes() if path.is_file() else b""
    yield from ENTRY.iter_unpack(content[: len(content) // ENTRY.size * ENTRY.size])


def _is_at_rest(path: Path) -> bool:
    """Nobody has written to it lately."""
    try:
        return time.time() - path.stat().st_mtime > AT_REST
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
    """ValueError if there are none that can be read, here or, where downloads are allowed, on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        names = [name for name in WEIGHTS if (folder / name).is_file()]
        parts = _parts(folder / names[0]) if names else set()
        if lost := sorted(part for part in parts if not (folder / part).is_file()):
            raise ValueError(f"conditions.text.encoder: {source} has no {lost[0]}; copy it there, or {WAY_OUT}")
        found = bool(names)
    else:
        from huggingface_hub import file_exists, try_to_load_from_cache

        at = revision or "main"
        found = any(isinstance(try_to_load_from_cache(source, name, revision=at), str) for name in WEIGHTS)
        if not found and offline() is None:
            try:
                found = any(file_exists(source, name, revision=at) for name in WEIGHTS)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"conditions.text.encoder: {source} cannot be loaded ({reason}); {WAY_OUT}") from None
    if not found:
        raise ValueError(
            f"conditions.text.encoder: {source} has no {WEIGHTS[0]}, and weights in other formats are not read; "
            "save it with save_pretrained of a recent version of transformers"
        )


def _parts(index: Path) -> set[str]:
    """Files that a list of parts names."""
    if index.name == WEIGHTS[0]:
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"conditions.text.encoder: {index} cannot be read ({error}); copy it again, or {WAY_OUT}"
        ) from None


def _load(what: str, source: str, revision: str | None) -> Any:
    """A configuration, tokenizer or text model; ValueError names what is missing."""
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
        raise ValueError(f"{problem} lacks {len(missing)} tensors, {missing[0]} for one; {WAY_OUT}")
    return network
