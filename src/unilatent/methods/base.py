"""The contract of a method: `encode`, `decode`, `denoise` and `loss`.

To add a method, write `methods/NAME.py` with a `MethodConfig` and one public subclass of `LatentModel`. The file name
is the method's name in configurations. The trainer calls `loss`; sampling, reconstruction, evaluation and analysis call
the other three. `methods/unite.py` is an example.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from ..conditions.base import Conditions
from ..config import ConfigError
from ..maths.paths import NoisePath
from ..maths.streams import Streams
from ..modalities.base import Modality
from ..model_config import MethodConfig, ModelConfig, SamplingConfig
from ..model_folder import DTYPES, SavedModel
from ..nets.convnet import pool, to_grid, to_tokens
from ..registry import find
from ..sharding import full
from ..types import LATENTS, Batch, Conditioning, Given, Layout, Tokens, is_encoded

F = TypeVar("F", bound=Callable[..., Any])


def gradients_on_request(call: F) -> F:
    """Decorate `encode` or `decode`: gradients are recorded if an argument requires them, for the weights too.

    Otherwise none are: data sets are encoded and decoded without keeping activations.
    """

    @functools.wraps(call)
    def wrapped(self: LatentModel, *arguments: Any, **named: Any) -> Any:
        asked = _requires_gradient([*arguments, *named.values()])
        with torch.set_grad_enabled(asked and torch.is_grad_enabled()):
            return call(self, *arguments, **named)

    return cast(F, wrapped)


def _requires_gradient(data: Any) -> bool:
    """Whether a tensor in (nested) lists or dicts requires a gradient."""
    if isinstance(data, dict | list):
        return any(map(_requires_gradient, data.values() if isinstance(data, dict) else data))
    return isinstance(data, Tensor) and data.requires_grad


class LatentModel(SavedModel, ABC):
    """A tokenizer and a generator on its latents. Build one with `build(config)` or load it with `from_pretrained`.

    Data are in the modality's format (images: (B, C, H, W) in [0, 1]); latents are (B, K, D).

    A subclass sets `Config`; its `__init__` sets `path`, `latent_channels`, `max_latents` and `conditions`.
    """

    Config: ClassVar[type[MethodConfig]]
    """Settings of the method; contract tests build it from `Config.small()`."""
    generates: ClassVar[bool] = True
    """Whether samples are drawn with `denoise`. False: `denoise` only bounds a rate, a second stage draws samples."""
    trains_on_latents: ClassVar[bool] = False
    """Whether `loss` reads nothing of the data but `clean_latents`, so that a batch may hold stored ones."""
    ablations: ClassVar[Mapping[str, Sequence[Ablation]]] = {}
    """What the method's paper varied, by name."""
    path: NoisePath
    """Noise path of the latents: z_t = alpha(t) z + sigma(t) eps."""
    latent_channels: int
    """D."""
    max_latents: int
    """The largest K."""
    conditions: Conditions

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.modality: Modality = find("modalities", config.modality.name)(config.modality)

    # ---- every method defines these ----------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        """Encode data to the latents (B, K, D) that `decode` expects; zeros at padding.

        A subclass decorates it with `gradients_on_request`.

        Noise, if any, is a function of (seed, start + row), so that the batch size does not change the latents.
        """

    @abstractmethod
    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None, given: Given | None = None,
    ) -> Any:  # fmt: skip
        """Decode latents (B, K, D) to data. A subclass decorates it with `gradients_on_request`.

        layout: of the data tokens. None: see `decoder_inputs`.
        seed, start: noise, if any, is a function of (seed, start + row).
        settings: `decoder_solver` and `decoder_steps` of a diffusion decoder; None takes the model's own.
        given: parts of the samples; the data contain them unchanged, and a model that was trained with given parts
            (`ModelConfig.given`) decodes the rest to fit them.
        """

    @abstractmethod
    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        """Return the clean estimate (B, K, D) of latents z (B, K, D) at time t, scalar or (B,); differentiable.

        layout: of the latents (`latent_layout`). finish=False omits `finish_latents`, for guidance that combines raw
        estimates.
        """

    @abstractmethod
    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        """Yield the parts of the training loss; their sum is the loss.

        All noise comes from `streams`, one stream per sample. The caller runs the backward pass of each part, and its
        `close`, before it requests the next one: activations of one part are freed before those of the next exist,
        which bounds memory. What several parts read stands behind a `Junction`.
        """

    @abstractmethod
    def latent_layout(self, layout: Layout) -> Layout:
        """Return the layout of the K latents of samples whose N data tokens have this layout."""

    # ---- a method may override these ---------------------------------------------------------------------------------

    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        """Encode data to the latents (B, K, D) that a generator is trained on: without the noise, if any, that
        `encode` adds for the decoder. The encoder's random numbers come from `streams`."""
        return self.encode(data)

    def finish_latents(self, latents: Tensor) -> Tensor:
        """Map raw estimates to clean ones (UNITE: the output norm)."""
        return latents

    def costs(self, batch: Batch, streams: Streams, given: Given | None = None) -> Costs | None:
        """Measure rate and decoder loss of each sample of a batch of at least two; None if the latents have no rate.

        given: parts of the samples; what they hold then counts for neither.
        """
        return None

    def passes(self, layout: Layout) -> tuple[LatentPass, LatentPass] | None:
        """Return the pass that makes latents of data with this layout, and the one that denoises them, if both are of
        transformers with the same tokens; otherwise None."""
        return None

    def sharpening(self) -> Sharpening | None:
        """Return what an adversary needs to sharpen the decoder; None where that is not possible."""
        return None

    def load_sources(self, method: MethodConfig) -> None:
        """Load weights that come from another run, before the first training step. Default: none.

        method: the configuration as the user wrote it, before `MethodConfig.with_sources`.
        """
        return None

    @property
    def stepped_decoder(self) -> nn.Module | None:
        """The network that `decode` evaluates in each of its `decoder_steps`; None if it decodes in one pass."""
        return None

    @property
    def decoder_noise(self) -> float:
        """The largest time t of the noise on latents that the decoder was trained to decode: finer differences between
        latents than this noise need not matter to it. Default: 0, the path's clean end."""
        return 0.0

    encoder_parts: ClassVar[tuple[str, ...]] = ("",)
    """Beginnings of the names of all weights that `encode` and `encode_clean` run. Default: all."""

    def tokenizer_fingerprint(self) -> str:
        """Return a SHA-256 of everything that determines latents: stored ones carry it. A decoder that is trained on,
        or a generator that was trained on them, does not change it."""
        return self._hash([name for name in self.state_dict() if name.startswith(self.encoder_parts)])

    # ---- every method gets these -------------------------------------------------------------------------------------

    @staticmethod
    def build(config: ModelConfig) -> LatentModel:
        """Return a newly initialised model of the configured method; ConfigError if it cannot be sampled as set."""
        model = find("methods", config.method.name)(config)
        if config.sampling.denoise_to_zero and model.path.sigma(torch.tensor(0.0, device="cpu")) > 0:
            raise ConfigError(
                f"sampling.denoise_to_zero: true, but the latents of {config.method.name} keep noise at t = 0, which "
                "its decoder expects; set it to false"
            )
        return model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which the networks compute in. ValueError for one that they cannot compute in."""
        dtype = next(self.parameters()).dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"model: its weights are {dtype}, but networks compute in {', '.join(map(str, DTYPES))}; "
                "call model.float()"
            )
        return dtype

    def clean_latents(self, data: Any, streams: Streams) -> Tokens:
        """Return the latents (B, K, D) that a generator is trained on, with their layout: `encode_clean` of data, or
        stored ones (`is_encoded`) as they are."""
        if is_encoded(data):
            shared = self.example_latent_layout()
            layout = Layout(data.get("positions", shared.positions), data.get("mask"), shared.grid)
            return Tokens(data[LATENTS].to(self.device), layout.to(self.device))
        layout = self.latent_layout(self.modality.pack(data).layout)
        return Tokens(self.encode_clean(data, streams), layout.to(self.device))

    # ---- given parts

    @property
    def known_data_channels(self) -> int | None:
        """Channels of `known_data`; None for a model that is not given parts."""
        return None if self.config.given is None else self.modality.channels + self.modality.mask_channels

    @property
    def known_latent_channels(self) -> int | None:
        """Channels of `known_latents`; None for a model that is not given parts."""
        return None if self.config.given is None else self.latent_channels + 1

    def draw_given(self, data: Any, streams: Streams) -> Given | None:
        """Draw which parts of a batch of training samples are given; None for a model that is not given parts."""
        settings = self.config.given
        if settings is None:
            return None
        mask = self.modality.draw_mask(data, streams, settings.kinds or self.modality.given_kinds)
        keep = (streams.uniform() >= settings.nothing).to(mask.device)  # (B,)
        return Given(data, mask & keep.view(-1, *[1] * (mask.ndim - 1)))

    def known_data(self, given: Given | None) -> Tensor | None:
        """Return concat(m x, m) (B, N, C + M), as a decoder reads it: given data tokens scaled as noise is, zeros where
        nothing is given, and the packed mask. None if nothing is given, or the model is not given parts."""
        if given is None or self.config.given is None:
            return None
        modality = self.modality
        shift, scale = modality.token_shift, modality.token_scale
        values = modality.pack(modality.put_back(torch.full_like(given.data, shift), given)).values
        known = torch.cat([(values - shift) / scale, modality.pack_mask(given.mask)], dim=2)
        return known.to(self.device)

    @torch.no_grad()
    def known_latents(self, given: Given | None, streams: Streams) -> Tensor | None:
        """Return concat(m z, m) (B, K, D + 1), as a generator reads it: latents of the given parts alone (the rest is
        `Modality.fill`ed before they are encoded), where any of the data that a latent stands for are given, and the
        share m of these that are. None if nothing is given, or the model is not given parts."""
        if given is None or self.config.given is None:
            return None
        filled = self.modality.fill(given)
        share = self._share_of_latents(self.modality.pack_mask(given.mask).mean(2), self.modality.pack(filled).layout)
        z = self.encode_clean(filled, streams).float()
        share = share.to(z.device)[..., None]  # (B, K, 1)
        return torch.cat([torch.where(share > 0, z, 0.0), share], dim=2)

    def _share_of_latents(self, share: Tensor, layout: Layout) -> Tensor:
        """Shares (B, N) of data tokens as shares (B, K) of latents: means over the cells of the latents' grid, or over
        all tokens where latents have no place."""
        latents = self.latent_layout(layout)
        if latents is layout:  # one latent per token, at its place
            return share
        if latents.grid is None or layout.grid is None:
            return share.mean(1, keepdim=True).expand(-1, latents.num_tokens)
        cell = tuple(n // k for n, k in zip(layout.grid, latents.grid, strict=True))
        return to_tokens(pool(to_grid(share[..., None], layout.grid), cell))[..., 0]

    def keep_given(self, values: Tensor, tokens: Tensor, given: Given | None) -> Tensor:
        """Return token values (B, N, C) with those of `tokens` where data are given: no loss is paid for what a decoder
        is told."""
        return values if given is None else torch.where(self.given_values(given), tokens.to(values.dtype), values)

    def given_values(self, given: Given) -> Tensor:
        """Return which token values are given, bool (B, N, C), on the model's device."""
        channels = self.modality.channels // self.modality.mask_channels  # that share one value of a mask
        return self.modality.pack_mask(given.mask).to(self.device).bool().repeat_interleave(channels, dim=2)

    def finished(self, values: Tensor, layout: Layout, given: Given | None) -> Any:
        """Return decoded token values (B, N, C) as data, with the given parts."""
        data = self.modality.finish(self.modality.unpack(Tokens(values.float(), layout)))
        return data if given is None else self.modality.put_back(data, given.to(data.device))

    def latent_noise(self, streams: Streams, k: int) -> Tensor:
        """Draw N(0, 1) for k latents of each sample, (B, k, D); more latents would begin with the same numbers."""
        return streams.normal(k, self.latent_channels)

    def example_latent_layout(self) -> Layout:
        """Return the latent layout of one drawn sample: the only one for data of constant layout, such as images."""
        return self.latent_layout(self.modality.sample_layout(Streams(("layout",), [0])))

    def _constant_layout(self) -> Layout | None:
        """The layout of the data tokens if all samples share it, otherwise None."""
        layout = self.modality.sample_layout(Streams(("layout",), [0]))
        return layout if layout.grid is not None and layout.mask is None else None

    def decoder_inputs(self, latents: Any, layout: Layout | None, seed: int, start: int) -> tuple[Tensor, Layout]:
        """Check the arguments of `decode` and return latents and data layout on the model's device.

        layout: None takes the padding from the latents (zeros) where each token has one latent; otherwise a layout is
        drawn from (seed, start + row), or it is constant.
        ValueError unless the latents have the type, shape and finite values that `encode` returns for this layout.
        """
        if not isinstance(latents, Tensor):
            raise ValueError(
                f"latents: expected a tensor (B, K, D), got {type(latents).__name__}; pass what encode returned"
            )
        if latents.ndim != 3 or not latents.shape[0]:
            raise ValueError(
                f"latents: expected shape (B, K, D), B > 0, got {tuple(latents.shape)}; pass what encode returned"
            )
        infer_layout = layout is None
        if layout is None and torch.compiler.is_compiling():
            layout = self._constant_layout()  # an exported program takes batches of any size
        if layout is None:
            rows = range(start, start + len(latents))
            layout = self.modality.sample_layout(Streams(("layout", seed), rows))
        expected = self.latent_layout(layout)
        k, d = expected.num_tokens, self.latent_channels
        if tuple(latents.shape[1:]) != (k, d):
            raise ValueError(
                f"latents: expected shape (B, {k}, {d}), got {tuple(latents.shape)}; pass what this model's encode "
                "returned"
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents: expected floats, got {latents.dtype}; pass what encode returned")
        if not torch.compiler.is_compiling() and not latents.isfinite().all():
            raise ValueError("latents: expected finite values, got NaN or infinity; remove those samples")
        if infer_layout and expected.mask is not None:  # one latent per token: those of padding are zeros
            layout = self.modality.layout_of((latents != 0).any(-1))
        return latents.to(self.device).float(), layout.to(self.device)

    def fingerprint(self) -> str:
        """Return a SHA-256 of everything that determines latents and data: numbers of an evaluation carry it. Of a
        sharded model, all processes call it, and one tensor at a time is whole."""
        return self._hash(list(self.state_dict()))

    def _hash(self, names: Sequence[str]) -> str:
        """SHA-256 of the method's configuration and of these weights."""
        geometry = [self.modality.channels, self.modality.max_tokens, self.config.plain()["method"]]
        geometry += [settings] if (settings := self.modality.token_settings) else []
        digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
        weights = self.state_dict()
        for name in sorted(names):
            digest.update(name.encode())
            digest.update(full(weights[name].detach()).float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class Junction:
    """A tensor that several parts of a loss read. Its own graph is differentiated once, and each part's graph is freed
    with its own backward pass.

    Parts read `leaf`, which collects their gradients; `backward` passes the sum on.
    """

    def __init__(self, output: Tensor):
        self.output = output
        self.leaf = output.detach().requires_grad_(output.requires_grad)

    def backward(self) -> None:
        if self.leaf.grad is not None:
            self.output.backward(self.leaf.grad)
            self.leaf.grad = None

    def gradients(self, seed: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """The gradient of each parameter for a gradient `seed` of the tensor, without changing anything."""
        return torch.autograd.grad(self.output, parameters, seed, retain_graph=True, allow_unused=True)


@dataclass(frozen=True)
class Ablation:
    """A choice of a method that its paper varied.

    label: the setting in words. overrides: KEY=VALUE that make it. scales: keys whose value of the run is multiplied
    instead, because a small run has another default than the paper's; an ablation does not exist for runs without one
    of them. published: the paper's numbers of it, "FID" (of
    samples) and "rFID" (of reconstructions), lower is better. base: the same of the row that it is compared with.
    """

    label: str
    overrides: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentPass:
    """A pass of latents through the blocks of a transformer, which can be compared with another one, block by block.

    blocks: what `nets.activations.record` reads; each returns (B, N', H). after: tokens of the sequence that follow the
    K latents; any others are before them.
    """

    blocks: Sequence[nn.Module]
    after: int = 0

    def latents_of(self, activations: Tensor, k: int) -> Tensor:
        """Return the K latents' part (B, K, H) of what a block returned."""
        end = activations.shape[1] - self.after
        return activations[:, end - k : end]


@dataclass(frozen=True)
class Sharpening:
    """What an adversary needs to sharpen a decoder (`training.decoder_gan`).

    decoder: the network to train. last: the weight of its last layer. discriminator: a network of data tokens (B, N, C)
    and their layout to logits (B, K), which starts from the encoder. predict: data and streams -> the decoder's
    prediction (B, N, C) of their tokens, from latents without gradient.
    """

    decoder: nn.Module
    last: nn.Parameter
    discriminator: nn.Module
    predict: Callable[[Any, Streams], Tensor]


@dataclass(frozen=True)
class LossPart:
    """A term of the loss with its own backward pass.

    value: scalar to differentiate. terms: its named components without the method's weights. monitors: other numbers
        to log.
    name: under which the part's gradient norm is logged; None takes the name of the first term. Parts may share one.
    latents, latent_mask: the clean latents (B, K, D) of the batch and which of them are real (B, K), in exactly one
        part; latent statistics of every method are computed from them.
    """

    value: Tensor
    terms: dict[str, Tensor]
    monitors: dict[str, Tensor] = field(default_factory=dict)
    name: str | None = None
    latents: Tensor | None = None
    latent_mask: Tensor | None = None
    junction: Junction | None = None
    """Through which this part reads what other parts read too."""
    closes: bool = False
    """No later part reads the junction: after this part's backward pass comes that of the junction (`close`)."""

    @property
    def title(self) -> str:
        return self.name or next(iter(self.terms))

    def logs(self) -> dict[str, Tensor]:
        """Detached values under their metric keys."""
        named = {"loss/total": self.value, **{f"loss/{key}": value for key, value in self.terms.items()}}
        return {key: value.detach() for key, value in {**named, **self.monitors}.items()}

    def close(self) -> None:
        """Differentiate what came before the junction, if this part was the last to read it. Call it after the part's
        own backward pass."""
        if self.closes and self.junction is not None:
            self.junction.backward()


@dataclass(frozen=True)
class Costs:
    """Rate and decoder loss of B samples in nats, at one random noise level per sample. Every tensor is (B,).

    rate: upper bound on the information in the latents that `decode` receives.
    base_rate: the same bound with the denoiser of a second stage; None without one.
    variance: what a learned variance of the latents subtracts from both rates; None without one.
    decoder: the decoder's loss without loss factor. shuffled: the same with another sample's latents.
    latent_logsnr, latent_density: a noise level, and nats per unit of log-SNR there. The mean density integrates to
        the rate without its terminal term, the KL at the noisiest end.
    data_logsnr, data_density, shuffled_density: the same for `decoder` and `shuffled`.
    The last five are None where there is no noise level.
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
