"""unilatent decode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Model, Precision, autocast, clear_numbered, load, make_folder, progress


def run(
    model: Model,
    source: Annotated[Path, typer.Argument(help="A folder written by `unilatent encode`.", metavar="LATENTS")],
    out: Annotated[Path, typer.Option(help="Folder for one file a sample.")] = Path("decoded"),
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Latents back to data."""
    from ..latents import decode_shards

    network = load(model, device)
    count, folder = 0, None
    with progress("decoding", None) as advance, autocast(network.device, precision):
        for data in decode_shards(network, source, batch_size):
            folder = folder or clear_numbered(make_folder(out))
            written = network.modality.write(data, folder, start=count)
            count += len(written)
            advance(len(written))
    print(f"{count} samples in {out}")
