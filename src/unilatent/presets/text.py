"""Runs on images with captions. None has a published number."""

from __future__ import annotations

from ..conditions.text import TextConfig
from ..methods.latent_diffusion import LatentDiffusionConfig
from ..modalities.image import ImageConfig, ImageData
from ..model_config import SamplingConfig
from ..nets.backbones import ViTConfig
from ..training.config import Onset, OptimizerConfig, RunConfig, TrainingConfig
from ._shared import PresetEntry, decaying, second_stage, small_unified_latents, small_unite
from .image import IMAGENET, imagenet256_unite

SCENES = ImageData(path="scenes", held_out=0.03)
"""20,000 scenes and 600 held-out ones, half of which have a pair of colour and shape that is never trained on."""
BYTES = TextConfig(max_length=32, width=64, depth=2, heads=4)
TEMPLATES = ("a photo of a {}", "a picture of a {}", "{}")


def scenes_unite() -> RunConfig:
    """UNITE on drawn scenes of one to three shapes, from their captions; ten minutes on two CPU cores.

    Expected of 600 new scenes: see docs/results/scenes.md.
    """
    return RunConfig(
        modality=ImageConfig(size=32, patch_size=8, channels=3, squared_weight=1.0, flip=False),
        conditions={"text": BYTES},
        method=small_unite(
            width=96,
            depth=4,
            decoder_depth=2,
            heads=3,
            in_context_tokens=0,
            in_context_start=1,
            local_start=True,
            flow_weight=0.3,
            reconstruction_noise=0.15,
            flow_draws=1,
            time_shift=1.5,
        ),
        sampling=SamplingConfig(num_inference_steps=15, guidance_scale=2.0),
        data=SCENES,
        training=TrainingConfig(
            steps=1900,
            batch_size=64,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=4e-3),
            schedule=decaying(1100, 1900, onsets={"flow": Onset(start=100, end=200)}),
            ema_decay=0.995,
            log_every=50,
            sample_every=1000,
            checkpoint_every=1000,
            evaluate_samples=600,
        ),
    )


def scenes_ul() -> RunConfig:
    """Unified Latents on drawn scenes of one to three shapes, from their captions; both stages."""
    first = RunConfig(
        modality=ImageConfig(size=32, patch_size=4, channels=3, flip=False),
        method=small_unified_latents(96, decoder=ViTConfig(width=128, depth=4, heads=4)),
        sampling=SamplingConfig(solver="ddim"),
        data=SCENES,
        training=TrainingConfig(
            steps=3000,
            batch_size=64,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=2e-3),
            gradient_clip=1.0,
            schedule=decaying(2000, 3000, warmup=100),
            ema_decay=0.995,
            log_every=50,
            sample_every=0,
            checkpoint_every=1000,
        ),
    )
    return second_stage(
        first,
        {"text": BYTES},
        LatentDiffusionConfig(base=ViTConfig(width=128, depth=5, heads=4), bias=0.0),
        guidance_scale=2.0,
        sample_every=1000,
        evaluate_samples=300,
    )


def imagenet256_unite_b_text() -> RunConfig:
    """UNITE-B on ImageNet at 256x256, conditioned on class names in caption templates; needs data.path and, where its
    folders have ImageNet's codes, data.class_names_file=LOC_synset_mapping.txt (names in their order work too).

    There is no published number; the class-conditional run it follows is imagenet256-unite-b.
    """
    text = TextConfig(max_length=64, width=256, depth=4)
    return _from_text(imagenet256_unite("b", "b"), text, ImageData(caption_template=TEMPLATES))


def text256_unite_l() -> RunConfig:
    """UNITE-L from captions encoded by a frozen T5, at 256x256; needs data.path with captions (see docs/data.md) and
    `pip install 'unilatent[text]'`.

    There is no published number; sizes and optimiser are those of imagenet256-unite-l, without its copies of the
    class's vector.
    """
    text = TextConfig(encoder="google/flan-t5-large", max_length=128)
    run = _from_text(imagenet256_unite("l", "l", micro_batch=16), text, ImageData(held_out=0.001))
    return run.model_copy(update={"modality": run.modality.model_copy(update={"flip": False})})


def _from_text(run: RunConfig, text: TextConfig, data: ImageData) -> RunConfig:
    """The run conditioned on a text in place of classes; the text's tokens replace the copies of the class's vector."""
    encoder = run.method.generative_encoder.model_copy(update={"in_context_tokens": 0})
    method = run.method.model_copy(update={"generative_encoder": encoder})
    return run.model_copy(update={"conditions": {"text": text}, "method": method, "data": data})


PRESETS: dict[str, PresetEntry] = {
    "scenes-unite": PresetEntry(scenes_unite, data="drawn scenes", samples=20_000),
    "scenes-ul": PresetEntry(scenes_ul, data="drawn scenes", samples=20_000),
    "imagenet256-unite-b-text": PresetEntry(imagenet256_unite_b_text, gpus=8, data="ImageNet-1k", samples=IMAGENET),
    "text256-unite-l": PresetEntry(text256_unite_l, gpus=8),
}
