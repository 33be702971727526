"""Runs on crystals. The number to expect stands beside each."""

from __future__ import annotations

from collections.abc import Callable

from ..methods.base import SamplingConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.crystal import CrystalConfig, CrystalData
from ..training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig


def crystals() -> RunConfig:
    """UNITE on crystals of known prototypes, made here; sized for two CPU cores.

    No numbers yet: 1,500 steps are the length of a first look, not of a good model.
    """
    return RunConfig(
        modality=CrystalConfig(max_atoms=20, elements="found"),
        method=UNITEConfig(
            latent_channels=16,
            generative_encoder=GenerativeEncoderConfig(width=128, depth=4, heads=4, in_context_tokens=0),
            decoder=DecoderConfig(width=128, depth=4, heads=4, mlp_width=512),
            reconstruction_noise=0.1,
            flow_draws=2,
            time_shift=1.0,
        ),
        sampling=SamplingConfig(solver="heun", num_inference_steps=50, time_shift=1.0),
        data=CrystalData(path="prototypes", num=4000),
        training=TrainingConfig(
            steps=1500,
            batch_size=32,
            threads=1,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(warmup=50),
            ema_decay=0.99,
            log_every=20,
            sample_every=500,
            checkpoint_every=500,
            num_samples=20,
            evaluate_samples=200,
        ),
    )


def mp20_unite_s() -> RunConfig:
    """UNITE-S on MP20 as in its paper: 10,000 epochs; needs data.path, a folder with its train.csv, val.csv, test.csv.

    Published (arXiv 2603.22283): structure valid 99.0 %, composition 89.9 %, both 87.9 % of 10,000 new crystals;
    reconstruction: match rate 75.7 %. The paper's 16 latent channels are taken as
    16 an atom; it says neither the decoder's noise (0.1) nor the warm-up (1,000 steps).
    """
    return RunConfig(
        modality=CrystalConfig(max_atoms=20),
        method=UNITEConfig(
            latent_channels=16,
            generative_encoder=GenerativeEncoderConfig(width=384, depth=12, heads=6, in_context_tokens=0),
            decoder=DecoderConfig(width=384, depth=12, heads=6, mlp_width=1536),
            reconstruction_noise=0.1,
            flow_draws=3,
            time_shift=1.0,
        ),
        sampling=SamplingConfig(solver="heun", num_inference_steps=50, time_shift=1.0),
        data=CrystalData(),
        training=TrainingConfig(
            epochs=10_000,
            batch_size=512,
            optimizer=OptimizerConfig(learning_rate=1e-4, muon=False),
            schedule=ScheduleConfig(warmup=1000),
            ema_decay=0.9999,
            precision="bf16",
            log_every=100,
            sample_every=10_000,
            checkpoint_every=5_000,
            workers=4,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"crystals": crystals, "mp20-unite-s": mp20_unite_s}
