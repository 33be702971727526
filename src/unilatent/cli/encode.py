"""unilatent encode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Model, Precision, Seed, autocast, load, make_folder, progress


def run(
    model: Model,
    source: Annotated[Path, typer.Argument(help="A folder, a zip archive or one file.", metavar="INPUT")],
    out: Annotated[Path, typer.Option(help="Folder for the shards of latents.")] = Path("latents"),
    shard_size: Annotated[int, typer.Option(help="Latents a shard.", min=1)] = 4096,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Data to latents on disk.

    Sharded safetensors that carry the model's fingerprint; run again to resume.
    """
    from ..latents import encode_to_shards

    network = load(model, device)
    with progress("encoding", None) as advance, autocast(network.device, precision):
        count, skipped = encode_to_shards(
            network, source, lambda: make_folder(out), seed=seed, batch_size=batch_size, shard_size=shard_size,
            precision=precision, progress=advance,
        )  # fmt: skip
    already = f", {skipped} of them from before" if skipped else ""
    print(f"{count} latents in {out}{already}")
