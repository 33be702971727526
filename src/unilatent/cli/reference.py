"""unilatent reference"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, make_folder, progress_of


def run(
    source: Annotated[str, typer.Argument(help="What data.path takes: a folder, zip, .npz or shards.")],
    size: Annotated[str, typer.Option(help="What samples are brought to, as for training: 256, or 256x128x3.")],
    out: Annotated[Path, typer.Option(help="The .npz to write: mu, sigma, mu_s, sigma_s, provenance.")],
    inception_weights: Annotated[
        str | None, typer.Option(help="A local file with the FID Inception network; default: downloaded once.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Inception statistics of a whole data set, for evaluate --reference."""
    from ..devices import pick_device
    from ..evaluation.evaluate import Interrupted
    from ..evaluation.reference import modality_of_size, write_reference
    from ..training.signals import StopRequest
    from .evaluate import with_weights
    from .options import STOPPED

    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: ends in {out.suffix or 'nothing'}; name a .npz file")
    modality = with_weights(modality_of_size(size), {"inception_weights": inception_weights})
    with progress_of() as progress, StopRequest() as stop:
        try:
            count = write_reference(
                out, modality, source, batch_size, pick_device(device), lambda more, all: progress(source, more, all),
                lambda: stop.received is not None, before=lambda: make_folder(out.parent),
            )  # fmt: skip
        except Interrupted:
            print("stopped: nothing is written", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
    print(f"statistics of {count:,} samples: {out}")
