"""unilatent encode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import refuse_overlap
from ..plain_text import count_of
from .options import BatchSize, Device, Input, Model, Precision, Seed
from .running import RESUMES, LeftOut, data_of, leave_stopped, load, precision_of, print_notes, progress


def run(
    model: Model,
    source: Input,
    out: Annotated[Path, typer.Option(help="Folder for the shards of latents.")] = Path("latents"),
    shard_size: Annotated[int, typer.Option(help="Samples per shard.", min=1)] = 4096,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Encode data to latents on disk.

    Writes sharded safetensors that carry the model's fingerprint. Samples that cannot be read are left out, named and
    counted. After a stop, the same command resumes.
    """
    from ..latents import encode_to_shards, encoded_outputs
    from ..signals import Stopped, StopRequest

    refuse_overlap(out, data_of(model))
    encoded_outputs(out, source)  # refuses a folder of others before the model is loaded
    network = load(model, device)
    print_notes(network.modality.notes(source))
    precision, encoded, left_out = precision_of(precision, network), 0, LeftOut()
    with progress("encoding", None) as advance, StopRequest() as stop:

        def after_batch(count: int) -> None:
            nonlocal encoded
            encoded += count
            advance(count)
            stop.between_batches()

        try:
            count, skipped = encode_to_shards(
                network, source, out, seed=seed, batch_size=batch_size, shard_size=shard_size,
                precision=precision, progress=after_batch, skipped=left_out,
            )  # fmt: skip
        except Stopped:
            left_out.show()
            leave_stopped(stop, f"{count_of(encoded, 'latent is', 'latents are')} in {out}", RESUMES)
    left_out.show()
    already = f", {skipped} of them already encoded" if skipped else ""
    print(f"{count_of(count, 'latent')} in {out}{already}{left_out}")
