"""Unified Latents (Heek et al., arXiv 2602.17270): encoder, diffusion prior and diffusion decoder, trained jointly.

The encoder is deterministic; what it sends is z_0 = alpha_0 z + sigma_0 eps with the fixed noise of logsnr 5, which is
also the prior's least noise. The prior's unweighted loss therefore bounds the information in z_0, in nats; the
decoder's loss, weighted by sigmoid(bias - logsnr) and the loss factor, says which details are worth it (Alg. 1).

`encode` returns the noisy z_0, which is what `decode` was trained on; `encode_clean` the encoder's own output, on which
the second stage (`latent_diffusion`) trains, so that noise is never added twice.

The paper prints Eq. 4 with +d logsnr/dt and sigmoid(logsnr - b); read literally, the loss is negative and the weight
inverted. What is meant, and done here: nats of the noise's error times sigmoid(b - logsnr).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..conditions.base import Conditions
from ..config import ConfigError
from ..maths import times, weightings
from ..maths.coding import rates
from ..maths.denoising import denoising_nats, kl_to_normal, masked_sum, terminal_kl
from ..maths.paths import LogSNRPath
from ..maths.solvers import find_solver
from ..maths.streams import Streams
from ..nets.backbones import Backbone, ConvEncoderConfig, Encoder, UViTConfig, ViTConfig, make_backbone, make_encoder
from ..nets.denoiser import Denoiser
from ..types import Batch, Conditioning, Layout, Tokens
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


class UnifiedLatentsConfig(MethodConfig):
    """loss_factor, bias: the two dials of the decoder's loss; more of either puts more bits into the latents. At noise
    levels with loss_factor sigmoid(bias - logsnr) > 1 a detail is cheaper in the latents than in the decoder. The
    paper takes factors of 1.3 to 2.1 at 512 x 512 pixels and does not say the bias; small pictures need more of both.

    Table 5, 6 (the paper's choice is the default): prior_gradient (A: false, with kl_weight on a plain KL to N(0, 1)),
    latent_logsnr (B: 10), learned_variance (D), prior "normal" (no prior network: a KL to N(0, 1)), decoder_loss "mse"
    (a decoder in one pass). encoder_run: a finished run of this method whose encoder and prior are taken as they are,
    read when training starts and not kept: only the decoder is trained then, as Table 5's diffusion decoder on the
    latents of a decoder in one pass. train_encoder: false with it.
    latent_min_logsnr, data_logsnr: other ends of the noise paths, which change neither bound nor optimum.
    """

    name: Literal["unified_latents"] = "unified_latents"
    latent_channels: int = Field(default=32, ge=1)
    encoder: Encoder = ConvEncoderConfig()
    prior: Backbone | Literal["normal"] = ViTConfig()
    decoder: Backbone = UViTConfig()
    loss_factor: float = Field(default=1.5, gt=0)
    bias: float = 2.0
    latent_logsnr: float = 5.0
    latent_min_logsnr: float = -12.0
    data_logsnr: tuple[float, float] = (-10.0, 10.0)
    path: Literal["cosine", "linear"] = "cosine"
    prior_gradient: bool = True
    kl_weight: float = Field(default=0.05, ge=0)
    learned_variance: bool = False
    decoder_loss: Literal["diffusion", "mse"] = "diffusion"
    encoder_run: str | None = None
    train_encoder: bool = True

    @classmethod
    def small(cls) -> Self:
        return cls(
            latent_channels=4,
            encoder=ViTConfig(width=64, depth=2, heads=4),
            prior=ViTConfig(width=64, depth=3, heads=4),
            decoder=ViTConfig(width=64, depth=3, heads=4),
            loss_factor=16.0,
            bias=2.0,
            latent_min_logsnr=-10.0,
        )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.data_logsnr
        if not low < high:
            raise ValueError(f"data_logsnr: {list(self.data_logsnr)} must rise, from the noisy end to the clean one")
        if self.latent_min_logsnr >= self.latent_logsnr:
            raise ValueError(
                f"latent_min_logsnr: {self.latent_min_logsnr} must be below latent_logsnr {self.latent_logsnr}"
            )
        return self

    def with_sources(self) -> Self:
        """Without `encoder_run`; ConfigError if it holds no model, or names a field that its latents differ in."""
        if self.encoder_run is None:
            return self
        found = read_config(model_folder(self.encoder_run, "method.encoder_run")).method
        if not isinstance(found, type(self)):
            raise ConfigError(f"method.encoder_run: {self.encoder_run} holds a {found.name}; give a run of this method")
        for name in ENCODING:
            asked, had = getattr(self, name), getattr(found, name)
            if asked != had:
                raise ConfigError(f"method.{name}: {asked!r}, but {self.encoder_run} has {had!r}; set it to that")
        return self.model_copy(update={"encoder_run": None, "train_encoder": False})


ENCODING = (
    "latent_channels", "encoder", "prior", "latent_logsnr", "latent_min_logsnr", "path", "learned_variance",
)  # fmt: skip
"""Fields that decide what latents are and what they cost."""


class Draws(NamedTuple):
    """Every random number of one training step: K x D latents, N x C tokens, c conditions."""

    prior_time: Tensor  # (B,) uniform, stratified
    prior_noise: Tensor  # (B, K, D) normal
    data_time: Tensor  # (B,) uniform, stratified
    data_noise: Tensor  # (B, N, C) normal
    latent_noise: Tensor  # (B, K, D) normal, of z_0
    encoder_noise: Tensor  # (B, K, D) normal, of a learned variance
    drop: Tensor  # (B, c) uniform


class UnifiedLatents(LatentModel):
    """Encode, add the fixed noise; prior and decoder both denoise, one the latents, one the data given them."""

    Config = UnifiedLatentsConfig
    generates = False  # the prior is trained on the unweighted bound, which does not make good samples (Sec. 3.3)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        method: UnifiedLatentsConfig = config.method
        self.method = method
        channels, axes = self.modality.channels, self.modality.axes
        self.path = LogSNRPath(method.latent_logsnr, method.latent_min_logsnr, method.path)
        low, high = method.data_logsnr
        self.data_path = LogSNRPath(high, low, method.path)
        self.latent_channels = method.latent_channels
        sent = 2 * method.latent_channels if method.learned_variance else method.latent_channels
        self.encoder = make_encoder(method.encoder, channels, sent, axes, self.modality.fields)
        layout = self.modality.sample_layout(Streams([("layout", 0)]))
        self.max_latents = (
            self.modality.max_tokens if layout.grid is None else self.encoder.latent_layout(layout).num_tokens
        )
        prior = None if method.prior == "normal" else method.prior
        self.conditions = Conditions(config.conditions, prior.width if prior else 1)
        self.prior = None
        if prior is not None:
            told = self.conditions.give_tokens
            network = make_backbone(prior, method.latent_channels, axes, reads_tokens=told)
            self.prior = Denoiser(network, self.path)
        one_pass = method.decoder_loss == "mse"
        network = make_backbone(method.decoder, channels, axes, context_channels=method.latent_channels)
        self.decoder_width = method.decoder.width
        self.decoder = Denoiser(network, self.data_path, "clean" if one_pass else "velocity")
        for part in self._encoding:
            part.requires_grad_(method.train_encoder)

    @property
    def _encoding(self) -> list[nn.Module]:
        """Encoder, prior and its conditions."""
        return [self.encoder, self.conditions, *([] if self.prior is None else [self.prior])]

    def start(self, method: MethodConfig) -> None:
        """Encoder and prior of `method.encoder_run`, if there is one."""
        assert isinstance(method, UnifiedLatentsConfig)
        if method.encoder_run is None:
            if not method.train_encoder:
                raise ConfigError("method.train_encoder: false, but method.encoder_run names no run to take it from")
            return
        source = read_model(model_folder(method.encoder_run, "method.encoder_run"), device=self.device)
        assert isinstance(source, UnifiedLatents)
        refuse_other_tokens(self.config.modality, source.config.modality, "method.encoder_run")
        if source.config.conditions != self.config.conditions:
            raise ConfigError(
                f"method.encoder_run: {method.encoder_run} was trained with other conditions; copy them from its "
                "config.yaml"
            )
        for own, other in zip(self._encoding, source._encoding, strict=True):
            own.load_state_dict(other.state_dict())

    def train(self, mode: bool = True) -> Self:
        """What is not trained stays in evaluation mode."""
        super().train(mode)
        for part in self._encoding if not self.method.train_encoder else []:
            part.eval()
        return self

    # The four verbs.

    @torch.no_grad()
    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        """The noisy z_0 (B, K, D)."""
        z, log_std, layout = self._encoded(self._tokens(self.modality.check(data)))
        streams = Streams(("encode", seed, row) for row in range(start, start + len(z)))
        draws = [streams.normal(self.max_latents, self.latent_channels)[:, : z.shape[1]].to(z) for _ in range(2)]
        return layout.blank(self.add_encoder_noise(self._sampled(z, log_std, draws[1]), draws[0]))

    @torch.no_grad()
    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        """The encoder's own output z (B, K, D), without the fixed noise: what a second stage learns."""
        z, log_std, layout = self._encoded(self._tokens(data))
        if log_std is not None:
            eps = streams.normal(self.max_latents, self.latent_channels)[:, : z.shape[1]].to(z)
            z = self._sampled(z, log_std, eps)
        return layout.blank(z)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None,
    ) -> Any:  # fmt: skip
        """From z_0 (B, K, D), through `decoder_steps` of `decoder_solver`; the result is the last clean estimate."""
        settings = settings or self.config.sampling
        latents, layout = self.laid_out(latents, layout, seed, start)
        rows = range(start, start + len(latents))
        cond = self._no_condition(len(latents))

        def denoise(x: Tensor, t: Tensor | float, _: Conditioning | None = None) -> Tensor:
            return self.decoder(x, t, cond, layout, latents)

        streams = Streams(("decode", seed, row) for row in rows)

        def noise() -> Tensor:
            return streams.normal(self.modality.max_tokens, self.modality.channels)[:, : layout.num_tokens].to(latents)

        if self.method.decoder_loss == "mse":
            nothing = latents.new_zeros(len(latents), layout.num_tokens, self.modality.channels)
            x = self.decoder(nothing, 1.0, cond, layout, latents)
        else:
            grid = times.grid(settings.decoder_steps)
            x = find_solver(settings.decoder_solver)(denoise, noise(), grid, self.data_path, noise)
            x = denoise(x, 0.0)
        return self.modality.finish(self.modality.unpack(Tokens(self._natural(x.float()), layout)))

    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        """The prior's estimate of z; of a normal prior, that of z ~ N(0, 1)."""
        if self.prior is None:
            t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(len(z))
            return self.path.alpha(t)[:, None, None] * z
        layout = layout or self.latent_layout(self.modality.sample_layout(Streams([("layout", 0)]))).to(self.device)
        return self.prior(z, t, cond, layout)

    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        tokens = self._tokens(batch.data)
        return self.loss_from(batch, tokens, self.draw(streams, tokens))

    # Their parts.

    @property
    def stepped_decoder(self) -> nn.Module | None:
        return None if self.method.decoder_loss == "mse" else self.decoder

    def latent_layout(self, layout: Layout) -> Layout:
        return self.encoder.latent_layout(layout)

    def add_encoder_noise(self, z: Tensor, eps: Tensor) -> Tensor:
        """z_0 = alpha_0 z + sigma_0 eps."""
        return self.path.add_noise(z, eps, 0.0)

    def draw(self, streams: Streams, tokens: Tokens) -> Draws:
        """All random numbers of a step, drawn for the largest K and N, so that padding moves none of them."""
        k, n = self.latent_layout(tokens.layout).num_tokens, tokens.layout.num_tokens
        most, d = self.max_latents, self.latent_channels
        noise = streams.normal(3, most, d)[:, :, :k]
        return Draws(
            prior_time=streams.stratified(),
            data_time=streams.stratified(),
            prior_noise=noise[:, 0],
            latent_noise=noise[:, 1],
            encoder_noise=noise[:, 2],
            data_noise=streams.normal(self.modality.max_tokens, self.modality.channels)[:, :n],
            drop=streams.uniform(len(self.conditions)),
        )

    def loss_from(self, batch: Batch, tokens: Tokens, draws: Draws) -> Iterator[LossPart]:
        """Algorithm 1 with its random numbers given: the rate, then the decoder's share, in nats a sample over one
        constant, the number of values in the largest sample."""
        trained = self.method.train_encoder
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            z, log_std, layout = self._encoded(tokens)  # (B, K, D)
            z = self._sampled(z, log_std, draws.encoder_noise)
            nats = self.rate_nats(z, batch, layout, draws)  # (B,)
        per_value = self.modality.max_tokens * self.modality.channels
        rate = nats if log_std is None else nats + self.variance_nats(log_std, layout)
        value = rate.mean() / per_value
        if not self.method.prior_gradient:
            value = value + self.method.kl_weight * self._normal_nats(z, layout).mean() / per_value
        counts = {**self.modality.units, "latent_dimension": z[0].numel()}
        monitors = {name: rate.mean() for name, rate in rates(rate.detach(), **counts).items()}
        seen: dict[str, Any] = {"monitors": monitors, "latents": z.detach(), "latent_mask": layout.mask}
        if trained:
            yield LossPart(value, {"prior": nats.mean() / per_value}, name="prior", retain=True, **seen)
        error = self.decoder_nats(z, tokens, draws).mean() / per_value
        seen = {} if trained else seen
        yield LossPart(self.method.loss_factor * error, {"decoder": error}, name="decoder", **seen)

    @torch.no_grad()
    def costs(self, batch: Batch, streams: Streams) -> Costs:
        """Both losses as in Algorithm 1; the decoder's also with the latents of the sample before in the batch."""
        tokens = self._tokens(batch.data)
        draws = self.draw(streams, tokens)
        z, log_std, layout = self._encoded(tokens)
        z = self._sampled(z, log_std, draws.encoder_noise)
        z = layout.blank(z)
        rate = self.rate_nats(z, batch, layout, draws)
        costs = Costs(rate, self.decoder_nats(z, tokens, draws), self.decoder_nats(z.roll(1, 0), tokens, draws))
        if self.prior is not None:
            t = draws.prior_time
            density = (rate - terminal_kl(z, self.path, layout.mask)) / -self.path.dlogsnr(t)
            costs = replace(costs, latent_logsnr=self.path.logsnr(t), latent_density=density)
        if self.method.decoder_loss == "diffusion":
            t = draws.data_time
            slope = -self.data_path.dlogsnr(t)
            costs = replace(
                costs, data_logsnr=self.data_path.logsnr(t), data_density=costs.decoder / slope,
                shuffled_density=costs.shuffled / slope,
            )  # fmt: skip
        if log_std is None:
            return costs
        variance = self.variance_nats(log_std, layout)
        return replace(costs, rate=rate + variance, variance=variance)

    def rate_nats(self, z: Tensor, batch: Batch, layout: Layout, draws: Draws) -> Tensor:
        """L_z (B,): the bound on the information in z_0, in nats (Eq. 3), with its terminal term."""
        if self.prior is None:
            return self._normal_nats(z, layout)
        seen = z if self.method.prior_gradient else z.detach()
        t = draws.prior_time
        cond = self._no_condition(len(z), self.conditions.dim)
        if len(self.conditions):
            cond = self.conditions(batch.values, draws.drop)
        estimate = self.prior(self.path.add_noise(seen, draws.prior_noise, t), t, cond, layout)
        nats = denoising_nats(seen, estimate, weightings.elbo(t, self.path), layout.mask)
        return nats + terminal_kl(seen, self.path, layout.mask)

    def decoder_nats(self, z: Tensor, tokens: Tokens, draws: Draws) -> Tensor:
        """L_x / loss_factor (B,): what the decoder misses of the data, given z_0, in weighted nats (Eq. 4)."""
        z0 = self.add_encoder_noise(z, draws.latent_noise)
        x, t = tokens.values, draws.data_time
        cond = self._no_condition(len(z))
        if self.method.decoder_loss == "mse":
            one = torch.ones_like(t)
            estimate = self.decoder(torch.zeros_like(x), one, cond, tokens.layout, z0)
            return denoising_nats(x, estimate, one, tokens.layout.mask)
        estimate = self.decoder(self.data_path.add_noise(x, draws.data_noise, t), t, cond, tokens.layout, z0)
        weight = weightings.sigmoid(t, self.data_path, self.method.bias)
        return denoising_nats(x, estimate, weight, tokens.layout.mask)

    def variance_nats(self, log_std: Tensor, layout: Layout) -> Tensor:
        """L_e (B,): -1/2 sum log(s^2 exp(logsnr_0) + 1) (Eq. 5), what a learned variance takes off the rate."""
        return masked_sum(-torch.log1p((2 * log_std + self.method.latent_logsnr).exp()) / 2, layout.mask)

    def _normal_nats(self, z: Tensor, layout: Layout) -> Tensor:
        """KL[N(alpha_0 z, sigma_0^2) || N(0, 1)] (B,), in nats."""
        return kl_to_normal(z, self.method.latent_logsnr, layout.mask)

    def _encoded(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, Layout]:
        """Clean latents (B, K, D), the logarithm of their learned standard deviation or None, and their layout."""
        sent = self.encoder(tokens.values, tokens.layout).float()
        layout = self.latent_layout(tokens.layout)
        if not self.method.learned_variance:
            return sent, None, layout
        z, log_std = sent.chunk(2, dim=-1)
        return z, log_std.clamp(-10, 5), layout

    def _sampled(self, z: Tensor, log_std: Tensor | None, eps: Tensor) -> Tensor:
        return z if log_std is None else z + log_std.exp() * eps

    def _tokens(self, data: Any) -> Tokens:
        """On the model's device, about as wide as the noise that is added to them."""
        tokens = self.modality.pack(data)
        values = (tokens.values.to(self.device) - self.modality.token_shift) / self.modality.token_scale
        return Tokens(values, tokens.layout.to(self.device))

    def _natural(self, values: Tensor) -> Tensor:
        return values * self.modality.token_scale + self.modality.token_shift

    def _no_condition(self, n: int, width: int | None = None) -> Conditioning:
        return Conditioning(torch.zeros(n, width or self.decoder_width, device=self.device))
