"""Runs on pictures with captions. The number to expect stands beside each."""

from __future__ import annotations

from collections.abc import Callable

from ..conditions.text import TextConfig
from ..methods.base import SamplingConfig
from ..methods.latent_diffusion import LatentDiffusionConfig
from ..methods.unified_latents import UnifiedLatentsConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.image import ImageConfig, ImageData
from ..nets.backbones import ViTConfig
from ..training.config import Decay, Onset, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig
from .image import DECODERS, GENERATIVE_ENCODERS, imagenet256_unite

SCENES = ImageData(path="scenes", held_out=0.03)
"""20,000 scenes and 600 held-out ones, half of these with a pair of colour and shape that is never trained on."""
BYTES = TextConfig(max_length=32, width=64, depth=2, heads=4)
TEMPLATES = ("a photo of a {}", "a picture of a {}", "{}")


def scenes_unite() -> RunConfig:
    """UNITE on drawn scenes of one to three shapes, from their captions; ten minutes on two CPU cores.

    Expected of 600 new scenes: see docs/results/scenes.md.
    """
    return RunConfig(
        modality=ImageConfig(size=32, patch_size=8, channels=3, squared_weight=1.0, flip=False),
        conditions={"text": BYTES},
        method=UNITEConfig(
            latent_channels=16,
            generative_encoder=GenerativeEncoderConfig(
                width=96, depth=4, heads=3, in_context_tokens=0, in_context_start=1, local_start=True
            ),
            decoder=DecoderConfig(width=96, depth=2, heads=4, mlp_width=384),
            reconstruction_weight=10.0,
            flow_weight=0.3,
            reconstruction_noise=0.15,
            flow_draws=1,
            time_shift=1.5,
        ),
        sampling=SamplingConfig(solver="heun", num_inference_steps=15, time_shift=1.0, guidance_scale=2.0),
        data=SCENES,
        training=TrainingConfig(
            steps=1900,
            batch_size=64,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=4e-3),
            schedule=ScheduleConfig(
                warmup=50,
                decays=(Decay(start=1100, end=1900, factor=0.05),),
                onsets={"flow": Onset(start=100, end=200)},
            ),
            ema_decay=0.995,
            log_every=50,
            sample_every=1000,
            checkpoint_every=1000,
            evaluate_samples=600,
        ),
    )


def scenes_ul() -> RunConfig:
    """Unified Latents on drawn scenes of one to three shapes, from their captions; both stages."""
    image = ImageConfig(size=32, patch_size=4, channels=3, flip=False)
    common = TrainingConfig(
        steps=3000, batch_size=64, threads=2, optimizer=OptimizerConfig(learning_rate=2e-3), gradient_clip=1.0,
        schedule=ScheduleConfig(warmup=100, decays=(Decay(start=2000, end=3000, factor=0.05),)), ema_decay=0.995,
        log_every=50, sample_every=0, checkpoint_every=1000,
    )  # fmt: skip
    first = RunConfig(
        modality=image,
        method=UnifiedLatentsConfig(
            latent_channels=4,
            encoder=ViTConfig(width=96, depth=2, heads=4),
            prior=ViTConfig(width=96, depth=3, heads=4),
            decoder=ViTConfig(width=128, depth=4, heads=4),
            loss_factor=8.0,
            bias=2.0,
            latent_min_logsnr=-10.0,
        ),
        sampling=SamplingConfig(solver="ddim", num_inference_steps=50, decoder_steps=50),
        data=SCENES,
        training=common,
    )
    return RunConfig(
        modality=image,
        conditions={"text": BYTES},
        method=LatentDiffusionConfig(base=ViTConfig(width=128, depth=5, heads=4), bias=0.0),
        sampling=SamplingConfig(solver="ddim", num_inference_steps=50, decoder_steps=50, guidance_scale=2.0),
        data=SCENES,
        training=common.model_copy(update={"evaluate_samples": 300, "sample_every": 1000}),
        tokenizer=first,
    )


def imagenet256_unite_b_text() -> RunConfig:
    """UNITE-B on ImageNet at 256x256, from class names put into templates; needs data.path and, where its
    folders have ImageNet's codes, data.class_names_file=LOC_synset_mapping.txt (names in their order will do).

    Nobody published a number for it; the class-conditional run it follows is imagenet256-unite-b.
    """
    classes = imagenet256_unite("b", "b")
    return classes.model_copy(
        update={
            "conditions": {"text": TextConfig(max_length=64, width=256, depth=4)},
            "method": _without_copies("b", "b"),
            "data": ImageData(caption_template=TEMPLATES),
        }
    )


def text256_unite_l() -> RunConfig:
    """UNITE-L from captions read by a frozen T5, at 256x256; needs data.path with captions (see docs/data.md) and
    `pip install 'unilatent[text]'`.

    Nobody published a number for it; sizes and optimiser are those of imagenet256-unite-l, whose copies of the class's
    vector are left out.
    """
    classes = imagenet256_unite("l", "l")
    return classes.model_copy(
        update={
            "modality": classes.modality.model_copy(update={"flip": False}),
            "conditions": {"text": TextConfig(encoder="google/flan-t5-large", max_length=128)},
            "method": _without_copies("l", "l"),
            "data": ImageData(path=None, held_out=0.001),
        }
    )


def _without_copies(encoder: str, decoder: str) -> UNITEConfig:
    """Tokens of the text join where copies of a class's vector would."""
    sizes = GENERATIVE_ENCODERS[encoder].model_copy(update={"in_context_tokens": 0})
    return UNITEConfig(generative_encoder=sizes, decoder=DECODERS[decoder])


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "scenes-unite": scenes_unite,
    "scenes-ul": scenes_ul,
    "imagenet256-unite-b-text": imagenet256_unite_b_text,
    "text256-unite-l": text256_unite_l,
}
