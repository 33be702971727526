"""unilatent encode"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import Outputs, refuse_overlap
from ..plain_text import count_of
from .command import Record, examples
from .options import BatchSize, Device, Model, Precision, Seed
from .running import (
    RESUMES,
    LeftOut,
    data_of,
    join_processes,
    known_splits,
    leave_stopped,
    load,
    precision_of,
    print_notes,
    progress,
    progress_of,
)

if TYPE_CHECKING:
    from ..methods.base import LatentModel


@examples(
    "unilatent encode runs/digits my_images --out latents",
    "unilatent encode runs/digits --views 4 --out latents    # to train on",
)
def run(
    model: Model,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a zip archive or a single file; with --views, where the run's data are now, if they moved.",
            metavar="[INPUT]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards of latents.")] = Path("latents"),
    views: Annotated[
        int | None,
        typer.Option(
            help="Encode the run's training set to train on (training.latents): clean latents of so many augmented "
            "views of each sample, with their conditions.",
            min=1,
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples per shard.", min=1)] = 4096,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    workers: Annotated[int, typer.Option(help="With --views: processes that read data.", min=0)] = 0,
    device: Device = None,
    precision: Precision = "auto",
) -> Record | None:
    """Encode data to latents on disk.

    Writes sharded safetensors that carry the model's fingerprint: latents to decode, or with --views latents to train a
    generator on. Samples that cannot be read are left out, named and counted. After a stop, the same command resumes.
    """
    if views is not None:
        return _encode_views(model, source, out, views, shard_size, seed, batch_size, workers, device, precision)
    if source is None:
        raise ValueError("INPUT: missing; give a folder, archive or file, or --views to encode the run's training set")
    from ..latents import encode_to_shards, encoded_outputs
    from ..signals import Stopped, StopRequest

    path = Path(source)
    refuse_overlap(out, data_of(model))
    encoded_outputs(out, path)  # refuses a folder of others before the model is loaded
    network = load(model, device)
    print_notes(network.modality.notes(path))
    precision, encoded, left_out = precision_of(precision, network), 0, LeftOut()
    with progress_of() as advance, StopRequest() as stop:

        def after_batch(count: int, total: int | None) -> None:
            nonlocal encoded
            encoded += count
            advance("encoding", count, total or 0)
            stop.between_batches()

        try:
            count, skipped = encode_to_shards(
                network, path, out, seed=seed, batch_size=batch_size, shard_size=shard_size,
                precision=precision, progress=after_batch, skipped=left_out,
            )  # fmt: skip
        except Stopped:
            left_out.show()
            leave_stopped(stop, f"{count_of(encoded, 'latent is', 'latents are')} in {out}", RESUMES)
    left_out.show()
    already = f", {skipped} of them already encoded" if skipped else ""
    print(f"{count_of(count, 'latent')} in {out}{already}{left_out}")
    return {"out": out, "latents": count, "already": skipped, "left_out": left_out.reasons}


def _encode_views(
    model: str, data: str | None, out: Path, views: int, shard_size: int, seed: int, batch_size: int, workers: int,
    device: str | None, precision: str,
) -> Record | None:  # fmt: skip
    """Encode the training set of a run; several processes take the shards one by one."""
    from ..listings import Listings
    from ..signals import Stopped, StopRequest
    from ..stored_latents import encode_views, is_file_of_latents

    sources = [*data_of(model), *([data] if data else [])]
    outputs = Outputs(out, "encode --views", sources, keep=True, known=is_file_of_latents)
    processes = join_processes(device)
    network: LatentModel = load(model, device, processes)
    splits = known_splits(network.modality, model, data, "INPUT", Listings(processes))
    processes.on_main(outputs.begin)
    chosen, left_out, here = precision_of(precision, network, processes), LeftOut(), 0
    total, quiet = views * len(splits.train), not processes.is_main
    with progress("encoding", total, quiet) as advance, StopRequest() as stop:

        def after_batch(count: int) -> None:
            advance(count)
            stop.between_batches()

        stopped = False
        try:
            here = encode_views(
                network, splits.train, outputs.folder, views=views, seed=seed, batch_size=batch_size,
                shard_size=shard_size, precision=chosen, workers=workers, processes=processes,
                progress=after_batch, skipped=left_out,
            )  # fmt: skip
        except Stopped:
            stopped = True
        processes.meet()
        left_out.reasons = [reason for of_one in processes.gather(left_out.reasons) for reason in of_one]
        if processes.is_main:
            left_out.show()
        if processes.highest(stopped):
            leave_stopped(stop, f"the shards that are complete are in {out}", RESUMES, processes)
    already = f", {here:,} of them already encoded" if here else ""
    total = views * len(splits.train)
    record = {"out": out, "latents": total, "views": views, "already": here, "left_out": left_out.reasons}
    if processes.is_main:
        size = f"{count_of(len(splits.train), 'sample')} in {count_of(views, 'view')}"
        print(f"{count_of(total, 'latent')} of {size} in {out}{already}{left_out}")
        print(f"to train on them: training.latents={out}")
    main = processes.is_main
    processes.leave()
    return record if main else None
