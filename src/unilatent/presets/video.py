"""Runs on video. Published numbers, with the settings that they belong to, are in PRESETS."""

from __future__ import annotations

from ..conditions.class_label import ClassLabelConfig
from ..methods.latent_diffusion import LatentDiffusionConfig
from ..methods.unified_latents import UnifiedLatentsConfig
from ..methods.unite import UNITEConfig
from ..modalities.video import VideoConfig, VideoData
from ..model_config import GivenConfig, SamplingConfig
from ..nets.backbones import ConvEncoderConfig, UViTConfig, ViTConfig
from ..training.config import (
    BatchScaledRate,
    Onset,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from ._shared import PresetEntry, decaying, joint_stage, second_stage, small_unite
from .image import DECODERS, GENERATIVE_ENCODERS

DIGITS = VideoData(path="bouncing", held_out=360)
"""20,000 clips of bouncing digits, and 360 of digits that those do not show."""
KINETICS, UCF = 384_000, 9_537
"""Training clips of Kinetics-600 as published models used it, and of UCF-101's first split."""


def bouncing_unite() -> RunConfig:
    """UNITE on generated clips of 16 frames of 16 x 16 pixels, in which a digit bounces; continues given frames.

    Expected: docs/results/video.md. Reconstructions move by the law of the data; in new clips the digit is mostly the
    wanted one and keeps its shape, but its path is off by a third of a pixel.
    """
    return RunConfig(
        modality=VideoConfig(frames=16, size=16, tubelet=(1, 16, 16), channels=1, squared_weight=1.0, flip=False),
        conditions={"class_label": ClassLabelConfig()},
        given=GivenConfig(nothing=0.5),
        method=small_unite(
            width=128,
            depth=4,
            decoder_depth=3,
            in_context_tokens=1,
            in_context_start=1,
            local_start=True,
            flow_weight=0.2,
            flow_draws=2,
        ),
        sampling=SamplingConfig(solver="ancestral", num_inference_steps=100, time_shift=2.0),
        data=DIGITS,
        training=TrainingConfig(
            steps=2500,
            batch_size=32,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=3e-3),
            schedule=decaying(1600, 2500, factor=0.03),
            ema_decay=0.995,
            log_every=50,
            sample_every=1000,
            checkpoint_every=1000,
            evaluate_samples=200,
        ),
    )


def bouncing_two_stage() -> RunConfig:
    """UNITE on generated clips in which a digit bounces, then a generator on its frozen latents; continues no frames.

    Expected: docs/results/video.md. New clips move by the law of the data.
    """
    run = second_stage(
        bouncing_unite(),
        {"class_label": ClassLabelConfig()},
        LatentDiffusionConfig(base=ViTConfig(width=128, depth=6, heads=4), bias=0.0),
        steps=8000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=2e-3),
        gradient_clip=1.0,
        schedule=decaying(5000, 8000, factor=0.03),
        sample_every=2000,
        checkpoint_every=2000,
    )
    sampling = run.sampling.model_copy(update={"time_shift": 1.0})
    return run.model_copy(update={"given": None, "sampling": sampling})


def bouncing_ul() -> RunConfig:
    """Unified Latents on generated clips of 16 frames of 16 x 16 pixels, in which a digit bounces; both stages;
    continues given frames.

    Expected: docs/results/video.md. A latent is a frame. The decoder predicts clean frames, since it is narrower than a
    frame has values, and its weight lies on high noise (b = -2), where the latents decide.
    """
    first = RunConfig(
        modality=VideoConfig(frames=16, size=16, tubelet=(1, 16, 16), channels=1, flip=False),
        given=GivenConfig(nothing=0.7),
        method=UnifiedLatentsConfig(
            latent_channels=16,
            encoder=ViTConfig(width=128, depth=2, heads=4),
            prior=ViTConfig(width=96, depth=2, heads=4),
            decoder=ViTConfig(width=160, depth=3, heads=4),
            decoder_prediction="clean",
            loss_factor=100.0,
            bias=-2.0,
            latent_min_logsnr=-10.0,
        ),
        sampling=SamplingConfig(
            solver="ancestral", num_inference_steps=50, restarts=30, restart_interval=(0.15, 0.4), decoder_steps=4
        ),
        data=DIGITS,
        training=TrainingConfig(
            steps=600,
            batch_size=32,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=4e-3),
            gradient_clip=1.0,
            schedule=decaying(360, 600, factor=0.03, onsets={"prior": Onset(start=50, end=150)}),
            ema_decay=0.99,
            log_every=50,
            sample_every=0,
            checkpoint_every=1000,
        ),
    )
    return second_stage(
        first,
        {"class_label": ClassLabelConfig()},
        LatentDiffusionConfig(base=ViTConfig(width=64, depth=6, heads=4, absolute_positions=True), bias=2.0),
        steps=2450,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=6e-3),
        schedule=decaying(1500, 2450, factor=0.03),
        ema_decay=0.995,
        sample_every=2450,
        evaluate_samples=200,
    )


def kinetics600_ul() -> RunConfig:
    """Unified Latents on Kinetics-600: 16 frames of 128 x 128, 4 x 16 x 16 latents of 32 channels, 5 frames given in
    evaluation; both stages; needs data.path.

    The paper fixes frames, size, latents' grid and the five given frames (Sec. 5.3: FVD 1.7 with its small base, 1.3
    with its medium one). All else is ours, in the proportions of `imagenet512-ul`: encoder, prior, decoder and base,
    loss factor, bias (calibrate it), optimiser, batch size and length. So no published number belongs to this preset.
    """
    first = RunConfig(
        modality=VideoConfig(frames=16, size=128, tubelet=(1, 1, 1), fps=25, given_frames=5),
        given=GivenConfig(kinds=("frames",)),
        method=UnifiedLatentsConfig(
            encoder=ConvEncoderConfig(
                channels=(128, 256, 512), blocks=(2, 2, 3), patch=(1, 2, 2), strides=((2, 2, 2), (2, 2, 2))
            ),
            prior=ViTConfig(),
            decoder=UViTConfig(
                channels=(128, 256, 1024), blocks=(2, 2, 8), patch=(1, 2, 2), strides=((2, 2, 2), (2, 2, 2))
            ),
        ),
        sampling=SamplingConfig(solver="ddim", num_inference_steps=50),
        data=VideoData(),
        training=joint_stage(batch_size=256),
    )
    base = UViTConfig(channels=(512, 1024), blocks=(6, 16), transformers=2, patch=1, strides=((1, 2, 2),), dropout=0.1)
    return second_stage(
        first,
        {},
        LatentDiffusionConfig(base=base, bias=1.0),
        steps=500_000,
        batch_size=512,
        micro_batch_size=32,
    )


def ucf101_unite_b() -> RunConfig:
    """UNITE on UCF-101: 16 frames of 128 x 128 in tubelets of 4 x 16 x 16, with class labels; needs data.path.

    UNITE's authors train on no video. Sizes are those of `imagenet256-unite-b`, which has the same number of tokens;
    the length is ours. Groups of clips are held out whole, but not those of the published splits: give their lists as
    `data.annotations` for these.
    """
    return RunConfig(
        modality=VideoConfig(frames=16, size=128, tubelet=(4, 16, 16), perceptual_weight=1.0, fps=25),
        conditions={"class_label": ClassLabelConfig(num_classes=101)},
        given=GivenConfig(),
        method=UNITEConfig(generative_encoder=GENERATIVE_ENCODERS["b"], decoder=DECODERS["b"]),
        sampling=SamplingConfig(time_shift=2.0, guidance_scale=3.4, guidance_interval=(0.0, 0.9)),
        data=VideoData(held_out=0.28),
        training=TrainingConfig(
            steps=200_000,
            batch_size=256,
            micro_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=BatchScaledRate(base=1e-4, base_batch_size=384)),
            schedule=decaying(100_000, 200_000, warmup=2_000, factor=0.1),
            log_every=50,
            sample_every=5_000,
            checkpoint_every=5_000,
            workers=8,
        ),
    )


PRESETS: dict[str, PresetEntry] = {
    "bouncing-unite": PresetEntry(bouncing_unite, data="generated bouncing digits", samples=20_000),
    "bouncing-two-stage": PresetEntry(bouncing_two_stage, data="generated bouncing digits", samples=20_000),
    "bouncing-ul": PresetEntry(bouncing_ul, data="generated bouncing digits", samples=20_000),
    "kinetics600-ul": PresetEntry(kinetics600_ul, gpus=8, data="Kinetics-600", samples=KINETICS),
    "ucf101-unite-b": PresetEntry(ucf101_unite_b, gpus=8, data="UCF-101", samples=UCF),
}
