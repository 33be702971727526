"""Unified Latents (Heek et al., arXiv 2602.17270): encoder, diffusion prior and diffusion decoder, trained jointly.

With lambda = logsnr, z_t = alpha_z(t) z + sigma_z(t) eps and x_t = alpha_x(t) x + sigma_x(t) eps, Algorithm 1 is

    z = E(x),  z_0 = alpha_0 z + sigma_0 eps,  lambda_z(0) = 5
    L_z = -dlambda_z/dt exp(lambda_z)/2 |z - z_hat(z_t)|^2 + KL[N(alpha_1 z, sigma_1^2) || N(0, 1)]        (Eq. 3)
    L_x = c_lf (-dlambda_x/dt 1/2 sigmoid(b - lambda_x)) |eps - eps_hat(x_t, z_0)|^2                       (Eq. 4)
    L = L_z + L_x,  t ~ U[0, 1] drawn separately for both

with c_lf = `loss_factor` and b = `bias`. The encoder E is deterministic. Its fixed noise sigma_0 is also the prior's
least noise, so that the unweighted L_z bounds the information in z_0 in nats; L_x decides which details of the data are
worth that rate. Both are sums over real tokens and channels, averaged over samples and divided by one constant: the
number of values in the largest sample, N C.

`encode` returns the noisy z_0, on which the decoder is trained. `encode_clean` returns the encoder's output z, on which
the second stage (`latent_diffusion`) is trained, so that noise is added once.

The paper prints Eq. 4 with +dlambda/dt and sigmoid(lambda - b); taken literally, the loss is negative and the weight
inverted. The signs here are those of Eq. 2 and Fig. 3.
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
from ..model_config import MethodConfig, ModelConfig, SamplingConfig
from ..model_folder import find_model_folder, read_config, read_model, refuse_other_tokens
from ..nets.backbones import (
    Backbone,
    ConvEncoderConfig,
    Encoder,
    UViTConfig,
    ViTConfig,
    blocks_of,
    make_backbone,
    make_encoder,
)
from ..nets.denoiser import Denoiser
from ..nets.fields import any_exact
from ..types import Batch, Conditioning, Given, Layout, Tokens
from .base import Ablation, Costs, Junction, LatentModel, LatentPass, LossPart, gradients_on_request

TABLE_2 = {1.3: (1.42, 0.79), 1.7: (1.77, 0.36), 1.9: (2.02, 0.31), 2.1: (2.38, 0.27)}
"""Loss factor -> FID with the small base, rFID; against 1.5."""
TABLE_3 = {4: (None, 7.19), 8: (None, 1.53), 16: (1.76, 0.54), 64: (1.77, 0.48)}
"""Latent channels -> FID, rFID; against 32."""
TABLE_4 = {0.5: (2.12, 0.40), 2.0: (1.74, 1.41)}
"""Size of a latent's place, relative to that of 32 x 32 latents -> FID, rFID; against 1."""
TABLE_6 = {"FID": 1.54, "rFID": 0.47}


def _published(fid: float | None, rfid: float) -> dict[str, float]:
    return {"rFID": rfid} if fid is None else {"FID": fid, "rFID": rfid}


ABLATIONS = {
    "factor": tuple(
        Ablation(f"loss factor x {factor / 1.5:.2g}", (), _published(*row), TABLE_6,
                 {"method.loss_factor": factor / 1.5})
        for factor, row in TABLE_2.items()
    ),
    "channels": tuple(
        Ablation(f"channels x {n / 32:g}", (), _published(*row), {"FID": 1.60, "rFID": 0.42},
                 {"method.latent_channels": n / 32})
        for n, row in TABLE_3.items()
    ),
    "shape": tuple(
        Ablation(f"latents per side x {1 / factor:g}", (), _published(*row), {"FID": 1.63, "rFID": 0.41},
                 {"modality.patch_size": factor})
        for factor, row in TABLE_4.items()
    ),
    "prior": (
        Ablation("normal prior", ("method.prior=normal",), {"FID": 2.5, "rFID": 0.83}, {"FID": 1.4, "rFID": 0.86}),
    ),
    "decoder": (
        Ablation("decoder in one pass", ("method.decoder_loss=mse",), {"FID": 2.4, "rFID": 1.1},
                 {"FID": 1.4, "rFID": 0.86}),
    ),
    "gradient": (
        Ablation("A: no gradient from the prior", ("method.prior_gradient=false",), {"FID": 7.80, "rFID": 1.81},
                 TABLE_6),
    ),
    "precision": (Ablation("B: logsnr_0 = 10", ("method.latent_logsnr=10",), {"rFID": 28.27}, TABLE_6),),
    "variance": (
        Ablation(
            "D: learned variance at logsnr_0 = 10", ("method.learned_variance=true", "method.latent_logsnr=10"),
            {"FID": 1.81, "rFID": 0.69}, TABLE_6,
        ),
    ),
}  # fmt: skip
"""Tables 2 (factor), 3 (channels), 4 (shape), 5 (prior, decoder) and 6 of the paper, each against its own base row.
Loss factor, channels and shape are relative to the run's. The paper changes the shape by stages of the encoder, here
the patches of the data change; its A has a quarter of the channels too, and its decoder in one pass another loss
factor, which it does not state. Its C has a first stage of other images: a run of its own, by `method.tokenizer`."""


class UnifiedLatentsConfig(MethodConfig):
    """The paper's method and the ablations of its Tables 5 and 6.

    latent_channels: D.
    encoder: network from data to latents, a `convnet` or a `vit`.
    decoder: denoiser of data, given latents, a `uvit` or a `vit`.
    loss_factor, bias: c_lf and b of L_x. A larger value of either puts more information into the latents: at noise
        levels where c_lf sigmoid(b - logsnr) > 1, a detail is cheaper in the latents than in the decoder. The paper
        uses factors of 1.3 to 2.1 at 512 x 512 pixels and does not give b; small images need larger values of both.
    latent_logsnr: lambda_z(0); ablation B: 10.
    latent_min_logsnr, data_logsnr: the other ends of the noise paths; they change neither the bound nor the optimum.
    path: shape of both noise paths.
    prior_gradient, kl_weight: ablation A is false: in place of the gradient of L_z, the encoder gets that of kl_weight
        times KL[N(alpha_0 z, sigma_0^2) || N(0, 1)].
    learned_variance: ablation D (Eq. 5).
    prior: "normal" replaces the prior network by a KL to N(0, 1) (Table 5).
    decoder_loss: "mse" is a decoder in one pass (Table 5).
    decoder_prediction: what the network of a decoder with steps returns; the clean estimate is made of it. "velocity"
        contains the noise, which a network cannot pass on that is narrower than a token has values; "clean" does not.
    encoder_run: a finished run of this method, read when training starts. Its encoder and prior are frozen, and only
        the decoder is trained: Table 5's diffusion decoder on the latents of a decoder in one pass.
    train_encoder: false with `encoder_run`.
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
    decoder_prediction: Literal["velocity", "clean"] = "velocity"
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
            raise ValueError(f"data_logsnr: {list(self.data_logsnr)} must be [noisy end, clean end], in rising order")
        if self.latent_min_logsnr >= self.latent_logsnr:
            raise ValueError(
                f"latent_min_logsnr: {self.latent_min_logsnr} must be below latent_logsnr {self.latent_logsnr}"
            )
        return self

    def with_sources(self) -> Self:
        """Replace `encoder_run` by a frozen encoder; ConfigError if it has no finished model, or names a field that
        changes its latents."""
        if self.encoder_run is None:
            return self
        source = read_config(find_model_folder(self.encoder_run, "method.encoder_run")).method
        if not isinstance(source, type(self)):
            raise ConfigError(
                f"method.encoder_run: {self.encoder_run} holds a {source.name}; give a run of this method"
            )
        for name in LATENT_FIELDS:
            value, source_value = getattr(self, name), getattr(source, name)
            if value != source_value:
                raise ConfigError(
                    f"method.{name}: {value!r}, but {self.encoder_run} has {source_value!r}; set it to that: "
                    f"method.{name}={source_value}"
                )
        return self.model_copy(update={"encoder_run": None, "train_encoder": False})


LATENT_FIELDS = (
    "latent_channels", "encoder", "prior", "latent_logsnr", "latent_min_logsnr", "path", "learned_variance",
)  # fmt: skip
"""Fields that determine the latents and their rate."""


class UnifiedLatentsDraws(NamedTuple):
    """All random numbers of one training step: K x D latents, N x C tokens, c conditions."""

    prior_time: Tensor  # (B,) uniform, stratified
    prior_noise: Tensor  # (B, K, D) normal
    data_time: Tensor  # (B,) uniform, stratified
    data_noise: Tensor  # (B, N, C) normal
    latent_noise: Tensor  # (B, K, D) normal, of z_0
    encoder_noise: Tensor  # (B, K, D) normal, of a learned variance
    drop: Tensor  # (B, c) uniform


class UnifiedLatents(LatentModel):
    """Encode and add the fixed noise; the prior denoises latents, the decoder denoises data conditioned on latents."""

    Config = UnifiedLatentsConfig
    ablations = ABLATIONS
    encoder_parts = ("encoder.",)
    generates = False  # the prior is trained on the unweighted bound, which gives poor samples (Sec. 3.3)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        method: UnifiedLatentsConfig = config.method
        self.method = method
        channels, axes = self.modality.channels, self.modality.axes
        self.path = LogSNRPath(method.latent_logsnr, method.latent_min_logsnr, method.path)
        low, high = method.data_logsnr
        self.data_path = LogSNRPath(high, low, method.path)
        self.latent_channels = method.latent_channels
        outputs = 2 * method.latent_channels if method.learned_variance else method.latent_channels
        self.encoder = make_encoder(method.encoder, channels, outputs, axes, self.modality.fields)
        layout = self.modality.sample_layout(Streams(("layout",), [0]))
        self.max_latents = (
            self.modality.max_tokens if layout.grid is None else self.encoder.latent_layout(layout).num_tokens
        )
        prior = None if method.prior == "normal" else method.prior
        self.conditions = Conditions(config.conditions, prior.width if prior else 1)
        self.prior = None
        if prior is not None:
            reads_tokens = self.conditions.give_tokens
            network = make_backbone(
                prior, method.latent_channels, axes, reads_tokens=reads_tokens,
                known_channels=self.known_latent_channels,
            )  # fmt: skip
            self.prior = Denoiser(network, self.path)
        one_pass = method.decoder_loss == "mse"
        exact = any_exact(self.modality.fields)
        network = make_backbone(
            method.decoder, channels, axes, context_channels=method.latent_channels, exact=exact,
            known_channels=self.known_data_channels,
        )  # fmt: skip
        self.decoder_width = method.decoder.width
        self.decoder = Denoiser(network, self.data_path, "clean" if one_pass else method.decoder_prediction)
        for module in self._encoder_and_prior:
            module.requires_grad_(method.train_encoder)

    @property
    def _encoder_and_prior(self) -> list[nn.Module]:
        """Encoder, prior and the prior's conditions: what `train_encoder` freezes."""
        return [self.encoder, self.conditions, *([] if self.prior is None else [self.prior])]

    def load_sources(self, method: MethodConfig) -> None:
        """Load encoder and prior of `method.encoder_run`, if it is set."""
        assert isinstance(method, UnifiedLatentsConfig)
        if method.encoder_run is None:
            if not method.train_encoder:
                raise ConfigError(
                    "method.train_encoder: false, but method.encoder_run names no run; give one that is finished"
                )
            return
        source = read_model(find_model_folder(method.encoder_run, "method.encoder_run"), LatentModel, self.device)
        assert isinstance(source, UnifiedLatents)
        refuse_other_tokens(self.config.modality, source.config.modality, "method.encoder_run")
        if source.config.conditions != self.config.conditions:
            raise ConfigError(
                f"method.encoder_run: {method.encoder_run} was trained with other conditions; copy conditions from "
                "its config.yaml"
            )
        for module, source_module in zip(self._encoder_and_prior, source._encoder_and_prior, strict=True):
            module.load_state_dict(source_module.state_dict())

    def train(self, mode: bool = True) -> Self:
        """Frozen modules stay in evaluation mode."""
        super().train(mode)
        if not self.method.train_encoder:
            for module in self._encoder_and_prior:
                module.eval()
        return self

    # ---- the core methods --------------------------------------------------------------------------------------------

    @gradients_on_request
    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        """Return the noisy z_0 (B, K, D)."""
        z, log_std, layout = self._encoded(self._tokens(self.modality.check(data)))
        streams = Streams(("encode", seed), range(start, start + len(z)), self.device)
        eps, encoder_eps = (self.latent_noise(streams, z.shape[1]).to(z) for _ in range(2))
        return layout.blank(self.add_encoder_noise(self._sampled(z, log_std, encoder_eps), eps))

    @gradients_on_request
    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None, given: Given | None = None,
    ) -> Any:  # fmt: skip
        """Decode z_0 (B, K, D) with `decoder_steps` of `decoder_solver`; the result is the last clean estimate."""
        settings = settings or self.config.sampling
        latents, layout = self.decoder_inputs(latents, layout, seed, start)
        rows = range(start, start + len(latents))
        cond = self._no_condition(len(latents)).given(self.known_data(given))
        shown = None if given is None else (self.given_values(given), self._tokens(given.data).values)

        def denoise(x: Tensor, t: Tensor | float, _: Conditioning | None = None) -> Tensor:
            estimate = self.decoder(x, t, cond, layout, latents)
            return estimate if shown is None else torch.where(shown[0], shown[1].to(estimate.dtype), estimate)

        streams = Streams(("decode", seed), rows, self.device)

        def noise() -> Tensor:
            return streams.normal(layout.num_tokens, self.modality.channels).to(latents)

        if self.method.decoder_loss == "mse":
            zeros = latents.new_zeros(len(latents), layout.num_tokens, self.modality.channels)
            x = self.decoder(zeros, 1.0, cond, layout, latents)
        else:
            grid = times.grid(settings.decoder_steps)
            x = find_solver(settings.decoder_solver)(denoise, noise(), grid, self.data_path, noise)
            x = denoise(x, 0.0)
        return self.finished(self._natural(x.float()), layout, given)

    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        """Return the prior's estimate of z; for a normal prior alpha(t) z_t, the optimum for z ~ N(0, 1)."""
        if self.prior is None:
            t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(len(z))
            return self.path.alpha(t)[:, None, None] * z
        return self.prior(z, t, cond, layout or self.example_latent_layout().to(self.device))

    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        tokens = self._tokens(batch.data)
        draws, given = self.draw(streams, tokens), self.draw_given(batch.data, streams)
        return self.loss_from(batch, tokens, draws, given, self.known_latents(given, streams))

    def latent_layout(self, layout: Layout) -> Layout:
        return self.encoder.latent_layout(layout)

    def passes(self, layout: Layout) -> tuple[LatentPass, LatentPass] | None:
        prior = None if self.prior is None else blocks_of(self.prior.backbone)
        encoder = blocks_of(self.encoder)
        return None if prior is None or encoder is None else (LatentPass(encoder), LatentPass(prior))

    # ---- their parts -------------------------------------------------------------------------------------------------

    @property
    def stepped_decoder(self) -> nn.Module | None:
        return None if self.method.decoder_loss == "mse" else self.decoder

    @torch.no_grad()
    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        """Return the encoder's output z (B, K, D) without the fixed noise: what a second stage learns."""
        z, log_std, layout = self._encoded(self._tokens(data))
        if log_std is not None:
            z = self._sampled(z, log_std, self.latent_noise(streams, z.shape[1]).to(z))
        return layout.blank(z)

    def known_latents(self, given: Given | None, streams: Streams) -> Tensor | None:
        """None for a normal prior as well, which reads nothing."""
        return None if self.prior is None else super().known_latents(given, streams)

    def add_encoder_noise(self, z: Tensor, eps: Tensor) -> Tensor:
        """z_0 = alpha_0 z + sigma_0 eps."""
        return self.path.add_noise(z, eps, 0.0)

    def draw(self, streams: Streams, tokens: Tokens) -> UnifiedLatentsDraws:
        """Draw all random numbers of a step. Tokens are the first axis of a draw, so that padding changes no number."""
        k, n = self.latent_layout(tokens.layout).num_tokens, tokens.layout.num_tokens
        noise = streams.normal(k, 3, self.latent_channels).transpose(1, 2)  # (B, 3, K, D)
        return UnifiedLatentsDraws(
            prior_time=streams.stratified(),
            data_time=streams.stratified(),
            prior_noise=noise[:, 0],
            latent_noise=noise[:, 1],
            encoder_noise=noise[:, 2],
            data_noise=streams.normal(n, self.modality.channels),
            drop=streams.uniform(len(self.conditions)),
        )

    def loss_from(
        self, batch: Batch, tokens: Tokens, draws: UnifiedLatentsDraws, given: Given | None = None,
        known: Tensor | None = None,
    ) -> Iterator[LossPart]:  # fmt: skip
        """Algorithm 1 for these random numbers: yield L_z, then L_x, in nats per sample divided by N C of the largest
        sample.

        given, known: the given parts of the samples, and their `known_latents`: L_z then bounds what z_0 adds to them,
        and L_x counts the other parts only.
        """
        trained = self.method.train_encoder
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            layout = self.latent_layout(tokens.layout)
            encoded = Junction(self._encoder_output(tokens))
            z, log_std = self._latents(encoded.leaf, draws)  # (B, K, D)
            nats = self.rate_nats(z, batch, layout, draws, known)  # (B,)
        num_values = self.modality.max_tokens * self.modality.channels
        rate = nats if log_std is None else nats + self.variance_nats(log_std, layout)
        value = rate.mean() / num_values
        if not self.method.prior_gradient:
            value = value + self.method.kl_weight * self._normal_nats(z, layout).mean() / num_values
        counts = {**self.modality.units(tokens.layout), "latent_dimension": layout.real_tokens * self.latent_channels}
        monitors = rates(rate.detach(), **counts)
        logged: dict[str, Any] = {"monitors": monitors, "latents": z.detach(), "latent_mask": layout.mask}
        if trained:
            yield LossPart(value, {"prior": nats.mean() / num_values}, name="prior", junction=encoded, **logged)
            logged = {}
        z, _ = self._latents(encoded.leaf, draws)  # again, since the graph of the first is gone
        error = self.decoder_nats(z, tokens, draws, given).mean() / num_values
        yield LossPart(
            self.method.loss_factor * error, {"decoder": error}, name="decoder", junction=encoded, closes=True, **logged
        )

    @torch.no_grad()
    def costs(self, batch: Batch, streams: Streams, given: Given | None = None) -> Costs:
        """L_z and L_x / c_lf as in Algorithm 1; L_x / c_lf also with the latents of the batch's previous sample."""
        tokens = self._tokens(batch.data)
        draws = self.draw(streams, tokens)
        layout = self.latent_layout(tokens.layout)
        z, log_std = self._latents(self._encoder_output(tokens), draws)
        z = layout.blank(z)
        rate = self.rate_nats(z, batch, layout, draws, self.known_latents(given, streams))
        own, others = (self.decoder_nats(latents, tokens, draws, given) for latents in (z, z.roll(1, 0)))
        costs = Costs(rate, own, others)
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

    def rate_nats(
        self, z: Tensor, batch: Batch, layout: Layout, draws: UnifiedLatentsDraws, known: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """L_z (B,): the bound on the information in z_0 in nats, with the terminal KL (Eq. 3); beyond that in what is
        known of the samples (`known_latents`), if anything is."""
        if self.prior is None:
            return self._normal_nats(z, layout)
        z = z if self.method.prior_gradient else z.detach()
        t = draws.prior_time
        cond = self._no_condition(len(z), self.conditions.dim)
        if len(self.conditions):
            cond = self.conditions(batch.values, draws.drop)
        cond = cond.given(known)
        estimate = self.prior(self.path.add_noise(z, draws.prior_noise, t), t, cond, layout)
        nats = denoising_nats(z, estimate, weightings.elbo(t, self.path), layout.mask)
        return nats + terminal_kl(z, self.path, layout.mask)

    def decoder_nats(
        self, z: Tensor, tokens: Tokens, draws: UnifiedLatentsDraws, given: Given | None = None
    ) -> Tensor:  # fmt: skip
        """L_x / c_lf (B,): the decoder's error given z_0, in weighted nats (Eq. 4); a decoder in one pass:
        |x - x_hat(z_0)|^2. Where data are given there is no error."""
        z0 = self.add_encoder_noise(z, draws.latent_noise)
        x, t = tokens.values, draws.data_time
        cond = self._no_condition(len(z)).given(self.known_data(given))
        if self.method.decoder_loss == "mse":
            one = torch.ones_like(t)
            estimate = self.decoder(torch.zeros_like(x), one, cond, tokens.layout, z0)
            return denoising_nats(x, self.keep_given(estimate, x, given), one, tokens.layout.mask)
        estimate = self.decoder(self.data_path.add_noise(x, draws.data_noise, t), t, cond, tokens.layout, z0)
        estimate = self.keep_given(estimate, x, given)
        weight = weightings.sigmoid(t, self.data_path, self.method.bias)
        return denoising_nats(x, estimate, weight, tokens.layout.mask)

    def variance_nats(self, log_std: Tensor, layout: Layout) -> Tensor:
        """L_e (B,): -1/2 sum log(s^2 exp(lambda_z(0)) + 1) (Eq. 5), added to the rate of a learned variance s^2."""
        return masked_sum(-torch.log1p((2 * log_std + self.method.latent_logsnr).exp()) / 2, layout.mask)

    def _normal_nats(self, z: Tensor, layout: Layout) -> Tensor:
        """KL[N(alpha_0 z, sigma_0^2) || N(0, 1)] (B,), in nats."""
        return kl_to_normal(z, self.method.latent_logsnr, layout.mask)

    def _encoded(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, Layout]:
        """Mean latents (B, K, D), log s of a learned variance s^2 or None, and their layout."""
        return *self._split(self._encoder_output(tokens)), self.latent_layout(tokens.layout)

    def _encoder_output(self, tokens: Tokens) -> Tensor:
        """(B, K, D), or (B, K, 2 D) with a learned variance."""
        return self.encoder(tokens.values, tokens.layout).float()

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's output as mean latents (B, K, D) and log s of a learned variance s^2, or None."""
        if not self.method.learned_variance:
            return output, None
        z, log_std = output.chunk(2, dim=-1)
        return z, log_std.clamp(-10, 5)

    def _latents(self, output: Tensor, draws: UnifiedLatentsDraws) -> tuple[Tensor, Tensor | None]:
        """Clean latents z (B, K, D) of the encoder's output, and log s of a learned variance s^2, or None."""
        z, log_std = self._split(output)
        return self._sampled(z, log_std, draws.encoder_noise), log_std

    def _sampled(self, z: Tensor, log_std: Tensor | None, eps: Tensor) -> Tensor:
        """z + s eps with a learned variance s^2."""
        return z if log_std is None else z + log_std.exp() * eps

    def _tokens(self, data: Any) -> Tokens:
        """Data as tokens on the model's device, scaled to about the range of the noise."""
        tokens = self.modality.pack(data)
        values = (tokens.values.to(self.device) - self.modality.token_shift) / self.modality.token_scale
        return Tokens(values, tokens.layout.to(self.device))

    def _natural(self, values: Tensor) -> Tensor:
        """The inverse of the scaling in `_tokens`."""
        return values * self.modality.token_scale + self.modality.token_shift

    def _no_condition(self, n: int, width: int | None = None) -> Conditioning:
        return Conditioning(torch.zeros(n, width or self.decoder_width, device=self.device))
