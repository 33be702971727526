"""unilatent decode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    AGAIN,
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Model,
    Precision,
    autocast,
    clear_numbered,
    decoder_settings,
    leave_stopped,
    load,
    make_folder,
    progress,
)


def run(
    model: Model,
    source: Annotated[Path, typer.Argument(help="A folder written by `unilatent encode`.", metavar="LATENTS")],
    out: Annotated[Path, typer.Option(help="Folder for one file a sample.")] = Path("decoded"),
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Latents back to data."""
    from ..latents import decode_shards
    from ..sampling import split_settings
    from ..training.signals import StopRequest

    network = load(model, device)
    decoding = decoder_settings(network, decoder_solver, decoder_steps)
    chosen, _ = split_settings(network.config.sampling, decoding)
    count, folder = 0, None
    with progress("decoding", None) as advance, autocast(network.device, precision), StopRequest() as stop:
        for data in decode_shards(network, source, batch_size, chosen):
            folder = folder or clear_numbered(make_folder(out), network.modality.subfolders)
            written = network.modality.write(data, folder, start=count)
            count += len(written)
            advance(len(written))
            if stop.received is not None:
                leave_stopped(f"{count} samples are in {out}", AGAIN)
    print(f"{count} samples in {out}")
