"""UNITE: one weight-shared Generative Encoder is both tokenizer and latent denoiser (arXiv 2603.22283).

The Generative Encoder GE reads K registers of noise eps_r and the data tokens x and returns latents z; it reads noised
latents z_t alone and returns the clean estimate z_hat. The decoder D is a plain ViT. With sg the stop-gradient, LN the
output norm and z_t = (1 - t) sg(z) + t eps:

    z = LN(GE(eps_r, t ~ U[0.99, 1], x))                                                           tokenise
    L_rec = L(x, D((1 - s) z + s eps)),  s ~ U[0, 0.3] with probability 1/2, else 0                reconstruction
    L_flow = sum over F draws of (t, eps) of |sg(z) - LN(GE(z_t, t, cond))|^2 / max(t, 0.05)^2     flow
    L = reconstruction_weight L_rec + flow_weight L_flow

L is the modality's reconstruction loss. t = 2 u / (1 + u) with u = sigmoid(N(0, 1)): logit-normal, shifted by a factor
of 2 towards noise. Losses are means over samples, real tokens and channels; L_flow sums these means over its draws.

Conventions are those of the authors' code, with time reversed: the official t (1 clean, 0 noise) is 1 - t here.

    official                                      here
    registers at t in [0, 0.01]                   t in [0.99, 1]
    reconstruction noise at t in [0.7, 1]         t in [0, 0.3]
    logit-normal time, shift alpha = 0.5          logit-normal time, shift factor 2
    velocity (x - x_t) / max(1 - t, 0.05)         (z - x) / max(t, 0.05)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..conditions.base import Conditions
from ..config import Config
from ..maths import times, weightings
from ..maths.denoising import denoising_loss
from ..maths.paths import LinearPath
from ..maths.streams import Streams
from ..model_config import MethodConfig, ModelConfig, SamplingConfig
from ..nets.attention import join_masks
from ..nets.embeddings import sincos
from ..nets.fields import TokenField, any_exact, token_input
from ..nets.layers import Float32LayerNorm, Float32RMSNorm, add_known, linear, zero_init
from ..nets.transformer import PlainTransformer, Transformer
from ..types import Batch, Conditioning, Given, Layout, Tokens
from .base import Ablation, LatentModel, LatentPass, LossPart, Sharpening, gradients_on_request

MIN_TIME = 0.05
REGISTER_TIME = 0.01


def _ablation(label: str, *overrides: str, **published: float) -> Ablation:
    """A row of Table 7, against its default."""
    return Ablation(label, overrides, published, {"FID": 2.71, "rFID": 1.01})


ABLATIONS = {
    "gradient": (
        _ablation("gradient through the latents", "method.stop_gradient=false", "method.flow_chunk=null",
                  FID=5.69, rFID=0.95),
    ),
    "weights": (_ablation("separate weights", "method.shared_weights=false", FID=3.81, rFID=1.38),),
    "norm": (
        _ablation("LayerNorm without affine", "method.latent_norm=layer_fixed", FID=19.48, rFID=0.97),
        _ablation("RMSNorm", "method.latent_norm=rms", FID=2.80, rFID=1.20),
        _ablation("no block norm", "method.generative_encoder.block_norm=false", FID=2.61, rFID=1.23),
    ),
    "noise": (
        _ablation("noise 0", "method.reconstruction_noise=0", FID=6.58, rFID=1.60),
        _ablation("noise 0.2", "method.reconstruction_noise=0.2", FID=2.87, rFID=1.42),
        _ablation("noise 0.3", "method.reconstruction_noise=0.3", FID=2.71, rFID=1.01),
        _ablation("noise 0.4", "method.reconstruction_noise=0.4", FID=2.80, rFID=1.21),
        _ablation("noise 1", "method.reconstruction_noise=1", FID=2.87, rFID=1.09),
    ),
    "draws": (
        _ablation("1 draw", "method.flow_draws=1", FID=3.45),
        _ablation("3 draws", "method.flow_draws=3", FID=2.71, rFID=1.01),
        _ablation("4 draws", "method.flow_draws=4", FID=2.70),
        _ablation("7 draws", "method.flow_draws=7", FID=2.43),
    ),
    "shift": (
        _ablation("no shift", "method.time_shift=1", FID=3.14),
        _ablation("shift 4/3", "method.time_shift=1.3333333", FID=2.93),
        _ablation("shift 2", "method.time_shift=2", FID=2.71, rFID=1.01),
    ),
}  # fmt: skip
"""Table 7 of the paper (encoder and decoder B, 120 epochs). Its noise is the official t at which it begins, 0 to 1:
here the largest t, 1 to 0. Its shift alpha is 1 / alpha here."""


class GenerativeEncoderConfig(Config):
    """Sizes of the Generative Encoder.

    width: channels of a token; a multiple of `heads`.
    depth: number of blocks.
    heads: attention heads.
    in_context_tokens, in_context_start: number of copies of the condition's vector, and the block before which they
        join the sequence (32 and 4 in the paper). A condition's own tokens, such as a text's, join there too; with
        them copies are not needed.
    block_norm: norm after each block; ablation of Table 7.
    time_frequencies: number of frozen random frequencies of the time embedding.
    local_start: initialise half of the attention heads so that each register attends to its own data token. Otherwise
        registers first attend to all tokens equally and take hundreds of steps to find their own.
    """

    width: int = Field(default=768, ge=2)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    in_context_tokens: int = Field(default=32, ge=0)
    in_context_start: int = Field(default=4, ge=0)
    block_norm: bool = True
    time_frequencies: int = Field(default=256, ge=1)
    local_start: bool = False


class DecoderConfig(Config):
    """Sizes of the decoder.

    width: channels of a token; a multiple of `heads`.
    depth: number of blocks.
    heads: attention heads.
    mlp_width: channels inside the MLP of each block.
    stem_width: width of a linear layer before the decoder (768 in the authors' models); None omits it.
    """

    width: int = Field(default=768, ge=4)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_width: int = Field(default=3072, ge=1)
    stem_width: int | None = Field(default=None, ge=1)


class UNITEConfig(MethodConfig):
    """UNITE and the ablations of its Table 7.

    num_latents: K registers per sample; None: one per data token (the paper's images and atoms).
    latent_channels: D.
    generative_encoder: sizes of the network that tokenises and denoises.
    decoder: sizes of the decoder.
    latent_norm: output norm of latents and estimates ("layer_fixed" has no affine parameters).
    shared_weights, stop_gradient: the paper's two central choices; false is an ablation.
    reconstruction_weight, flow_weight: factors of L_rec and L_flow.
    reconstruction_noise: maximum t of the noise added before decoding (probability 0.5).
    flow_draws: F, (t, eps) draws per encoded sample.
    flow_chunk: how many draws are in memory at once; None: all.
    time_shift: factor of the shift towards noise.
    """

    name: Literal["unite"] = "unite"
    num_latents: int | None = Field(default=None, ge=1)
    latent_channels: int = Field(default=32, ge=1)
    generative_encoder: GenerativeEncoderConfig = GenerativeEncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    latent_norm: Literal["layer", "layer_fixed", "rms"] = "layer"
    shared_weights: bool = True
    stop_gradient: bool = True
    reconstruction_weight: float = Field(default=1.0, ge=0)
    flow_weight: float = Field(default=1.0, ge=0)
    reconstruction_noise: float = Field(default=0.3, ge=0, le=1)
    flow_draws: int = Field(default=3, ge=1)
    flow_chunk: int | None = Field(default=None, ge=1)
    time_shift: float = Field(default=2.0, gt=0)

    @classmethod
    def small(cls) -> Self:
        encoder = GenerativeEncoderConfig(width=64, depth=3, heads=4, in_context_tokens=4, in_context_start=1)
        return cls(
            num_latents=4,
            latent_channels=16,
            generative_encoder=encoder,
            decoder=DecoderConfig(width=64, depth=2, heads=4, mlp_width=256),
            reconstruction_weight=10.0,
            flow_weight=0.1,
        )

    @model_validator(mode="after")
    def _local_start_needs_own_tokens(self) -> Self:
        if self.generative_encoder.local_start and self.num_latents is not None:
            raise ValueError(
                f"generative_encoder.local_start: true needs one register per data token, but num_latents is "
                f"{self.num_latents}; set local_start to false or num_latents to null"
            )
        return self

    @model_validator(mode="after")
    def _chunk_needs_stop(self) -> Self:
        if not self.stop_gradient and self.flow_chunk is not None:
            raise ValueError(
                "flow_chunk must be null when stop_gradient is false: reconstruction and flow loss then share one "
                "backward pass"
            )
        return self


class GenerativeEncoder(nn.Module):
    """One network with two modes: tokenise reads registers and data tokens, denoise reads noised latents alone.

    Latent k has rotary position k, data token n position `max_latents` + n, so that padding moves no position.
    """

    def __init__(
        self, config: UNITEConfig, fields: Sequence[TokenField], max_latents: int,
        reads_tokens: bool = False, known_channels: int | None = None,
    ):  # fmt: skip
        super().__init__()
        ge = config.generative_encoder
        self.max_latents = max_latents
        self.latent_in = linear(config.latent_channels, ge.width)
        self.known_in = None if known_channels is None else linear(known_channels, ge.width)
        self.data_in = token_input(fields, ge.width)
        self.latent_positions = nn.Parameter(sincos(torch.arange(max_latents)[:, None].float(), ge.width))
        self.transformer = Transformer(
            ge.width, ge.depth, ge.heads, config.latent_channels, ge.in_context_tokens, ge.in_context_start,
            ge.block_norm, reads_tokens=reads_tokens, time_frequencies=ge.time_frequencies,
        )  # fmt: skip
        if ge.local_start:
            self.transformer.look_ahead(max_latents, max_latents)

    def forward(
        self, z: Tensor, t: Tensor, cond: Conditioning, mask: Tensor | None = None, data: Tokens | None = None
    ) -> Tensor:
        """Latents z (B, K, D) at times t (B,), mask (B, K), in tokenise mode also data (B, N, C) -> raw (B, K, D)."""
        k = z.shape[1]
        h = self.latent_in(z) + self.latent_positions[:k]  # (B, K, H)
        index = torch.arange(k, device=z.device)
        if data is None and self.known_in is not None:
            h = add_known(h, self.known_in, cond.known)
        if data is not None:
            n = data.values.shape[1]
            h = torch.cat([h, self.data_in(data.values, data.layout.positions)], dim=1)  # (B, K + N, H)
            index = torch.cat([index, self.max_latents + torch.arange(n, device=z.device)])
            mask = join_masks(mask, data.layout.mask, k, n)
        layout = Layout(index[None, :, None].float(), mask)
        return self.transformer(h, layout, LinearPath().feature(t), cond)[:, :k]


class Decoder(nn.Module):
    """A plain ViT from latents to data tokens in one pass.

    With one latent per data token, each latent has its token's position. Otherwise the sequence is the latents at their
    indices followed by a learned query at each data token's position; the output is that of the queries.

    exact: compute the output layer in float32, inside autocast too. known_channels: of what is given of the data, which
    is added at the data tokens' places; None: nothing is.
    """

    def __init__(
        self, config: UNITEConfig, channels: int, exact: bool = False, known_channels: int | None = None
    ):  # fmt: skip
        super().__init__()
        sizes = config.decoder
        self.width = sizes.width
        stem = sizes.stem_width
        self.stem = linear(config.latent_channels, stem, xavier=False) if stem else nn.Identity()
        self.latent_in = linear(stem or config.latent_channels, sizes.width, xavier=False)
        self.transformer = PlainTransformer(sizes.width, sizes.depth, sizes.heads, sizes.mlp_width)
        self.out = linear(sizes.width, channels, xavier=False, exact=exact)
        self.known_in = None if known_channels is None else linear(known_channels, sizes.width, xavier=False)
        self.query = None if config.num_latents is None else nn.Parameter(torch.randn(sizes.width) * 0.02)

    def forward(self, z: Tensor, layout: Layout, known: Tensor | None = None) -> Tensor:
        """Latents (B, K, D), the layout of N data tokens, what is given of them (B, N, C') -> (B, N, C)."""
        positions = sincos(layout.positions, self.width)  # (B or 1, N, H)
        if self.known_in is not None:
            positions = add_known(positions, self.known_in, known)
        h = self.latent_in(self.stem(z))  # (B, K, H)
        if self.query is None:
            return self.out(self.transformer(h + positions, layout.mask))
        k, n = z.shape[1], layout.num_tokens
        index = torch.arange(k, device=z.device, dtype=torch.float32)[:, None]
        h = h + sincos(index, self.width)
        queries = (self.query + positions).expand(z.shape[0], -1, -1)
        mask = join_masks(None, layout.mask, k, n)
        return self.out(self.transformer(torch.cat([h, queries.to(h.dtype)], dim=1), mask)[:, k:])


class Discriminator(nn.Module):
    """The Generative Encoder with one logit a latent in place of latents: it reads data as in its tokenise mode, with
    registers of zeros (the mean of their noise) and without a condition."""

    def __init__(self, encoder: GenerativeEncoder, null: Conditioning, channels: int):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.encoder.known_in = None
        width = self.encoder.latent_in.out_features
        self.encoder.transformer.out = zero_init(nn.Linear(width, 1).to(next(encoder.parameters())))
        self.channels = channels
        self.vector: Tensor
        self.tokens: Tensor | None
        self.register_buffer("vector", null.vector.detach().clone())
        self.register_buffer("tokens", None if null.tokens is None else null.tokens.detach().clone())

    def forward(self, values: Tensor, layout: Layout) -> Tensor:
        """Data tokens (B, N, C) -> logits (B, K)."""
        n = len(values)
        tokens = None if self.tokens is None else self.tokens.expand(n, -1, -1)
        cond = Conditioning(self.vector.expand(n, -1), tokens)
        registers = values.new_zeros(n, self.encoder.max_latents, self.channels)
        return self.encoder(registers, values.new_ones(n), cond, None, Tokens(values, layout))[..., 0]


class UNITEDraws(NamedTuple):
    """All random numbers of one training step: F flow draws, K x D latents, c conditions."""

    registers: Tensor  # (B, K, D) normal, eps_r
    register_time: Tensor  # (B,) uniform
    noisy: Tensor  # (B,) uniform; noise is added before decoding where < 0.5
    noise_time: Tensor  # (B,) uniform
    noise: Tensor  # (B, K, D) normal
    flow_time: Tensor  # (B, F) normal
    flow_noise: Tensor  # (B, F, K, D) normal
    drop: Tensor  # (B, F, c) uniform


class UNITE(LatentModel):
    """Two passes per step. Tokenise, add noise, decode: reconstruction loss. Stop the gradient, noise, denoise with the
    same weights: flow loss."""

    Config = UNITEConfig
    ablations = ABLATIONS
    encoder_parts = ("generative_encoder.", "latent_norm.", "conditions.")

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        method: UNITEConfig = config.method
        self.method = method
        self.path = LinearPath(min_time=MIN_TIME)
        self.latent_channels = method.latent_channels
        max_latents = self.max_latents = method.num_latents or self.modality.max_tokens
        fields = self.modality.fields
        self.conditions = Conditions(config.conditions, method.generative_encoder.width)
        reads_tokens = self.conditions.give_tokens
        reads = (reads_tokens, self.known_latent_channels)
        self.generative_encoder = GenerativeEncoder(method, fields, max_latents, *reads)
        self.denoiser = None if method.shared_weights else GenerativeEncoder(method, fields, max_latents, *reads)
        if self.denoiser is not None:
            self.denoiser.data_in.requires_grad_(False)  # this network never reads data
        self.latent_norm = _latent_norm(method)
        self.decoder = Decoder(method, self.modality.channels, any_exact(fields), self.known_data_channels)

    # ---- the core methods --------------------------------------------------------------------------------------------

    @gradients_on_request
    def encode(self, data: Any, seed: int = 0, start: int = 0) -> Tensor:
        tokens = self._tokens(self.modality.check(data))
        rows = range(start, start + len(tokens.values))
        return self._encoded(tokens, Streams(("encode", seed), rows, self.device))

    @gradients_on_request
    def decode(
        self, latents: Tensor, layout: Layout | None = None, seed: int = 0, start: int = 0,
        settings: SamplingConfig | None = None, given: Given | None = None,
    ) -> Any:  # fmt: skip
        latents, layout = self.decoder_inputs(latents, layout, seed, start)
        return self.finished(self.decoder(latents, layout, self.known_data(given)), layout, given)

    def denoise(
        self, z: Tensor, t: Tensor | float, cond: Conditioning, layout: Layout | None = None, finish: bool = True
    ) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(z.shape[0])
        network = self.denoiser if self.denoiser is not None else self.generative_encoder
        raw = network(z, t, cond, None if layout is None else layout.mask)
        return self.finish_latents(raw) if finish else raw

    def loss(self, batch: Batch, streams: Streams) -> Iterator[LossPart]:
        tokens = self._tokens(batch.data)
        draws = self.draw(streams, self.latent_layout(tokens.layout).num_tokens)
        given = self.draw_given(batch.data, streams)
        return self.loss_from(batch, tokens, draws, given, self.known_latents(given, streams))

    def latent_layout(self, layout: Layout) -> Layout:
        if self.method.num_latents is None:
            return layout
        index = torch.arange(self.method.num_latents, dtype=torch.float32, device=layout.positions.device)
        return Layout(index[None, :, None])

    def passes(self, layout: Layout) -> tuple[LatentPass, LatentPass]:
        tokenizing = self.generative_encoder
        denoising = tokenizing if self.denoiser is None else self.denoiser
        return (
            LatentPass(list(tokenizing.transformer.blocks), layout.num_tokens),
            LatentPass(list(denoising.transformer.blocks)),
        )

    def sharpening(self) -> Sharpening:
        def predict(data: Any, streams: Streams) -> Tensor:
            tokens = self._tokens(data)
            with torch.no_grad():
                z = self._encoded(tokens, streams)
                noisy = self.add_reconstruction_noise(z, self.draw(streams, z.shape[1]))
                given = self.draw_given(data, streams)
            values = self.decoder(noisy, tokens.layout, self.known_data(given))
            return self.keep_given(values, tokens.values, given)

        judge = Discriminator(self.generative_encoder, self.conditions.null(1), self.latent_channels)
        last = self.decoder.out.weight
        assert isinstance(last, nn.Parameter)
        return Sharpening(self.decoder, last, judge, predict)

    # ---- their parts -------------------------------------------------------------------------------------------------

    @property
    def decoder_noise(self) -> float:
        return self.method.reconstruction_noise

    @torch.no_grad()
    def encode_clean(self, data: Any, streams: Streams) -> Tensor:
        return self._encoded(self._tokens(data), streams)

    def _encoded(self, tokens: Tokens, streams: Streams) -> Tensor:
        k = self.latent_layout(tokens.layout).num_tokens
        time, registers = streams.uniform(), self.latent_noise(streams, k)
        return self.tokenize(tokens, registers.to(self.device), time.to(self.device))

    def tokenize(self, tokens: Tokens, registers: Tensor, register_time: Tensor) -> Tensor:
        """z = LN(GE(eps_r, t, x)): data tokens (B, N, C) to latents (B, K, D), zeros at padding.

        registers: eps_r (B, K, D). register_time: uniforms u (B,) in [0, 1) for t = 1 - 0.01 u.
        """
        t = 1 - REGISTER_TIME * register_time
        layout = self.latent_layout(tokens.layout)
        raw = self.generative_encoder(registers, t, self.conditions.null(len(registers)), layout.mask, tokens)
        return layout.blank(self.finish_latents(raw))

    def finish_latents(self, latents: Tensor) -> Tensor:
        """LN: the output norm of latents and estimates, in float32."""
        return self.latent_norm(latents)

    def draw(self, streams: Streams, k: int) -> UNITEDraws:
        """Draw all random numbers of a step for K = k. Latents are the first axis of their draw, so that padding
        changes no number."""
        f, c = self.method.flow_draws, len(self.conditions)
        uniform = streams.uniform(3 + f * c).split([1, 1, 1, f * c], dim=1)
        noise = streams.normal(k, f + 2, self.latent_channels).transpose(1, 2)  # (B, F + 2, K, D)
        return UNITEDraws(
            registers=noise[:, 0],
            noise=noise[:, 1],
            flow_noise=noise[:, 2:],
            flow_time=streams.normal(f),
            register_time=uniform[0][:, 0],
            noisy=uniform[1][:, 0],
            noise_time=uniform[2][:, 0],
            drop=uniform[3].unflatten(1, (f, c)),
        )

    def loss_from(
        self, batch: Batch, tokens: Tokens, draws: UNITEDraws, given: Given | None = None, known: Tensor | None = None
    ) -> Iterator[LossPart]:  # fmt: skip
        """Yield the loss for these random numbers: the reconstruction part, then the flow draws chunk by chunk.

        given, known: the given parts of the samples, and their `known_latents`.
        """
        z = self.tokenize(tokens, draws.registers, draws.register_time)  # (B, K, D)
        part = self._reconstruction(z, batch.data, tokens, draws, given)
        if not self.method.stop_gradient:
            flow = self._flow(z, batch, tokens.layout, draws, slice(None), known)
            yield replace(
                part, value=part.value + flow.value, terms=part.terms | flow.terms, name="reconstruction_and_flow"
            )
            return
        yield part
        z = z.detach()
        chunk = self.method.flow_chunk or self.method.flow_draws
        for start in range(0, self.method.flow_draws, chunk):
            yield self._flow(z, batch, tokens.layout, draws, slice(start, start + chunk), known)

    def _reconstruction(
        self, z: Tensor, data: Any, tokens: Tokens, draws: UNITEDraws, given: Given | None
    ) -> LossPart:  # fmt: skip
        noisy, layout = self.add_reconstruction_noise(z, draws), tokens.layout
        values = self.decoder(noisy, layout, self.known_data(given))
        prediction = Tokens(self.keep_given(values, tokens.values, given), layout)
        terms = self.modality.reconstruction_loss(prediction, data)
        value = self.method.reconstruction_weight * torch.stack(list(terms.values())).sum()
        mask = self.latent_layout(layout).mask
        return LossPart(value, terms, name="reconstruction", latents=z.detach(), latent_mask=mask)

    def add_reconstruction_noise(self, z: Tensor, draws: UNITEDraws) -> Tensor:
        """(1 - s) z + s eps with s ~ U[0, reconstruction_noise], for half of the samples on average."""
        t = self.method.reconstruction_noise * draws.noise_time
        return self.path.add_noise(z, draws.noise, torch.where(draws.noisy < 0.5, t, 0.0))

    def _flow(
        self, z: Tensor, batch: Batch, layout: Layout, draws: UNITEDraws, which: slice, known: Tensor | None = None,
    ) -> LossPart:  # fmt: skip
        """The terms of L_flow of some draws. z is repeated: all samples of one draw, then all of the next."""
        t = times.shift(times.logit_normal(draws.flow_time[:, which]), self.method.time_shift)  # (B, f)
        f = t.shape[1]
        t = t.T.flatten()  # (f B,)
        eps = draws.flow_noise[:, which].transpose(0, 1).flatten(0, 1)  # (f B, K, D)
        drop = draws.drop[:, which].transpose(0, 1).flatten(0, 1)  # (f B, c)
        clean = z.repeat(f, 1, 1)
        cond = self.conditions(batch.values, drop) if len(self.conditions) else self.conditions.null(len(clean))
        cond = cond.given(None if known is None else known.repeat(f, 1, 1))
        latents = self.latent_layout(layout).repeat(f)
        estimate = self.denoise(self.path.add_noise(clean, eps, t), t, cond, latents)
        mean = denoising_loss(clean, estimate, weightings.velocity(t, MIN_TIME), latents.mask)
        return LossPart(self.method.flow_weight * f * mean, {"flow": f * mean}, name="flow")

    def _tokens(self, data: Any) -> Tokens:
        tokens = self.modality.pack(data)
        return Tokens(tokens.values.to(self.device), tokens.layout.to(self.device))


def _latent_norm(method: UNITEConfig) -> nn.Module:
    if method.latent_norm == "rms":
        return Float32RMSNorm(method.latent_channels, eps=1e-6)
    return Float32LayerNorm(method.latent_channels, eps=1e-5, elementwise_affine=method.latent_norm == "layer")
