"""A generator on the frozen latents of a finished model: the second stage of Unified Latents, and of any other pair.

The tokenizer (encoder and decoder) comes from another run and never changes; only the base network here is trained,
on `encode_clean` latents, so that noise is never added twice. The base's noise path is the tokenizer's own, with as
little noise at its clean end, and what the solver returns goes to the decoder as it is (UL, Sec. 3.3, Alg. 2).

A finished model holds the tokenizer too: it can be moved and loaded without the run it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..conditions.base import Conditions
from ..config import ConfigError
from ..maths import weightings
from ..maths.denoising import denoising_nats, terminal_kl
from ..maths.paths import LogSNRPath
from ..maths.streams import Streams
from ..nets.backbones import Backbone, UViTConfig, ViTConfig, make_backbone
from ..nets.denoiser import Denoiser
from ..types import Batch, Conditioning, Layout
from .base import (
    Costs,
    LatentModel,
    LossPart,
    MethodConfig,
    ModelConfig,
    SamplingConfig,
    model_folder,
    read_config,
    read_model,
    refuse_other_tokens,
)


class LatentDiffusionConfig(MethodConfig):
    """tokenizer: a finished run or model folder, read when training starts and not kept. tokenizer_model: its
    configuration, filled in from there and kept with the model, as its weights are.

    base: the paper's is a two-level transformer. bias: of the sigmoid weight on a path in log-SNR (UL); a linear path
    (UNITE's latents) takes the velocity weight.
    """

    name: Literal["latent_diffusion"] = "latent_diffusion"
    tokenizer: str | None = None
    tokenizer_model: dict[str, Any] | None = None
    base: Backbone = UViTConfig(channels=(512, 1024), blocks=(6, 16), transformers=2, patch=1, strides=(2,))
    bias: float = 0.0

    @classmethod
    def small(cls) -> Self:
        return cls(base=ViTConfig(width=64, depth=3, heads=4))

    def with_sources(self) -> Self:
        """With the tokenizer's configuration; ConfigError names the folder if there is no finished model in it."""
        if self.tokenizer is None and self.tokenizer_model is not None:
            return self
        if self.tokenizer is None:
            raise ConfigError("method.tokenizer: not set; give a finished run or model folder, e.g. runs/digits")
        found = read_config(model_folder(self.tokenizer, "method.tokenizer")).plain()
        return self.model_copy(update={"tokenizer_model": found, "tokenizer": None})


class LatentDiffusion(LatentModel):
    """Another model's encode and decode, and a denoiser of its own."""

    Config = LatentDiffusionConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        method: LatentDiffusionConfig = config.method
        self.method = method
        if method.tokenizer_model is None:
            raise ConfigError("method.tokenizer_model: not known yet; it is read from method.tokenizer")
        own = ModelConfig.parse(method.tokenizer_model)
        refuse_other_tokens(config.modality, own.modality, "method.tokenizer")
        self.tokenizer = LatentModel.build(own).requires_grad_(False)
        self.path = self.tokenizer.path
        self.latent_channels = self.tokenizer.latent_channels
        self.max_latents = self.tokenizer.max_latents
        self.conditions = Conditions(config.conditions, method.base.width)
        axes = self.latent_axes
        told = self.conditions.give_tokens
        network = make_backbone(method.base, self.latent_channels, axes, reads_tokens=told)
        self.base = Denoiser(network, self.path)

    @property
    def latent_axes(self) -> int:
        """A, axes of a latent's position."""
        layout = self.modality.sample_layout(Streams([("layout", 0)]))
        return self.tokenizer.latent_layout(layout).positions.shape[-1]

    def start(self, method: MethodConfig) -> None:
        """The tokenizer's weights, from the folder that `method.tokenizer` names."""
        assert isinstance(method, LatentDiffusionConfig)
        if method.tokenizer is None:
            raise ConfigError("method.tokenizer: not set; give a finished run or model folder, e.g. runs/digits")
        source = read_model(model_folder(method.tokenizer, "method.tokenizer"), device=self.device)
        self.tokenizer.load_state_dict(source.state_dict())

    def train(self, mode: bool = True) -> Self:
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    # The four verbs.

    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        return self.tokenizer.encode(data, seed, start)

    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        return self.tokenizer.encode_clean(data, streams)

    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None,
    ) -> Any:  # fmt: skip
        return self.tokenizer.decode(latents, layout, seed, start, settings or self.config.sampling)

    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        if layout is None:
            layout = self.latent_layout(self.modality.sample_layout(Streams([("layout", 0)]))).to(self.device)
        return self.base(z, t, cond, layout)

    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        """Weighted nats of the noise's error, over the number of values in the largest latent."""
        z = self.encode_clean(batch.data, streams)
        layout = self.latent_layout(self.modality.pack(batch.data).layout).to(self.device)
        t = streams.stratified()
        eps = streams.normal(self.max_latents, self.latent_channels)[:, : z.shape[1]]
        cond = self.conditions.null(len(z))
        if len(self.conditions):
            cond = self.conditions(batch.values, streams.uniform(len(self.conditions)))
        estimate = self.base(self.path.add_noise(z, eps, t), t, cond, layout)
        nats = denoising_nats(z, estimate, self.weight(t), layout.mask).mean()
        value = nats / (self.max_latents * self.latent_channels)
        yield LossPart(value, {"base": value}, name="base", latents=z, latent_mask=layout.mask)

    # Their parts.

    @property
    def stepped_decoder(self) -> nn.Module | None:
        return self.tokenizer.stepped_decoder

    @torch.no_grad()
    def costs(self, batch: Batch, streams: Streams) -> Costs | None:
        """The tokenizer's, and the rate under the base, unweighted: its bound on the same information."""
        found = self.tokenizer.costs(batch, streams)
        if found is None or not isinstance(self.path, LogSNRPath):
            return found
        z = self.encode_clean(batch.data, streams)
        layout = self.latent_layout(self.modality.pack(batch.data).layout).to(self.device)
        t, eps = streams.stratified(), streams.normal(self.max_latents, self.latent_channels)[:, : z.shape[1]]
        cond = self.conditions(batch.values) if len(self.conditions) else self.conditions.null(len(z))
        estimate = self.base(self.path.add_noise(z, eps, t), t, cond, layout)
        nats = denoising_nats(z, estimate, weightings.elbo(t, self.path), layout.mask)
        rate = nats + terminal_kl(z, self.path, layout.mask)
        return replace(found, base_rate=rate if found.variance is None else rate + found.variance)

    def weight(self, t: Tensor) -> Tensor:
        """Of the squared error of the clean estimate at times (B,)."""
        if isinstance(self.path, LogSNRPath):
            return weightings.sigmoid(t, self.path, self.method.bias)
        return weightings.velocity(t)

    def latent_layout(self, layout: Layout) -> Layout:
        return self.tokenizer.latent_layout(layout)
