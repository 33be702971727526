"""A generator on the frozen latents of a trained model: the second stage of Unified Latents (arXiv 2602.17270).

Any method's model can be the tokenizer (encoder and decoder). It comes from another run and stays frozen; only the base
network is trained, on the latents of `encode_clean`, so that noise is added once: computed in each step, or stored
before (`training.latents`). The base uses the tokenizer's noise
path with the same least noise, and the decoder receives the solver's result unchanged (UL, Sec. 3.3, Alg. 2).

With t ~ U[0, 1] and z_t = alpha(t) z + sigma(t) eps the loss is, in the paper's lambda = logsnr,

    L_base = -dlambda/dt 1/2 sigmoid(b - lambda) |eps - eps_hat(z_t)|^2        on a path in log-SNR
           = |z - z_hat(z_t)|^2 / max(t, 0.05)^2                               on a linear path, such as UNITE's

summed over each sample's real latents and divided by the number of values in the largest latent, K D.

The saved model contains the tokenizer: it can be moved and loaded without the tokenizer's run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..conditions.base import Conditions
from ..config import ConfigError
from ..maths import weightings
from ..maths.denoising import denoising_nats, terminal_kl
from ..maths.paths import LogSNRPath
from ..maths.streams import Streams
from ..model_config import MethodConfig, ModelConfig, SamplingConfig
from ..model_folder import find_model_folder, read_config, read_model, refuse_other_tokens
from ..nets.backbones import Backbone, UViTConfig, ViTConfig, blocks_of, make_backbone
from ..nets.denoiser import Denoiser
from ..types import Batch, Conditioning, Given, Layout, is_encoded
from .base import Costs, LatentModel, LatentPass, LossPart, Sharpening


class LatentDiffusionConfig(MethodConfig):
    """tokenizer: a finished run or model folder. It is read when training starts; the saved configuration has its
        content in `tokenizer_model` instead.
    tokenizer_model: the tokenizer's configuration, filled in from `tokenizer`.
    base: the denoiser; the paper's is a two-level transformer.
    bias: b of the sigmoid weight on a path in log-SNR. A linear path takes the velocity weight.
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
        """Fill in the tokenizer's configuration; ConfigError names the folder if it has no finished model."""
        if self.tokenizer is None and self.tokenizer_model is not None:
            return self
        tokenizer_model = read_config(self.tokenizer_folder()).plain()
        return self.model_copy(update={"tokenizer_model": tokenizer_model, "tokenizer": None})

    def tokenizer_folder(self) -> Path:
        """The model folder of `tokenizer`; ConfigError if it is not set or has no finished model."""
        if self.tokenizer is None:
            raise ConfigError("method.tokenizer: not set; give a finished run or model folder, e.g. runs/digits")
        return find_model_folder(self.tokenizer, "method.tokenizer")


class NoisedLatents(NamedTuple):
    """One random noise level per sample, and what the base makes of it."""

    clean: Tensor  # (B, K, D), z
    estimate: Tensor  # (B, K, D), z_hat(z_t)
    t: Tensor  # (B,)
    layout: Layout


class LatentDiffusion(LatentModel):
    """The tokenizer's `encode` and `decode`, and a denoiser of its own."""

    Config = LatentDiffusionConfig
    trains_on_latents = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        method: LatentDiffusionConfig = config.method
        self.method = method
        if method.tokenizer_model is None:
            raise ConfigError("method.tokenizer_model: not set; it is filled in from method.tokenizer (`with_sources`)")
        tokenizer_config = ModelConfig.parse(method.tokenizer_model)
        refuse_other_tokens(config.modality, tokenizer_config.modality, "method.tokenizer")
        self.tokenizer = LatentModel.build(tokenizer_config).requires_grad_(False)
        self.path = self.tokenizer.path
        self.latent_channels = self.tokenizer.latent_channels
        self.max_latents = self.tokenizer.max_latents
        self.conditions = Conditions(config.conditions, method.base.width)
        axes = self.example_latent_layout().positions.shape[-1]
        network = make_backbone(
            method.base, self.latent_channels, axes, reads_tokens=self.conditions.give_tokens,
            known_channels=self.known_latent_channels,
        )  # fmt: skip
        self.base = Denoiser(network, self.path)

    def load_sources(self, method: MethodConfig) -> None:
        """Load the tokenizer's weights from the folder `method.tokenizer`."""
        assert isinstance(method, LatentDiffusionConfig)
        source = read_model(method.tokenizer_folder(), LatentModel, self.device)
        self.tokenizer.load_state_dict(source.state_dict())

    def train(self, mode: bool = True) -> Self:
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    # ---- the core methods --------------------------------------------------------------------------------------------

    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        return self.tokenizer.encode(data, seed, start)

    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None, given: Given | None = None,
    ) -> Any:  # fmt: skip
        """Decode with the tokenizer, which fits the rest to given parts only if it was trained with some."""
        return self.tokenizer.decode(latents, layout, seed, start, settings or self.config.sampling, given)

    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        if layout is None:
            layout = self.example_latent_layout().to(self.device)
        return self.base(z, t, cond, layout)

    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        """L_base of the module's docstring."""
        given = None if is_encoded(batch.data) else self.draw_given(batch.data, streams)
        noised = self._noised(batch, streams, given, dropout=True)
        nats = denoising_nats(noised.clean, noised.estimate, self.weight(noised.t), noised.layout.mask).mean()
        value = nats / (self.max_latents * self.latent_channels)
        yield LossPart(value, {"base": value}, name="base", latents=noised.clean, latent_mask=noised.layout.mask)

    def latent_layout(self, layout: Layout) -> Layout:
        return self.tokenizer.latent_layout(layout)

    def passes(self, layout: Layout) -> tuple[LatentPass, LatentPass] | None:
        tokenizing, base = self.tokenizer.passes(layout), blocks_of(self.base.backbone)
        return None if tokenizing is None or base is None else (tokenizing[0], LatentPass(base))

    def sharpening(self) -> Sharpening | None:
        return self.tokenizer.sharpening()

    # ---- their parts -------------------------------------------------------------------------------------------------

    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        return self.tokenizer.encode_clean(data, streams)

    def tokenizer_fingerprint(self) -> str:
        return self.tokenizer.tokenizer_fingerprint()

    def weight(self, t: Tensor) -> Tensor:
        """The weight of |z - z_hat|^2 at times (B,)."""
        if isinstance(self.path, LogSNRPath):
            return weightings.sigmoid(t, self.path, self.method.bias)
        return weightings.velocity(t)

    @property
    def stepped_decoder(self) -> nn.Module | None:
        return self.tokenizer.stepped_decoder

    @property
    def decoder_noise(self) -> float:
        return self.tokenizer.decoder_noise

    @torch.no_grad()
    def costs(self, batch: Batch, streams: Streams, given: Given | None = None) -> Costs | None:
        """The tokenizer's costs and the unweighted rate with the base: a second bound on the same information."""
        costs = self.tokenizer.costs(batch, streams, given)
        if costs is None or not isinstance(self.path, LogSNRPath):
            return costs
        z, estimate, t, layout = self._noised(batch, streams, given, dropout=False)
        nats = denoising_nats(z, estimate, weightings.elbo(t, self.path), layout.mask)
        rate = nats + terminal_kl(z, self.path, layout.mask)
        return replace(costs, base_rate=rate if costs.variance is None else rate + costs.variance)

    def _noised(self, batch: Batch, streams: Streams, given: Given | None, dropout: bool) -> NoisedLatents:
        """The batch's clean latents and the base's estimate of them; dropout: of the conditions."""
        tokens = self.clean_latents(batch.data, streams)
        z, layout = tokens.values, tokens.layout
        t, eps = streams.stratified(), self.latent_noise(streams, z.shape[1])
        if len(self.conditions):
            drop = streams.uniform(len(self.conditions)) if dropout else None
            cond = self.conditions(batch.values, drop)
        else:
            cond = self.conditions.null(len(z))
        cond = cond.given(self.known_latents(given, streams))
        estimate = self.base(self.path.add_noise(z, eps, t), t, cond, layout)
        return NoisedLatents(z, estimate, t, layout)
