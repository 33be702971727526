"""Runs on molecules and crystals together. The number to expect stands beside each."""

from __future__ import annotations

from collections.abc import Callable

from ..conditions.class_label import ClassLabelConfig
from ..methods.base import SamplingConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.crystal import CrystalConfig, CrystalData
from ..modalities.joint import JointConfig, JointData
from ..modalities.molecule import MoleculeConfig, MoleculeData
from ..training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig


def joint_unite_s() -> RunConfig:
    """UNITE-S on QM9 and MP20 together, conditioned on the kind; needs data.parts.*.path.

    Nobody has published UNITE's numbers for it; ADiT's joint model is its model. Sample one kind with labels, with and
    without guidance (1 to 4).
    """
    return RunConfig(
        modality=JointConfig(max_atoms=29, parts=(MoleculeConfig(max_atoms=29), CrystalConfig(max_atoms=20))),
        conditions={"class_label": ClassLabelConfig()},
        method=UNITEConfig(
            latent_channels=16,
            generative_encoder=GenerativeEncoderConfig(width=384, depth=12, heads=6, in_context_tokens=0),
            decoder=DecoderConfig(width=384, depth=12, heads=6, mlp_width=1536),
            reconstruction_noise=0.1,
            flow_draws=3,
            time_shift=1.0,
        ),
        sampling=SamplingConfig(solver="heun", num_inference_steps=50, time_shift=1.0, guidance_scale=2.0),
        data=JointData(parts={"molecule": MoleculeData(), "crystal": CrystalData()}),
        training=TrainingConfig(
            epochs=8000,
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


PRESETS: dict[str, Callable[[], RunConfig]] = {"joint-unite-s": joint_unite_s}
