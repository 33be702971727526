"""How a model is stored: a folder with `config.json` and `model.safetensors`, local or on the Hugging Face Hub.

No file is ever unpickled.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .config import ConfigError
from .devices import pick_device
from .files import expanded, read_json, readable, room, write_json
from .model_card import (
    CARD,
    RECORD,
    ModelFacts,
    ModelRecord,
    card_of,
    write_card,
    write_record,
)
from .model_config import ModelConfig
from .outputs import refuse_foreign
from .packaged import names, packaged
from .registry import find
from .tensor_files import StoredTensor, TensorFile

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
EMA = "ema.safetensors"
"""EMA weights in the folder of a checkpoint, whose other weights are those that training continues with."""
PROMPTS = "prompts"
"""The argument of a condition that is a text."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types of weights that networks compute in. Noise, solvers and results are float32 all the same."""
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of files of torch.save (a zip archive) and pickle; no safetensors header of plausible size has them."""

M = TypeVar("M", bound="SavedModel")


class SavedModel(nn.Module, ModelHubMixin, library_name="unilatent", tags=["latent-generative-model"]):
    """A network with its configuration, and `save_pretrained`, `from_pretrained`, `push_to_hub`."""

    config: ModelConfig
    latent_channels: int
    precision: str = "fp32"
    """What its networks were trained in: "fp32" or "bf16"."""
    stored: torch.dtype | None = None
    """The type that `save_pretrained` stores weights in; None: their own."""
    known: Callable[[str], ModelRecord | None] | None = None
    """Returns what is known of the model with this fingerprint: training, data, numbers. None: nothing."""

    @property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fingerprint(self) -> str:
        """Return a SHA-256 of everything that determines latents and data."""
        raise NotImplementedError

    def generate_model_card(
        self, *args: Any, licence: str | None = None, name: str | None = None, **kwargs: Any
    ) -> ModelCard:
        """Return the folder's README.md: what the model is, how to use it, and all numbers that are known of it.

        licence: of the weights, as the hub names it, e.g. "apache-2.0"; None: as recorded with the model. name: what
        `unilatent.load` takes, as the card writes it.
        """
        return self._card(self._record(licence), name)

    def _card(self, record: ModelRecord | None, name: str | None) -> ModelCard:
        facts = self.facts()
        return card_of(facts if name is None else replace(facts, source=name), record)

    def facts(self) -> ModelFacts:
        """Return what a card says of the model itself."""
        config, modality = self.config, find("modalities", self.config.modality.name)
        conditions = f", conditioned on {', '.join(config.conditions)}" if config.conditions else ""
        described = any(find("conditions", c.name).argument == PROMPTS for c in config.conditions.values())
        stored = str(self.stored or torch.float32).removeprefix("torch.")
        return ModelFacts(
            f"{config.method.name} on {config.modality.name}{conditions}", self.num_parameters, self.latent_channels,
            self.precision, stored, ["latent-generative-model", config.method.name], modality.hub_tasks[described],
        )  # fmt: skip

    def _record(self, licence: str | None = None) -> ModelRecord | None:
        """What is known of the model as it is now: a model that was changed since has no numbers."""
        if self.known is None and licence is None:
            return None
        fingerprint = self.fingerprint()
        record = (None if self.known is None else self.known(fingerprint)) or ModelRecord(fingerprint)
        if record.fingerprint != fingerprint:
            record = replace(record, evaluations=(), fingerprint=fingerprint)
        return record if licence is None else replace(record, licence=licence)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: str | torch.dtype | None = None, licence: str | None = None,
        name: str | None = None, **options: Any,
    ) -> str | None:  # fmt: skip
        """Write a model folder; as in `ModelHubMixin`, with ~ for the home folder.

        The card has the numbers of exactly these weights, as far as they are known, and `record.json` their protocols;
        a card that somebody else wrote stays. An earlier model of this package is replaced, and what else is in its
        folder stays. ValueError names the files of a folder that holds others, and no such model.

        dtype: stores the weights in this type, e.g. "float16" for half the size: the rounded model is another one, and
        its numbers are those that are measured with it. licence, name: as in `generate_model_card`.
        """
        folder, chosen = expanded(save_directory), parse_dtype(dtype)
        _refuse_files_of_others(folder)
        if chosen is not None:
            return _rounded(self, chosen).save_pretrained(folder, licence=licence, name=name, **options)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).touch()  # `write_card` fills an empty one
        hub = {key: options.pop(key) for key in ("push_to_hub", "repo_id") if key in options}
        super().save_pretrained(folder, **options)
        record = self._record(licence)
        write_record(folder, record)
        write_card(folder, self._card(record, name))
        return self.push_to_hub(hub.get("repo_id") or folder.name, **options) if hub.get("push_to_hub") else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model, as in `ModelHubMixin`. Its configuration is `portable`."""
        own = self.config
        self.config = portable(own)
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            self.config = own

    def _save_pretrained(self, save_directory: Path) -> None:
        write_config(self.config, save_directory / CONFIG, self.precision)
        weights = {
            key: (value.to(self.stored) if self.stored and value.is_floating_point() else value).detach().cpu()
            for key, value in self.state_dict().items()
        }
        with room(save_directory, sum(tensor.nbytes for tensor in weights.values())):
            save_file({key: value.contiguous() for key, value in weights.items()}, save_directory / WEIGHTS)
            readable(save_directory / WEIGHTS)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None,
        cache_dir: str | Path | None = None, force_download: bool = False, local_files_only: bool = False,
        token: str | bool | None = None, map_location: str | torch.device = "cpu",
        device_map: str | torch.device | dict[str, Any] | None = None, dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """Load a finished run, a model folder, a checkpoint (its EMA weights), a model of the package or a hub id.

        In evaluation mode.

        map_location, device_map: see `placement`. dtype, torch_dtype: see `parse_dtype`.
        ValueError if it is missing, damaged, not finished or of another class.
        It replaces the mixin's method, which parses the configuration before it is checked.
        """
        device, chosen = placement(map_location, device_map), parse_dtype(dtype, torch_dtype)
        folder = expanded(pretrained_model_name_or_path)
        if folder.exists():
            folder = _finished(folder)
        elif own := packaged(str(pretrained_model_name_or_path)):
            folder = own
        else:
            refuse_missing(pretrained_model_name_or_path)
            folder = download(
                str(pretrained_model_name_or_path), revision=revision, cache_dir=cache_dir, token=token,
                force_download=force_download, local_files_only=local_files_only,
            )  # fmt: skip
        return read_model(folder, cls, device, chosen)


def _rounded(model: M, dtype: torch.dtype) -> M:
    """Return a copy of a model that is stored in a type, with the weights that this type holds.

    ValueError names a weight that it cannot hold.
    """
    copied = copy.deepcopy(model)
    copied.stored = dtype
    with torch.no_grad():
        for key, value in copied.state_dict().items():
            if not value.is_floating_point():
                continue
            value.copy_(value.to(dtype))
            if not value.isfinite().all():
                raise ValueError(f"dtype: {key} has values that {dtype} cannot hold; use bfloat16 or leave it out")
    return copied


def placement(device: str | torch.device | None, device_map: Any = None) -> torch.device:
    """Return the device of a model, which is never divided over several.

    device_map: as other libraries name it: a device, "auto" for a GPU if there is one, or {"": device}; it replaces
    `device` if it is given. ValueError names a map that divides the model, or a device that is not there.
    """
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if type(device_map) is int:
        device_map = f"cuda:{device_map}"
    if device_map is None:
        return pick_device(device)
    if device_map == "auto":
        return pick_device()
    if isinstance(device_map, dict) or str(device_map) in ("balanced", "balanced_low_0", "sequential", "disk"):
        raise ValueError(
            f"device_map: {str(device_map)[:80]!r} divides the model, but a model of this package is on one device; "
            'give "auto" or a device, e.g. "cuda:0"'
        )
    return pick_device(device_map, "device_map")


def parse_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None = None) -> torch.dtype | None:
    """Return the type that weights are loaded in, None for float32; ValueError names one that cannot be used.

    dtype, torch_dtype: a type, its name ("bfloat16", "torch.bfloat16"), or "auto" for float32; give one of the two.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype: {dtype}, but torch_dtype is {torch_dtype}; give one of them")
    field, value = ("torch_dtype", torch_dtype) if dtype is None else ("dtype", dtype)
    if value is None or value == "auto":
        return None
    names = {str(known).removeprefix("torch."): known for known in DTYPES}
    names |= {"float": torch.float32, "double": torch.float64, "half": torch.float16}
    found = names.get(str(value).removeprefix("torch."))
    if found is None:
        raise ValueError(f"{field}: {str(value)!r} cannot be used; give one of {', '.join(names)}")
    return found


def refuse_missing(source: str | Path) -> None:
    """Raise ValueError if a source that is no path on this machine cannot be a hub id either."""
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(
            f"{source}: no such folder{_similar(source)}; give a run, a model folder or a hub id like owner/name, or a "
            f"model of the package: {', '.join(names())}"
        )


def _similar(source: str | Path) -> str:
    """Return "; did you mean FOLDER?" if a folder of nearly this name is there, else ""."""
    path = expanded(source)
    with suppress(OSError):  # a folder that may not be listed
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.75)
        if close and (path.parent / close[0]).is_dir():
            return f"; did you mean {path.parent / close[0]}?"
    return ""


def refuse_file(path: Path) -> None:
    """Raise ValueError if a path is a file: models are folders."""
    if not path.is_file():
        return
    way_out = "give a run or a model folder, or convert a .pt file of the UNITE authors with `unilatent convert`"
    if path.name in (CONFIG, WEIGHTS, EMA):
        way_out = f"give its folder, {path.parent}"
    raise ValueError(f"{path}: is a file, and files are never unpickled; {way_out}")


def _finished(path: Path) -> Path:
    """Return the model folder of a finished run, or `path` if it is one itself; ValueError if there is none."""
    refuse_file(path)
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        return path
    if (path / "model").is_dir():
        return path / "model"
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path}: a run that is not finished; unilatent.load takes its newest checkpoint, or give a folder in "
            f"{path / 'checkpoints'}"
        )
    raise ValueError(f"{path}: neither a run nor a model folder (no {CONFIG}, model/ or checkpoints/ in it)")


def _refuse_files_of_others(folder: Path) -> None:
    """ValueError if a model must not be written to a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory: {folder} is a file; give a folder")
    if (folder / EMA).is_file():
        raise ValueError(f"save_directory: {folder} is a checkpoint of a run; give another folder")
    try:
        read_config(folder)
    except ValueError:
        refuse_foreign(folder, "a model of this package", lambda name: False, field="save_directory:")


def write_config(config: ModelConfig, path: Path, precision: str) -> None:
    """Write a model's configuration as JSON, with the precision that it was trained in."""
    settings = ModelConfig.model_validate(config).plain()
    write_json(path, {"format_version": FORMAT_VERSION, "precision": precision, **settings})


def portable(config: ModelConfig) -> ModelConfig:
    """Return a configuration without places on this machine that only losses and metrics read."""
    modality = config.modality
    names = find("modalities", modality.name).metric_sources
    local = [name for name in names if is_place(getattr(modality, name) or "")]
    return config.model_copy(update={"modality": modality.model_copy(update=dict.fromkeys(local))})


def places(settings: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, value) of every setting, at any depth, that names a place on this machine."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from places(value, f"{field}.{key}".strip("."))
    elif isinstance(settings, str) and "/" in settings and is_place(settings):
        yield field, settings


def is_place(source: str) -> bool:
    """Whether a source is a file or a folder of this machine, not an id of the hub."""
    return source.startswith((".", "/", "~")) or os.path.exists(source)


def read_config(folder: Path) -> ModelConfig:
    """Read the configuration of a model folder; ValueError names the file and the fault."""
    return _read_stored(folder)[0]


def _read_stored(folder: Path) -> tuple[ModelConfig, str]:
    """The configuration of a model folder, and the precision that the model was trained in.

    Folders of earlier versions do not have the latter: fp32.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG} in it; give a run or a model folder written by save_pretrained")
    content = read_json(path, "not a model configuration; was it edited?")
    version, precision = content.pop("format_version", None), content.pop("precision", "fp32")
    if type(version) is not int:
        raise ValueError(f"{path}: not a model configuration (JSON with a format_version); was it edited?")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version}, this package reads {FORMAT_VERSION}; update unilatent")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"{path}: precision: {precision!r:.40} is unknown; use fp32 or bf16")
    try:
        return ModelConfig.parse(content), precision
    except ConfigError as error:
        raise ValueError(f"{path}: {error}") from None


def read_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; ValueError names the file if it is missing or damaged."""
    with _weights_file(path):
        return load_file(path, device=str(device))


def open_weights(path: Path) -> TensorFile:
    """Read the header of a safetensors file; ValueError as in `read_weights`."""
    with _weights_file(path):
        return TensorFile.open(path)


@contextmanager
def _weights_file(path: Path) -> Iterator[None]:
    """ValueError names the file if it is missing, pickled, or cannot be read in the block."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; the folder is incomplete, copy or convert it again")
    with path.open("rb") as file:
        if file.read(4).startswith(PICKLED):
            raise ValueError(
                f"{path}: is a pickled file, which is never loaded (it can run code); save the weights as safetensors, "
                "or convert a .pt file of the UNITE authors with `unilatent convert`"
            )
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error}); copy or convert it again") from None


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: Path | str, place: Callable[[], object] | None = None
) -> None:
    """Load weights strictly; ValueError as in `check_weights`.

    place: called after the check and before the copy, to allocate the memory of a model on the meta device.
    """
    check_weights(model.state_dict(), weights, source)
    if place is not None:
        place()
    model.load_state_dict(weights)


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], source: Path | str) -> None:
    """Raise ValueError as in `check_layout`, or if a tensor is not finite."""
    check_layout(expected, weights, source)
    for key in sorted(weights):
        if fault := non_finite(key, weights[key], expected[key].dtype):
            raise ValueError(f"{source}: {fault}")


def non_finite(key: str, value: Tensor, dtype: torch.dtype) -> str:
    """Return what is wrong with a stored tensor that is not finite in the type of the model; "" if it is finite."""
    if not dtype.is_floating_point or value.to(dtype).sum(dtype=torch.float64).isfinite():
        return ""
    return f"{key} is not finite (NaN or infinity in it); use an older checkpoint"


def check_layout(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor | StoredTensor], source: Path | str
) -> None:  # fmt: skip
    """Raise ValueError if the keys, shapes or types of weights differ from `expected`; it lists the first of each."""
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    common = sorted(expected.keys() & weights.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if weights[key].shape != expected[key].shape
    ]
    types = [
        f"{key} {weights[key].dtype} instead of {expected[key].dtype}"
        for key in common
        if weights[key].is_floating_point() != expected[key].is_floating_point() or weights[key].is_complex()
    ]
    differences = {"lacks": missing, "has unknown": extra, "has other shapes:": shapes, "has other types:": types}
    faults = []
    for fault, keys in differences.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            faults.append(f"{fault} {', '.join(key[:120] for key in keys[:3])}{more}")
    if faults:
        raise ValueError(f"{source}: does not fit this model: {'; '.join(faults)}")


def find_model_folder(source: str, field: str) -> Path:
    """Return the model folder of a finished run, a model folder itself, or that of a model of the package; ConfigError
    names `field` if it is none."""
    folder = expanded(source)
    for candidate in (folder / "model", folder):
        if (candidate / CONFIG).is_file():
            return candidate
    if not folder.is_dir():
        if own := packaged(source):
            return own
        raise ConfigError(
            f"{field}: {source}: no such folder{_similar(source)}; give a finished run, the folder of a model (one of "
            f"the hub has to be downloaded first), or a model of the package: {', '.join(names())}"
        )
    raise ConfigError(f"{field}: {source} holds no finished model; train it to its end, or give its folder")


def refuse_other_tokens(config: Any, source: Any, field: str) -> None:
    """Raise ConfigError unless two modality configurations give the same tokens.

    source: configuration of the model that `field` names; the message names the first difference.
    """
    if config.name != source.name:
        raise ConfigError(f"{field}: is a model of {source.name} data, but modality is {config.name}; give one of that")
    modality, source_modality = (find("modalities", c.name)(c) for c in (config, source))
    for name in ("resolution", "channels", "max_tokens", "token_shift", "token_scale", "token_settings"):
        value, source_value = getattr(modality, name), getattr(source_modality, name)
        if value != source_value:
            raise ConfigError(
                f"modality: {name.replace('_', ' ')} {value}, but {field} was trained with {source_value}; copy "
                "modality from its run's config.yaml"
            )


def read_model(folder: Path, kind: type[M], device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> M:
    """Load the model of a folder, in evaluation mode; of a checkpoint with its EMA weights.

    dtype: of the weights; None: float32. ValueError if it is not a `kind`.
    """
    (config, precision), source, averages = _read_stored(folder), folder / WEIGHTS, folder / EMA
    weights = read_weights(source, device)
    if averages.is_file():
        weights, source = weights | read_weights(averages, device), folder
    model = assemble(config, kind, weights, source, device).to(dtype=dtype)
    model.precision = precision
    return model


def assemble(
    config: ModelConfig, kind: type[M], weights: dict[str, Tensor], source: Path | str,
    device: str | torch.device = "cpu",
) -> M:  # fmt: skip
    """Build a model from its configuration and weights, in evaluation mode.

    source: where both come from, for messages. The model is built without storage: nothing is initialised in vain, and
    a configuration that does not fit the weights allocates no memory.
    """
    try:
        with torch.device("meta"), _at_most(max(4 * len(weights), 2000)):
            model = find("methods", config.method.name)(config)
    except Exception as error:  # sizes that each field allows can still fail together
        raise ValueError(f"{source}: no model can be built from its configuration: {error}") from error
    if not isinstance(model, kind):
        raise ValueError(f"{source}: holds a {type(model).__name__}, not a {kind.__name__}; use unilatent.load")
    load_weights(model, weights, source, place=lambda: model.to_empty(device=device))
    return model.eval()


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop the construction of a network with more than `count` tensors: a depth of a billion would not return."""
    registered = 0

    def count_tensor(*_: object) -> None:
        nonlocal registered
        registered += 1
        if registered > count:
            raise ValueError("it has far more tensors than the weights")

    hook = register_module_parameter_registration_hook(count_tensor)
    try:
        yield
    finally:
        hook.remove()


def download(name: str, **options: Any) -> Path:
    """Download the configuration and weights of a hub model and return their folder.

    options: of `snapshot_download`. No other file of the repository is downloaded.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, RECORD], **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{name}: no such folder, and no model of that name could be downloaded from the hub "
            f"({type(error).__name__}); check the name and the connection{_similar(name)}"
        ) from None
