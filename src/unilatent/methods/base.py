"""A method is four verbs: encode, decode, denoise, loss."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..conditions.base import Conditions
from ..config import Config, ConfigError, component
from ..config import Config as Settings
from ..files import read_json, write_json
from ..maths.paths import NoisePath
from ..maths.solvers import find_solver
from ..maths.streams import Streams
from ..modalities.base import Modality, Splits
from ..registry import find
from ..types import Batch, Conditioning, Layout

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How a file of torch.save (a zip archive) or of pickle begins; no safetensors header of a sane size does."""


class SamplingConfig(Config):
    """How new latents are integrated from noise; every field can be overridden when sampling.

    time_shift: factor of `times.shift` on the grid (UNITE: 2).
    guidance_interval: guide only where low < t < high, t = 1 being noise and 0 clean.
    decoder_solver, decoder_steps: of a decoder that is a diffusion model itself; any other has no steps.
    guidance_norm: "norm_first" combines finished estimates, "guidance_first" raw ones.
    """

    solver: str = "heun"
    num_inference_steps: int = Field(default=50, ge=1)
    time_shift: float = Field(default=1.0, gt=0)
    decoder_solver: str = "ddim"
    decoder_steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=1.0, ge=0)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_norm: Literal["norm_first", "guidance_first"] = "norm_first"

    @field_validator("solver", "decoder_solver")
    @classmethod
    def _known(cls, name: str) -> str:
        find_solver(name)
        return name

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError("low and high must satisfy 0 <= low < high <= 1 (t = 0 clean, t = 1 noise)")
        return interval


class ModelConfig(Config):
    """Everything needed to build a model: what a sample is, what it is conditioned on, the method."""

    modality: component("modalities")  # type: ignore[valid-type]
    conditions: dict[str, component("conditions")] = Field(default={})  # type: ignore[valid-type]
    method: component("methods")  # type: ignore[valid-type]
    sampling: SamplingConfig = SamplingConfig()

    @field_validator("conditions", mode="before")
    @classmethod
    def _named(cls, conditions: Any) -> Any:
        """A condition's key is its name."""
        if not isinstance(conditions, dict):
            return conditions
        return {key: {"name": key, **value} if isinstance(value, dict) else value for key, value in conditions.items()}

    def example(self) -> Self:
        return self.model_copy(update={"conditions": {name: c.example() for name, c in self.conditions.items()}})

    def with_sources(self) -> Self:
        """With what the method must read from other runs filled in (a frozen tokenizer's configuration, say)."""
        return self.model_copy(update={"method": self.method.with_sources()})

    def with_data(self, splits: Splits) -> Self:
        """With what the data knows filled in: about the modality (sizes, say), and about each condition (the names of
        its classes, say)."""
        modality = find("modalities", self.modality.name)(self.modality).fitted(splits)
        facts, filled = splits.train.facts, {}
        for name, condition in self.conditions.items():
            kind = find("conditions", name)
            argument = kind.argument
            if argument not in facts:
                raise ConfigError(
                    f"conditions.{name}: the data under data.path has no {argument} ({kind.given_by}); "
                    "give data that has, or train without the condition: conditions={}"
                )
            filled[name] = condition.with_data(**facts[argument])
        return self.model_copy(update={"modality": modality, "conditions": filled})


class MethodConfig(Settings):
    """Base of a method's configuration."""

    def with_sources(self) -> Self:
        """With what must be read from other runs filled in; ConfigError names one that cannot be read."""
        return self


@dataclass(frozen=True)
class LossPart:
    """A share of the loss that can be differentiated on its own.

    terms: its named terms, unweighted by the method; monitors: other numbers worth logging.
    name: what the norm of its gradient is logged under; None takes the first term's. Parts may share one.
    latents: the clean ones (B, K, D) of the batch's samples, in one of the parts, and which of them are real (B, K),
        for the statistics that every method is watched by.
    """

    value: Tensor
    terms: dict[str, Tensor]
    monitors: dict[str, Tensor] = field(default_factory=dict)
    name: str | None = None
    latents: Tensor | None = None
    latent_mask: Tensor | None = None
    retain: bool = False
    """The next part shares activations with this one, which must survive its backward pass."""

    @property
    def title(self) -> str:
        return self.name or next(iter(self.terms))

    def logs(self) -> dict[str, Tensor]:
        """Detached, under the names that are logged."""
        named = {"loss/total": self.value, **{f"loss/{key}": value for key, value in self.terms.items()}}
        return {key: value.detach() for key, value in {**named, **self.monitors}.items()}


@dataclass(frozen=True)
class Costs:
    """What B samples cost in nats, each at random noise levels of its own; every tensor (B,).

    rate: the bound on the information in the latents that `decode` is given. base_rate: the same under the denoiser of
        a second stage; None without one. variance: what a learned variance of the latents takes off both; None
        without one.
    decoder: the decoder's loss before any factor; shuffled: the same given another sample's latents.
    latent_logsnr, latent_density: a noise level, and nats for each unit of log-SNR there; the area under the mean is
        the rate, less what is left at the noisiest end. data_logsnr, data_density, shuffled_density: those of the
        decoder's two losses. None where there is no noise level.
    """

    rate: Tensor
    decoder: Tensor
    shuffled: Tensor
    base_rate: Tensor | None = None
    variance: Tensor | None = None
    latent_logsnr: Tensor | None = None
    latent_density: Tensor | None = None
    data_logsnr: Tensor | None = None
    data_density: Tensor | None = None
    shuffled_density: Tensor | None = None


class LatentModel(nn.Module, ModelHubMixin, ABC, library_name="unilatent", tags=["latent-generative-model"]):
    """A tokenizer and a generator on its latents.

    `encode` and `decode` take and give plain data of the modality (pictures: (B, C, H, W) in [0, 1]) and latents
    (B, K, D). Build with `build(config)`, or load with `from_pretrained`.
    """

    Config: ClassVar[type[Settings]]
    generates: ClassVar[bool] = True
    """Whether its denoiser is meant to be sampled from; one that only bounds a rate leaves that to a second stage."""
    path: NoisePath
    latent_channels: int
    max_latents: int
    """The largest K. Noise is drawn for it, so that padding moves no sample's noise."""
    conditions: Conditions

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.modality: Modality = find("modalities", config.modality.name)(config.modality)

    # The four verbs.

    @abstractmethod
    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        """Data to the latents (B, K, D) that `decode` expects; those of padding are zeros.

        Its noise, if any, is a function of (seed, start + row), so that encoding in batches changes nothing.
        """

    @abstractmethod
    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None,
    ) -> Any:  # fmt: skip
        """Latents (B, K, D) to data; layout: of the data tokens. None takes the only one there is, or what the latents
        tell (`laid_out`), or draws one.

        Its noise, if any, is a function of (seed, start + row). settings: `decoder_solver` and `decoder_steps` of a
        decoder that has any; None takes the model's own.
        """

    @abstractmethod
    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        """Clean estimate (B, K, D) of latents z at time t, scalar or (B,).

        finish=False leaves out `finish_latents`, for guidance that combines raw estimates.
        """

    @abstractmethod
    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        """The parts of the training loss; all noise comes from `streams`, one a sample.

        Differentiate each part before asking for the next: activations of one part are freed before those of the
        next exist, which is what bounds memory. The parts' sum is the loss.
        """

    # What follows from them.

    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        """The latents (B, K, D) that a generator on this model's latents learns: without the noise, if any, that
        `encode` adds for the decoder. Random numbers of the encoder come from `streams`."""
        return self.encode(data)

    def costs(self, batch: Batch, streams: Streams) -> Costs | None:
        """What each sample of a batch of at least two costs; None for a method whose latents have no rate."""
        return None

    def start(self, method: MethodConfig) -> None:
        """Weights that come from another run, loaded before the first step; method: as the user gave it, before
        `with_sources`. Default: none."""
        return None

    def finish_latents(self, latents: Tensor) -> Tensor:
        """Raw estimates to clean ones (UNITE: the output norm)."""
        return latents

    @abstractmethod
    def latent_layout(self, layout: Layout) -> Layout:
        """Layout of the K latents of samples whose N data tokens are laid out so."""

    def laid_out(self, latents: Any, layout: Layout | None, seed: int, start: int) -> tuple[Tensor, Layout]:
        """What `decode` starts from: its latents and the layout of their data, on the model's device. Of a layout that
        is None, the latents themselves tell which tokens are padding, where each has one; otherwise it is drawn.

        ValueError unless the latents are what `encode` gives for data laid out so.
        """
        if not isinstance(latents, Tensor):
            raise ValueError(
                f"latents: expected a tensor (B, K, D), got {type(latents).__name__}; give what encode gave"
            )
        if latents.ndim != 3 or not len(latents):
            raise ValueError(
                f"latents: expected shape (B, K, D), B > 0, got {tuple(latents.shape)}; give what encode gave"
            )
        found = layout is None
        if layout is None:
            rows = range(start, start + len(latents))
            layout = self.modality.sample_layout(Streams(("layout", seed, row) for row in rows))
        of_latents = self.latent_layout(layout)
        k, d = of_latents.num_tokens, self.latent_channels
        if tuple(latents.shape[1:]) != (k, d):
            raise ValueError(
                f"latents: expected shape (B, {k}, {d}), got {tuple(latents.shape)}; give what this model's encode gave"
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents: expected floats, got {latents.dtype}; give what encode gave")
        if not latents.isfinite().all():
            raise ValueError("latents: expected finite values, got NaN or infinity; leave those samples out")
        if found and of_latents.mask is not None:  # a latent a token: those of padding are zeros
            layout = self.modality.layout_of((latents != 0).any(-1))
        return latents.to(self.device).float(), layout.to(self.device)

    @property
    def stepped_decoder(self) -> nn.Module | None:
        """The network that `decode` asks in each of its `decoder_steps`; None where it decodes in one pass."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @staticmethod
    def build(config: ModelConfig) -> LatentModel:
        """A freshly initialised model of whatever method the configuration names."""
        return find("methods", config.method.name)(config)

    def fingerprint(self) -> str:
        """SHA-256 of what decides latents; they carry it, so that no other model decodes them."""
        geometry = [self.modality.channels, self.modality.max_tokens, self.config.plain()["method"]]
        digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # Folders: config.json, model.safetensors and a README.md.

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What the folder's README.md says: what it is and how to use it."""
        config = self.config
        conditions = f", conditioned on {', '.join(config.conditions)}" if config.conditions else ""
        about = ModelCardData(library_name="unilatent", tags=["latent-generative-model", config.method.name])
        size = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return ModelCard(
            f"---\n{about.to_yaml()}\n---\n\n# {config.method.name} on {config.modality.name}{conditions}\n\n"
            f"{size:.2f} M parameters, {self.latent_channels} latent channels. All settings are in `{CONFIG}`.\n\n"
            '```python\nimport unilatent\n\nmodel = unilatent.load("FOLDER_OR_HUB_ID")\n'
            "samples = unilatent.sample(model, num=16)\nlatents = model.encode(data)\n```\n"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        write_config(self.config, save_directory / CONFIG)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, save_directory / WEIGHTS)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None,
        cache_dir: str | Path | None = None, force_download: bool = False, local_files_only: bool = False,
        token: str | bool | None = None, map_location: str | torch.device = "cpu",
    ) -> Self:  # fmt: skip
        """A model folder or a hub id, in evaluation mode; ValueError names what is missing, damaged or another class.

        Not the mixin's, which would parse the configuration before anything has checked it.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(
                str(pretrained_model_name_or_path), revision=revision, cache_dir=cache_dir, token=token,
                force_download=force_download, local_files_only=local_files_only,
            )  # fmt: skip
        model = read_model(folder, device=map_location)
        if not isinstance(model, cls):
            raise ValueError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}; use unilatent.load")
        return model


def write_config(config: ModelConfig, path: Path) -> None:
    """A model's configuration as JSON."""
    content = {"format_version": FORMAT_VERSION, **ModelConfig.model_validate(config).plain()}
    write_json(path, content)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder; ValueError names the file and what is wrong with it."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG} in it; give a run or a model folder written by save_pretrained")
    content = read_json(path, "not a model configuration; was it edited?")
    version = content.pop("format_version", None)
    if type(version) is not int:
        raise ValueError(f"{path}: not a model configuration (JSON with a format_version); was it edited?")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version}, this package reads {FORMAT_VERSION}; update unilatent")
    try:
        return ModelConfig.parse(content)
    except ConfigError as error:
        raise ValueError(f"{path}: {error}") from None


def read_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file; ValueError names the file when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; the folder is incomplete, copy or convert it again")
    with path.open("rb") as file:
        if file.read(4).startswith(PICKLED):
            raise ValueError(
                f"{path}: is a pickled file under this name, which is never loaded (it can run code); "
                "have it saved as safetensors, or convert a .pt file of the UNITE authors with `unilatent convert`"
            )
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error}); copy or convert it again") from None


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: Path | str, place: Callable[[], object] | None = None
) -> None:
    """Strictly; ValueError as of `check_weights`.

    place: called once everything fits, before the weights are copied (gives a model without storage its memory).
    """
    check_weights(model.state_dict(), weights, source)
    if place is not None:
        place()
    model.load_state_dict(weights)


def check_weights(own: dict[str, Tensor], weights: dict[str, Tensor], source: Path | str) -> None:
    """ValueError lists the first keys, shapes and types in which weights differ from `own`, or names one not finite."""
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    common = sorted(own.keys() & weights.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in common
        if weights[key].shape != own[key].shape
    ]
    types = [
        f"{key} {weights[key].dtype} instead of {own[key].dtype}"
        for key in common
        if weights[key].is_floating_point() != own[key].is_floating_point() or weights[key].is_complex()
    ]
    found = {"lacks": missing, "has unknown": extra, "has other shapes:": shapes, "has other types:": types}
    faults = []
    for fault, keys in found.items():
        if keys:
            rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            faults.append(f"{fault} {', '.join(key[:120] for key in keys[:3])}{rest}")
    if faults:
        raise ValueError(f"{source}: does not fit this model: {'; '.join(faults)}")
    for key in common:
        value = weights[key]
        if own[key].is_floating_point() and not value.to(own[key].dtype).sum(dtype=torch.float64).isfinite():
            raise ValueError(f"{source}: {key} is not finite (NaN or infinity in it); use an older checkpoint")


def model_folder(source: str, field: str) -> Path:
    """The folder with a finished model's configuration and weights; ConfigError names `field` if there is none."""
    folder = Path(source)
    for candidate in (folder / "model", folder):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ConfigError(f"{field}: {source} holds no finished model; train it to its end, or give its folder")


def refuse_other_tokens(own: Any, other: Any, field: str) -> None:
    """ConfigError names what decides tokens and differs between two modalities; `field`: where the other came from."""
    if own.name != other.name:
        raise ConfigError(f"{field}: is for {other.name} data, the run for {own.name}; give one of its own kind")
    a, b = (find("modalities", config.name)(config) for config in (own, other))
    for name in ("resolution", "channels", "max_tokens", "token_shift", "token_scale"):
        asked, had = getattr(a, name), getattr(b, name)
        if asked != had:
            raise ConfigError(
                f"modality: {name.replace('_', ' ')} {asked}, but {field} was trained with {had}; copy modality from "
                "its run's config.yaml"
            )


def read_model(folder: Path, device: str | torch.device = "cpu") -> LatentModel:
    """The model of a folder, in evaluation mode."""
    config = read_config(folder)
    return assemble(config, read_weights(folder / WEIGHTS, device), folder / WEIGHTS, device)


def assemble(
    config: ModelConfig, weights: dict[str, Tensor], source: Path | str, device: str | torch.device = "cpu"
) -> LatentModel:
    """A configuration and its weights as a model, in evaluation mode; `source` is whose fault a difference is.

    Nothing is initialised that the weights would replace, and sizes which the weights do not have cost no memory.
    """
    try:
        with torch.device("meta"), _at_most(max(4 * len(weights), 2000)):
            model = LatentModel.build(config)
    except Exception as error:  # whatever sizes that no field forbids can provoke
        raise ValueError(f"{source}: its configuration describes no model: {error}") from error
    load_weights(model, weights, source, place=lambda: model.to_empty(device=device))
    return model.eval()


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Ends the building of a network of more tensors than that: a depth of a billion would never end by itself."""
    made = 0

    def counted(*_: object) -> None:
        nonlocal made
        made += 1
        if made > count:
            raise ValueError("it has far more tensors than the weights")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def download(name: str, **options: Any) -> Path:
    """The folder with a hub model's two files, and nothing else of its repository; options: of `snapshot_download`."""
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{name}: no such folder here, and no model of that name on the hub within reach ({type(error).__name__})"
        ) from None
