"""Runs on images. Published numbers, with the settings that they belong to, are in PRESETS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..conditions.class_label import ClassLabelConfig
from ..methods.latent_diffusion import LatentDiffusionConfig
from ..methods.unified_latents import UnifiedLatentsConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.image import ImageConfig, ImageData
from ..model_config import SamplingConfig
from ..nets.backbones import UViTConfig, ViTConfig
from ..training.config import BatchScaledRate, Decay, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig
from ._shared import PresetEntry, Published, decaying, joint_stage, second_stage, small_unified_latents, small_unite

# Paper, Table "sizes": width, depth, heads.
GENERATIVE_ENCODERS = {
    "b": GenerativeEncoderConfig(width=768, depth=12, heads=12),
    "m": GenerativeEncoderConfig(width=1024, depth=12, heads=16),
    "l": GenerativeEncoderConfig(width=1024, depth=24, heads=16),
    "xl": GenerativeEncoderConfig(width=1152, depth=28, heads=16),
}
DECODERS = {
    "s": DecoderConfig(width=384, depth=12, heads=6, mlp_width=1536, stem_width=768),
    "b": DecoderConfig(width=768, depth=12, heads=12, mlp_width=3072, stem_width=768),
    "l": DecoderConfig(width=1024, depth=24, heads=16, mlp_width=4096, stem_width=768),
}


def digits() -> RunConfig:
    """UNITE on the embedded 8x8 handwritten digits; about a minute on one CPU core.

    Four patches of 4x4 pixels with one latent each, and half of the attention heads start at their own patch: latents
    are informative from the first steps. Expected over seeds 0 to 2: see docs/results/digits.md.
    """
    return RunConfig(
        modality=ImageConfig(size=8, patch_size=4, channels=1, squared_weight=1.0, flip=False),
        conditions={"class_label": ClassLabelConfig()},
        method=small_unite(
            width=64,
            depth=3,
            decoder_depth=2,
            in_context_tokens=1,
            in_context_start=1,
            local_start=True,
            flow_weight=0.2,
            flow_draws=2,
        ),
        sampling=SamplingConfig(num_inference_steps=25, time_shift=2.0),
        data=ImageData(path="digits", held_out=360),
        training=TrainingConfig(
            steps=800,
            batch_size=64,
            threads=1,
            precision="fp32",  # networks this small are no faster in bf16: their casts cost what their products save
            optimizer=OptimizerConfig(learning_rate=3e-3),
            schedule=decaying(530, 800, factor=0.03),
            ema_decay=0.99,
            evaluate_samples=500,
        ),
    )


def digits_ul() -> RunConfig:
    """Unified Latents on the embedded 8x8 handwritten digits, both stages; within eight minutes on two CPU cores.

    Expected over seeds 0 and 1: see docs/results/digits.md.
    """
    first = RunConfig(
        modality=ImageConfig(size=8, patch_size=2, channels=1, flip=False),
        method=small_unified_latents(64, decoder=ViTConfig(width=64, depth=3, heads=4)),
        sampling=SamplingConfig(solver="ddim"),
        data=ImageData(path="digits", held_out=360),
        training=TrainingConfig(
            steps=1400,
            batch_size=64,
            threads=1,
            precision="fp32",  # networks this small are no faster in bf16: their casts cost what their products save
            optimizer=OptimizerConfig(learning_rate=2e-3),
            gradient_clip=1.0,
            schedule=decaying(900, 1400),
            ema_decay=0.99,
            sample_every=0,
        ),
    )
    return second_stage(
        first,
        {"class_label": ClassLabelConfig()},
        LatentDiffusionConfig(base=ViTConfig(width=64, depth=4, heads=4), bias=0.0),
        steps=2000,
        schedule=decaying(1400, 2000),
        sample_every=1000,
        evaluate_samples=500,
    )


def cifar10_unite_s() -> RunConfig:
    """UNITE on 32x32 colour images such as CIFAR-10, small; needs data.path.

    data.path: a folder or zip of class folders; one image in fifty is held out of training.
    """
    return RunConfig(
        modality=ImageConfig(size=32, patch_size=4, channels=3, squared_weight=1.0),
        conditions={"class_label": ClassLabelConfig()},
        method=small_unite(
            width=256, depth=6, decoder_depth=4, in_context_tokens=8, in_context_start=2, flow_weight=0.1
        ),
        sampling=SamplingConfig(num_inference_steps=25, time_shift=2.0, guidance_scale=1.5),
        data=ImageData(held_out=0.02),
        training=TrainingConfig(
            epochs=100,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(warmup=100),
            ema_decay=0.999,
            sample_every=1000,
            checkpoint_every=1000,
        ),
    )


IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""
MICRO_BATCHES = {"b": 64, "m": 64, "l": 32, "xl": 16}
"""Images in memory at once, by generative encoder, with three draws; for 80 GB with every decoder."""
FOURTEEN = {"b": (240, 32, 7), "m": (120, 32, 7), "l": (120, 16, 7), "xl": (120, 16, 4)}
"""Epochs, images and draws in memory at once with 14 flow draws, by generative encoder; for 80 GB with decoder B."""


def imagenet256_unite(
    encoder: str, decoder: str, draws: int = 3, epochs: float = 120, micro_batch: int | None = None,
    chunk: int | None = None,
) -> RunConfig:  # fmt: skip
    """UNITE on ImageNet at 256x256 as its authors trained it; needs data.path.

    Follows the authors' code where it differs from the paper: L1 and LPIPS, logit-normal times, velocity weight,
    learning rate 1e-4 max(1, batch / 384). The second decay of its schedule (epoch 3,000) is left out, because no run
    reaches it. FID is measured every 40 epochs as theirs, here with the 50,000 samples of the published numbers, and
    against the training data unless training.evaluate_reference names statistics. What differs from their code:
    docs/presets.md. Published numbers: PRESETS below.
    """
    return RunConfig(
        modality=ImageConfig(size=256, patch_size=16, perceptual_weight=1.0),
        conditions={"class_label": ClassLabelConfig(num_classes=1000, reserved_rows=2)},
        method=UNITEConfig(
            generative_encoder=GENERATIVE_ENCODERS[encoder],
            decoder=DECODERS[decoder],
            flow_draws=draws,
            flow_chunk=chunk,
        ),
        sampling=SamplingConfig(time_shift=2.0, guidance_scale=3.4, guidance_interval=(0.0, 0.9)),
        data=ImageData(),
        training=TrainingConfig(
            epochs=epochs,
            batch_size=1024,
            micro_batch_size=micro_batch or MICRO_BATCHES[encoder],
            optimizer=OptimizerConfig(learning_rate=BatchScaledRate(base=1e-4, base_batch_size=384)),
            schedule=ScheduleConfig(unit="epochs", warmup=20, decays=(Decay(start=30, end=50, factor=0.5),)),
            log_every=50,
            sample_every=2000,
            checkpoint_every=2000,
            evaluate_every=40 * 1251,  # 40 epochs of ImageNet, as the authors do
            evaluate_samples=50_000,
            evaluate_metrics=("fid",),
            best="fid",
            workers=8,
        ),
    )


def imagenet256_unite_14_draws(encoder: str) -> RunConfig:
    """UNITE on ImageNet at 256x256 with the 14 flow draws of its authors' released weights; needs data.path.

    The draws run in chunks (`method.flow_chunk`). Else as `imagenet256_unite`.
    """
    epochs, micro_batch, chunk = FOURTEEN[encoder]
    return imagenet256_unite(encoder, "b", 14, epochs, micro_batch, chunk)


def imagenet512_ul() -> RunConfig:
    """Unified Latents at the paper's sizes: 512x512, 32x32 latents of 32 channels; both stages; needs data.path.

    The paper gives neither the bias (2 here: calibrate it) nor optimiser, batch size and length (here those of the same
    authors' simple diffusion, arXiv:2301.11093, and related papers), nor which of its two sizes of base this one is.
    Published numbers: PRESETS below.
    """
    first = RunConfig(
        modality=ImageConfig(size=512, patch_size=1),
        method=UnifiedLatentsConfig(),
        sampling=SamplingConfig(solver="ddim", num_inference_steps=100),
        data=ImageData(),
        training=joint_stage(batch_size=512),
    )
    base = UViTConfig(channels=(512, 1024), blocks=(6, 16), transformers=2, patch=1, strides=(2,), dropout=0.1)
    return second_stage(
        first,
        {"class_label": ClassLabelConfig(num_classes=1000)},
        LatentDiffusionConfig(base=base, bias=1.0),
        guidance_scale=1.5,
        steps=500_000,
        batch_size=1024,
        micro_batch_size=64,
    )


PUBLISHED = {
    "imagenet256-unite-b": (
        Published(
            {"FID": 2.71, "rFID": 1.01, "IS": 282.2},
            ("method.flow_draws=3", "training.epochs=120", "training.batch_size=1024"),
            "arXiv 2603.22283, Table 7",
        ),
    ),
    "imagenet256-unite-b-14-draws": (
        Published(
            {"FID": 2.12},
            ("method.flow_draws=14", "training.epochs=240", "training.batch_size=1024"),
            "README of the authors",
        ),
    ),
    "imagenet256-unite-l-14-draws": (
        Published(
            {"FID": 1.73},
            ("method.flow_draws=14", "training.epochs=120", "training.batch_size=1024"),
            "README of the authors",
        ),
    ),
    "imagenet512-ul": (
        Published(
            {"bits/pixel": 0.059, "rFID": 0.47, "PSNR in dB": 27.6, "gFID, small base": 1.54, "medium base": 1.31},
            ("tokenizer.method.loss_factor=1.5", "modality.size=512"),
            "arXiv 2602.17270, Table 2",
            "bias, optimiser, batch size, length, which size of base",
        ),
    ),
}
"""Numbers of exactly a preset's settings; sizes without an entry have no published number at their settings."""

RUNS: dict[str, Callable[[], RunConfig]] = {
    "imagenet512-ul": imagenet512_ul,
    **{f"imagenet256-unite-{e}": partial(imagenet256_unite, e, "b") for e in GENERATIVE_ENCODERS},
    **{f"imagenet256-unite-{e}-14-draws": partial(imagenet256_unite_14_draws, e) for e in FOURTEEN},
    **{
        f"imagenet256-unite-{e}-decoder-{d}": partial(imagenet256_unite, e, d)
        for e in GENERATIVE_ENCODERS
        for d in "sl"
    },
}
"""Runs on ImageNet, for eight cards of 80 GB."""

PRESETS: dict[str, PresetEntry] = {
    "digits": PresetEntry(digits, data="the embedded digits", samples=1_437),
    "digits-ul": PresetEntry(digits_ul, data="the embedded digits", samples=1_437),
    "cifar10-unite-s": PresetEntry(cifar10_unite_s, data="CIFAR-10", samples=49_000),
    **{name: PresetEntry(run, PUBLISHED.get(name, ()), 8, "ImageNet-1k", IMAGENET) for name, run in RUNS.items()},
}
