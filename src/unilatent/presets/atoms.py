"""Runs on molecules, crystals and both. Published numbers, with the settings that they belong to, are in PRESETS."""

from __future__ import annotations

from ..conditions.class_label import ClassLabelConfig
from ..config import Config
from ..methods.latent_diffusion import LatentDiffusionConfig
from ..methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.crystal import CrystalConfig, CrystalData
from ..modalities.joint import JointConfig, JointData
from ..modalities.molecule import MoleculeConfig, MoleculeData
from ..model_config import SamplingConfig
from ..nets.backbones import ViTConfig
from ..training.config import Decay, Onset, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig
from ._shared import PresetEntry, Published, decaying, second_stage, small_unite

UNITE_S = UNITEConfig(
    latent_channels=16,
    generative_encoder=GenerativeEncoderConfig(width=384, depth=12, heads=6, in_context_tokens=0, time_frequencies=128),
    decoder=DecoderConfig(width=384, depth=12, heads=6, mlp_width=1536),
    reconstruction_noise=0.1,
    time_shift=1.0,
)
"""The paper's 16 latent channels are read as 16 per atom; it gives neither the decoder's noise nor the warm-up below.

Its 54.35 M parameters include all inputs of a crystal's atom. For molecules alone, 0.30 M of them (fractional
coordinates and cells) would be unused and are left out.
"""
TO_ZERO = SamplingConfig(denoise_to_zero=True)
"""The clamped velocity of UNITE leaves 2.4 % of noise in 50 steps of Heun's method, which coordinates would show."""
ANCESTRAL = SamplingConfig(solver="ancestral", num_inference_steps=100, denoise_to_zero=True)
"""Noise that is drawn anew in each step corrects what a generator of few steps got wrong in the steps before."""
KINDS = (MoleculeConfig(max_atoms=29), CrystalConfig(max_atoms=20))


def small(
    modality: Config, data: Config, steps: int = 2000, batch_size: int = 32, learning_rate: float = 1e-3
) -> RunConfig:
    """Half an hour on a CPU core at most. The learning rate decays over the last third."""
    decay = 50 * round(steps * 0.65 / 50)
    return RunConfig(
        modality=modality,
        sampling=TO_ZERO,
        method=small_unite(
            width=128,
            depth=4,
            decoder_depth=4,
            in_context_tokens=0,
            local_start=True,
            flow_weight=0.5,
            reconstruction_noise=0.1,
            flow_draws=4,
            time_shift=1.0,
        ),
        data=data,
        training=TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            threads=2,
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            schedule=decaying(decay, steps, factor=0.03, onsets={"flow": Onset(start=100, end=200)}),
            ema_decay=0.99,
            num_samples=20,
            evaluate_samples=200,
        ),
    )


def published(modality: Config, data: Config, epochs: int) -> RunConfig:
    """UNITE-S with the paper's optimiser, batch size and length."""
    return RunConfig(
        modality=modality,
        sampling=TO_ZERO,
        method=UNITE_S,
        data=data,
        training=TrainingConfig(
            epochs=epochs,
            batch_size=512,
            optimizer=OptimizerConfig(learning_rate=1e-4, muon=False),
            schedule=ScheduleConfig(warmup=1000),
            ema_decay=0.9999,
            log_every=100,
            sample_every=10_000,
            checkpoint_every=5_000,
            workers=4,
        ),
    )


def of_both(run: RunConfig) -> RunConfig:
    """The run conditioned on the kind of system: molecule or crystal."""
    sampling = run.sampling.model_copy(update={"guidance_scale": 2.0})
    return run.model_copy(update={"conditions": {"class_label": ClassLabelConfig()}, "sampling": sampling})


def molecules() -> RunConfig:
    """UNITE on conformers of about a hundred molecules of at most four heavy atoms, by RDKit; for two CPU cores.

    Expected: docs/results/atoms.md.
    """
    modality = MoleculeConfig(max_atoms=14, elements="found", frame="first")
    run = small(modality, MoleculeData(path="small-molecules", num=4000), steps=2300, learning_rate=2e-3)
    return run.model_copy(update={"sampling": ANCESTRAL})


def molecules_qm9_like() -> RunConfig:
    """UNITE on QM9-like molecules generated with RDKit; for two CPU cores.

    New molecules are fragments after these minutes. Expected of real molecules: docs/results/atoms.md.
    """
    return small(MoleculeConfig(max_atoms=29, elements="found"), MoleculeData(path="qm9-like", num=4000))


def molecules_two_stage() -> RunConfig:
    """UNITE on QM9-like molecules generated with RDKit, then a generator on its frozen latents; for two CPU cores.

    Expected of real molecules (QM7): docs/results/atoms.md. The second stage sees many more molecules in the same time.
    """
    first = small(
        MoleculeConfig(max_atoms=29, elements="found", frame="first"), MoleculeData(path="qm9-like", num=4000)
    )
    schedule = decaying(550, 900, factor=0.03, onsets={"flow": Onset(start=100, end=200)})
    training = first.training.model_copy(update={"steps": 900, "schedule": schedule, "evaluate_samples": 0})
    method = first.method.model_copy(update={"flow_draws": 2})
    run = second_stage(
        first.model_copy(update={"method": method, "training": training}),
        {},
        LatentDiffusionConfig(base=ViTConfig(width=160, depth=6, heads=4), bias=0.0),
        steps=6000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1.5e-3),
        gradient_clip=1.0,
        schedule=decaying(3500, 6000, factor=0.03),
        ema_decay=0.998,
        sample_every=3000,
        checkpoint_every=1500,
        evaluate_samples=200,
    )
    return run.model_copy(update={"sampling": ANCESTRAL})


def crystals() -> RunConfig:
    """UNITE on crystals of at most five atoms a cell, generated from 25 structure types; for two CPU cores.

    Expected: docs/results/atoms.md.
    """
    data = CrystalData(path="small-prototypes", num=2750)
    return small(CrystalConfig(max_atoms=5, elements="found", origin="rarest"), data, steps=3000, batch_size=64)


def crystals_prototypes() -> RunConfig:
    """UNITE on crystals of up to 20 atoms a cell, generated from 36 structure types; for two CPU cores.

    New cells of more than five atoms are seldom of a known type after these minutes. Expected of real crystals:
    docs/results/atoms.md.
    """
    return small(
        CrystalConfig(max_atoms=20, elements="found", origin="rarest"), CrystalData(path="prototypes", num=4000)
    )


def joint() -> RunConfig:
    """UNITE on generated molecules and crystals together, conditioned on the kind; for two CPU cores."""
    data = JointData(
        parts={
            "molecule": MoleculeData(path="qm9-like", num=4000), "crystal": CrystalData(path="prototypes", num=4000)
        }
    )  # fmt: skip
    return of_both(small(JointConfig(max_atoms=29, parts=KINDS), data))


def qm9_unite_s() -> RunConfig:
    """UNITE-S on QM9 as in its paper: 8,000 epochs; needs data.path, a folder with gdb9.sdf.

    Published numbers: QM9 below.
    """
    return published(MoleculeConfig(max_atoms=29), MoleculeData(), 8_000)


def qm9_unite_s_1h() -> RunConfig:
    """UNITE-S on QM9 in an hour of one H100: `qm9-unite-s` with 78,000 steps in place of 1,562,500; needs data.path.

    That is 399 epochs of 100,000 molecules. The learning rate, which the paper leaves constant, falls over the last
    18,000 steps to a hundredth; all else is that of `qm9-unite-s`. `unilatent plan` counts 53 minutes for the steps,
    and the rest is for samples, checkpoints and the evaluation. Not measured on a GPU, and no number is published for
    it.
    """
    run = qm9_unite_s()
    shortened = {
        "epochs": None, "steps": 78_000,
        "schedule": ScheduleConfig(warmup=1000, decays=(Decay(start=60_000, end=78_000, factor=0.01),)),
    }  # fmt: skip
    return run.model_copy(update={"training": TrainingConfig(**{**dict(run.training), **shortened})})


def mp20_unite_s() -> RunConfig:
    """UNITE-S on MP20 as in its paper: 10,000 epochs; needs data.path, a folder with train.csv, val.csv and test.csv.

    Published numbers: MP20 below.
    """
    return published(CrystalConfig(max_atoms=20), CrystalData(), 10_000)


def joint_unite_s() -> RunConfig:
    """UNITE-S on QM9 and MP20 together, conditioned on the kind; needs data.parts.*.path.

    There is no published number of UNITE; the run follows ADiT's joint model. Sample one kind with labels, with and
    without guidance (scale 1 to 4).
    """
    data = JointData(parts={"molecule": MoleculeData(), "crystal": CrystalData()})
    return of_both(published(JointConfig(max_atoms=29, parts=KINDS), data, 8_000))


QM9 = Published(
    {"valid in %": 94.90, "unique in %": 99.71, "match rate in %": 99.37, "RMSD in Angstrom": 0.039},
    ("training.epochs=8000", "training.batch_size=512", "training.optimizer.learning_rate=1e-4",
     "training.optimizer.muon=false"),
    "arXiv 2603.22283, Table 3, protocol of Open Babel, 10,000 new molecules",
    "noise of the decoder, warm-up",
)  # fmt: skip
MP20 = Published(
    {"structure valid in %": 99.0, "composition valid in %": 89.9, "both in %": 87.9, "match rate in %": 75.7},
    ("training.epochs=10000", "training.batch_size=512", "training.optimizer.learning_rate=1e-4",
     "training.optimizer.muon=false"),
    "arXiv 2603.22283, 10,000 new crystals",
    "noise of the decoder, warm-up",
)  # fmt: skip

PRESETS: dict[str, PresetEntry] = {
    "molecules": PresetEntry(molecules, data="synthetic small molecules"),
    "molecules-qm9-like": PresetEntry(molecules_qm9_like, data="synthetic molecules"),
    "molecules-two-stage": PresetEntry(molecules_two_stage, data="synthetic molecules"),
    "crystals": PresetEntry(crystals, data="synthetic crystals"),
    "crystals-prototypes": PresetEntry(crystals_prototypes, data="synthetic crystals"),
    "joint": PresetEntry(joint, data="synthetic molecules and crystals"),
    "qm9-unite-s": PresetEntry(qm9_unite_s, (QM9,), gpus=1, data="QM9", samples=100_000),
    "qm9-unite-s-1h": PresetEntry(qm9_unite_s_1h, gpus=1, data="QM9", samples=100_000),
    "mp20-unite-s": PresetEntry(mp20_unite_s, (MP20,), gpus=1, data="MP20", samples=27_136),
    "joint-unite-s": PresetEntry(joint_unite_s, gpus=1, data="QM9 and MP20", samples=127_136),
}
