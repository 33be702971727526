"""unilatent decode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import Outputs
from ..plain_text import count_of
from .command import Record, examples
from .options import (
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Model,
    Precision,
    check_decoder_settings,
    sampling_settings,
)
from .running import STARTS_AGAIN, data_of, disk_space, leave_stopped, load, precision_of, progress


@examples("unilatent decode runs/digits latents --out decoded")
def run(
    model: Model,
    source: Annotated[Path, typer.Argument(help="A folder written by `unilatent encode`.", metavar="LATENTS")],
    out: Annotated[Path, typer.Option(help="Folder for the decoded samples, one file each.")] = Path("decoded"),
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
) -> Record:
    """Decode latents from disk to data."""
    from ..latents import count_latents, decode_shards
    from ..sampling import split_settings
    from ..signals import StopRequest
    from ..types import count as count_rows

    outputs = Outputs(out, "decode", [source, *data_of(model)])
    network = load(model, device)
    settings = sampling_settings(decoder_solver=decoder_solver, decoder_steps=decoder_steps)
    check_decoder_settings(network, settings)
    sampling, _ = split_settings(network.config.sampling, settings)
    precision = precision_of(precision, network)
    count, folder = 0, None
    with progress("decoding", count_latents(source)) as advance, StopRequest() as stop:
        for data in decode_shards(network, source, batch_size, sampling, precision):
            folder = folder or outputs.begin()
            with outputs.writing(disk_space(network.modality.arrays(data), count_rows(data))) as new:
                written = network.modality.write(data, new, start=count)
            count += len(written)
            advance(len(written))
            if stop.received is not None:
                leave_stopped(stop, f"{count_of(count, 'sample is', 'samples are')} in {out}", STARTS_AGAIN)
    print(f"{count_of(count, 'sample')} in {out}")
    return {"out": out, "samples": count}
