"""unilatent reference"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..outputs import single_file
from ..plain_text import count_of
from .command import Record, examples
from .options import BatchSize, Device, InceptionWeights
from .running import for_evaluation, leave_stopped, print_notes, progress_of

STATISTICS = 50 * 2**20
"""Bytes of the statistics, about."""


@examples("unilatent reference my_images --size 256 --out my_images_256.npz")
def run(
    source: Annotated[str, typer.Argument(help="The data, as for data.path: a folder, zip, .npz or shards.")],
    size: Annotated[str, typer.Option(help="Size that samples are brought to, as for training: 256, or 256x128x3.")],
    out: Annotated[Path, typer.Option(help="The .npz to write: mu, sigma, mu_s, sigma_s, provenance.")],
    inception_weights: InceptionWeights = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> Record:
    """Compute Inception statistics of a data set for FID.

    They are a --reference for `unilatent evaluate`.
    """
    from ..devices import pick_device
    from ..evaluation.evaluate import Interrupted
    from ..evaluation.reference import modality_of_size, write_reference
    from ..signals import StopRequest

    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: ends in {out.suffix or 'nothing'}; name a .npz file")
    modality = for_evaluation(modality_of_size(size), {"inception_weights": inception_weights})
    print_notes(modality.notes(Path(source)) if Path(source).expanduser().exists() else ())
    outputs, chosen = single_file(out, "reference", [source]), pick_device(device, "--device")
    with progress_of() as progress, StopRequest() as stop:
        try:
            with ExitStack() as stack:
                count = write_reference(
                    lambda: stack.enter_context(outputs.writing(STATISTICS)) / out.name, modality, source, batch_size,
                    chosen, lambda more, all: progress(source, more, all), lambda: stop.received is not None,
                )  # fmt: skip
        except Interrupted:
            leave_stopped(stop, "nothing is written", "the same command starts again")
    print(f"statistics of {count_of(count, 'sample')}: {out}")
    return {"out": out, "samples": count}
