"""unilatent finetune-decoder"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import refuse_overlap
from .command import Record, examples
from .options import Data, Model, OwnSettings
from .running import data_of, find_run_folder, known_splits, leave_stopped, packaged_run


@examples("unilatent finetune-decoder runs/mine steps=2000 --out runs/mine-sharp")
def run(
    model: Model,
    overrides: OwnSettings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sharpened model [default: RUN-sharpened].")] = None,
    data: Data = None,
) -> Record:
    """Sharpen the decoder of a finished model.

    With an adversary, whose network starts from the model's own encoder; latents stay the same, bit for bit. Settings
    are KEY=VALUE: steps, batch_size, seed, learning_rate, discriminator_learning_rate, muon, adversarial_weight,
    start, r1_weight, r1_every, ema_decay, precision, workers, threads, device, log_every, sample_every,
    checkpoint_every, keep_checkpoints. After a stop, the same command goes on.
    """
    from ..model_folder import find_model_folder, read_config
    from ..registry import find
    from ..training.decoder_gan import DecoderGAN, DecoderGANConfig

    for text in overrides or []:
        if text.startswith("training."):
            raise ValueError(f"{text}: these settings have no section; write {text.removeprefix('training.')}")
    config = DecoderGANConfig().override(*(overrides or []))
    source = Path(model)
    folder = out or source.with_name(f"{source.resolve().name}-sharpened")
    refuse_overlap(folder, [*data_of(model), *([data] if data else [])])
    run_folder = find_run_folder(model)
    settings_of = read_config(find_model_folder(model, "MODEL")).modality
    modality = find("modalities", settings_of.name)(settings_of)
    splits = known_splits(modality, model, data)
    own_run = packaged_run(model) if run_folder is None and data is None else None
    settings = None if own_run is None else own_run.to_yaml()
    if run_folder is not None:
        settings = (run_folder / "config.yaml").read_text(encoding="utf-8")
    tuning = DecoderGAN(source, folder, config, splits, settings)
    finished = tuning.fit()
    if finished == folder:
        done = f"step {tuning.step} of {config.steps} is saved in {folder}"
        leave_stopped(tuning.stop, done, "the same command goes on")
    print(f"written: {finished}; compare with `unilatent evaluate {model}` and `unilatent evaluate {folder}`")
    return {"out": folder, "model": finished, "steps": tuning.step, "fingerprint": tuning.model.fingerprint()}
