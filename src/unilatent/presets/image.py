"""Runs on images. Expected numbers are in the docstrings."""

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
from ..training.config import Decay, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig
from ._shared import decaying, second_stage, small_unified_latents, small_unite

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


def imagenet256_unite(encoder: str, decoder: str) -> RunConfig:
    """UNITE on ImageNet at 256x256 as its authors trained it; needs data.path.

    Published FID, 50,000 samples (README of the authors, 14 flow draws): B 2.12 after 240 epochs, L 1.73 after 120;
    project paper: B 2.27, L 1.96, XL-B 1.88, XL-L 1.82. Reconstruction FID of B after 120 epochs: 1.01.
    Follows the authors' code where it differs from the paper: L1 and LPIPS, logit-normal times, velocity weight,
    learning rate 1e-4 x batch / 384. The second decay of its schedule (epoch 3,000) is left out, because it is beyond
    the 600 epochs.
    """
    return RunConfig(
        modality=ImageConfig(size=256, patch_size=16, perceptual_weight=1.0),
        conditions={"class_label": ClassLabelConfig(num_classes=1000, reserved_rows=2)},
        method=UNITEConfig(generative_encoder=GENERATIVE_ENCODERS[encoder], decoder=DECODERS[decoder]),
        sampling=SamplingConfig(time_shift=2.0, guidance_scale=3.4, guidance_interval=(0.0, 0.9)),
        data=ImageData(),
        training=TrainingConfig(
            epochs=600,
            batch_size=1024,
            micro_batch_size=64,
            optimizer=OptimizerConfig(learning_rate=1e-4 * 1024 / 384),
            schedule=ScheduleConfig(unit="epochs", warmup=20, decays=(Decay(start=30, end=50, factor=0.5),)),
            log_every=50,
            sample_every=2000,
            checkpoint_every=2000,
            workers=8,
        ),
    )


def imagenet512_ul() -> RunConfig:
    """Unified Latents at the paper's sizes: 512x512, 32x32 latents of 32 channels; both stages; needs data.path.

    Table 2: 0.059 bits per pixel, 27.6 dB and rFID 0.47 at loss factor 1.5; gFID 1.54 and 1.31 for two sizes of base.
    The paper gives neither the bias (2 here: calibrate it) nor optimiser, batch size and length (here those of the same
    authors' simple diffusion, arXiv:2301.11093, and related papers).
    """
    first = RunConfig(
        modality=ImageConfig(size=512, patch_size=1),
        method=UnifiedLatentsConfig(),
        sampling=SamplingConfig(solver="ddim", num_inference_steps=100),
        data=ImageData(),
        training=TrainingConfig(
            steps=400_000,
            batch_size=512,
            optimizer=OptimizerConfig(learning_rate=1e-4, muon=False, betas=(0.9, 0.99), eps=1e-12),
            gradient_clip=1.0,
            schedule=ScheduleConfig(warmup=10_000),
            ema_decay=0.9999,
            log_every=100,
            sample_every=10_000,
            checkpoint_every=5_000,
            num_samples=8,
            workers=8,
        ),
    )
    base = UViTConfig(channels=(512, 1024), blocks=(6, 16), transformers=2, patch=1, strides=(2,), dropout=0.1)
    return second_stage(
        first,
        {"class_label": ClassLabelConfig(num_classes=1000)},
        LatentDiffusionConfig(base=base, bias=1.0),
        guidance_scale=1.5,
        steps=500_000,
        batch_size=1024,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-ul": digits_ul,
    "imagenet512-ul": imagenet512_ul,
    "cifar10-unite-s": cifar10_unite_s,
    **{f"imagenet256-unite-{e}": partial(imagenet256_unite, e, "b") for e in GENERATIVE_ENCODERS},
    **{
        f"imagenet256-unite-{e}-decoder-{d}": partial(imagenet256_unite, e, d)
        for e in GENERATIVE_ENCODERS
        for d in "sl"
    },
}
