"""unilatent reference"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, InceptionWeights
from .running import leave_stopped, make_folder, progress_of, with_weights


def run(
    source: Annotated[str, typer.Argument(help="The data, as for data.path: a folder, zip, .npz or shards.")],
    size: Annotated[str, typer.Option(help="Size that samples are brought to, as for training: 256, or 256x128x3.")],
    out: Annotated[Path, typer.Option(help="The .npz to write: mu, sigma, mu_s, sigma_s, provenance.")],
    inception_weights: InceptionWeights = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Compute Inception statistics of a data set for FID.

    They are a --reference for `unilatent evaluate`.
    """
    from ..devices import pick_device
    from ..evaluation.evaluate import Interrupted
    from ..evaluation.reference import modality_of_size, write_reference
    from ..signals import StopRequest

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
            leave_stopped("nothing is written", "the same command starts again")
    print(f"statistics of {count:,} samples: {out}")
