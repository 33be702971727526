"""What several presets have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..methods.latent_diffusion import LatentDiffusionConfig
from ..methods.unified_latents import UnifiedLatentsConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..nets.backbones import ViTConfig
from ..training.config import LEARNING, Decay, Onset, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig


@dataclass(frozen=True)
class Published:
    """Numbers that authors published for the settings of a preset, and for no others.

    numbers: by metric, with units. settings: KEY=VALUE that the numbers belong to and the preset has; a test overrides
    the preset with them and finds nothing changed. source: where the numbers are. unstated: what the source does not
    say about the settings; "" where it says all.
    """

    numbers: Mapping[str, float]
    settings: tuple[str, ...]
    source: str
    unstated: str = ""

    def fits(self, config: RunConfig, preset: RunConfig) -> bool:
        """Whether a configuration has these settings, and differs from the preset in nothing that changes results: it
        may have its data elsewhere, and be for other machines."""
        now, then = config.plain(), preset.plain()
        own = ("modality", "conditions", "method", "sampling", "given")
        same = all(now[part] == then[part] for part in own)
        same = same and all(now["training"][name] == then["training"][name] for name in LEARNING)
        return same and config.override(*self.settings).plain() == now

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.numbers.items())
        unstated = f"; not stated there: {self.unstated}" if self.unstated else ""
        return f"{numbers} at {' '.join(self.settings)} ({self.source}{unstated})"


@dataclass(frozen=True)
class PresetEntry:
    """A run by name, and what is known about it.

    make: returns the configuration; its docstring says what the run is. published: numbers of exactly these settings.
    gpus: cards of 80 GB that batch and micro-batch are meant for; 0: a CPU is enough. data, samples: the training set
    that it is meant for, and how many samples that has; None where it is yours.
    """

    make: Callable[[], RunConfig]
    published: tuple[Published, ...] = ()
    gpus: int = 0
    data: str = ""
    samples: int | None = None

    def __call__(self) -> RunConfig:
        return self.make()


def small_unite(width: int, depth: int, decoder_depth: int, *, heads: int = 4, **fields: Any) -> UNITEConfig:
    """UNITE with one width for encoder and decoder, and a reconstruction loss that outweighs the flow loss: at these
    sizes latents collapse otherwise.

    fields: of `GenerativeEncoderConfig` and `UNITEConfig`.
    """
    encoder = {key: fields.pop(key) for key in list(fields) if key in GenerativeEncoderConfig.model_fields}
    return UNITEConfig(
        latent_channels=16,
        generative_encoder=GenerativeEncoderConfig(width=width, depth=depth, heads=heads, **encoder),
        decoder=DecoderConfig(width=width, depth=decoder_depth, heads=4, mlp_width=4 * width),
        reconstruction_weight=10.0,
        **fields,
    )


def small_unified_latents(width: int, decoder: ViTConfig) -> UnifiedLatentsConfig:
    """Unified Latents of 4 channels with plain transformers; encoder and prior have this width."""
    return UnifiedLatentsConfig(
        latent_channels=4,
        encoder=ViTConfig(width=width, depth=2, heads=4),
        prior=ViTConfig(width=width, depth=3, heads=4),
        decoder=decoder,
        loss_factor=8.0,
        bias=2.0,
        latent_min_logsnr=-10.0,
    )


def joint_stage(batch_size: int) -> TrainingConfig:
    """Training of encoder, prior and decoder at the size of Unified Latents' paper, with its optimiser."""
    return TrainingConfig(
        steps=400_000,
        batch_size=batch_size,
        micro_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-4, muon=False, betas=(0.9, 0.99), eps=1e-12),
        gradient_clip=1.0,
        schedule=ScheduleConfig(warmup=10_000),
        ema_decay=0.9999,
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5_000,
        num_samples=8,
        workers=8,
    )


def second_stage(
    tokenizer: RunConfig, conditions: dict[str, Any], method: LatentDiffusionConfig, guidance_scale: float = 1.0,
    **training: Any,
) -> RunConfig:  # fmt: skip
    """A run of two stages: `tokenizer`, then a generator on its frozen latents.

    training: fields in which the second stage's training differs from the first.
    """
    return tokenizer.model_copy(
        update={
            "tokenizer": tokenizer,
            "conditions": conditions,
            "method": method,
            "sampling": tokenizer.sampling.model_copy(update={"guidance_scale": guidance_scale}),
            "training": TrainingConfig(**{**dict(tokenizer.training), **training}),
        }
    )


def decaying(
    start: float, end: float, *, warmup: float = 50, factor: float = 0.05, onsets: Mapping[str, Onset] | None = None
) -> ScheduleConfig:
    """Warm-up, a constant learning rate until `start`, then a cosine to `factor` at `end`."""
    return ScheduleConfig(
        warmup=warmup, decays=(Decay(start=start, end=end, factor=factor),), onsets=dict(onsets or {})
    )
