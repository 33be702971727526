"""unilatent encode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Model, Precision, Seed, autocast, leave_stopped, load, make_folder, progress


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

    Sharded safetensors that carry the model's fingerprint; stopped, the same line goes on.
    """
    from ..latents import encode_to_shards
    from ..training.signals import StopAsked, StopRequest

    network = load(model, device)
    seen = 0
    with progress("encoding", None) as advance, autocast(network.device, precision), StopRequest() as stop:

        def after_batch(count: int) -> None:
            nonlocal seen
            seen += count
            advance(count)
            stop.between_batches()

        try:
            count, skipped = encode_to_shards(
                network, source, lambda: make_folder(out), seed=seed, batch_size=batch_size, shard_size=shard_size,
                precision=precision, progress=after_batch,
            )  # fmt: skip
        except StopAsked:
            leave_stopped(f"{seen} latents are in {out}", "the same command goes on from there")
    already = f", {skipped} of them from before" if skipped else ""
    print(f"{count} latents in {out}{already}")
