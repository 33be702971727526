"""unilatent reconstruct"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_json
from ..outputs import Outputs
from ..plain_text import count_of
from .command import Record, examples
from .options import (
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Input,
    Model,
    Precision,
    Seed,
    check_decoder_settings,
    sampling_settings,
)
from .running import (
    STARTS_AGAIN,
    LeftOut,
    data_of,
    disk_space,
    leave_stopped,
    load,
    precision_of,
    print_notes,
    progress,
)

SHOWN = 8
"""Pairs in side_by_side.png."""


@examples(
    "unilatent reconstruct runs/digits my_images --out reconstructions",
    "unilatent reconstruct runs/digits photo.png --json          # its PSNR",
)
def run(
    model: Model,
    source: Input,
    out: Annotated[Path, typer.Option(help="Folder for reconstructions, side_by_side.png and metrics.json.")] = Path(
        "reconstructions"
    ),
    num: Annotated[int | None, typer.Option(help="How many samples, from the first on [default: all].", min=1)] = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precision = "auto",
) -> Record:
    """Encode and decode your own data.

    Also measures the reconstruction error of each sample. Samples that cannot be read are left out, named and counted.
    """
    from ..modalities.base import CountedBatches
    from ..sampling import reconstruct, split_settings
    from ..signals import StopRequest
    from ..types import take

    outputs = Outputs(out, "reconstruct", [source, *data_of(model)])
    network = load(model, device)
    settings = sampling_settings(decoder_solver=decoder_solver, decoder_steps=decoder_steps)
    check_decoder_settings(network, settings)
    sampling, _ = split_settings(network.config.sampling, settings)
    left_out = LeftOut()
    batches = network.modality.read(source, batch_size, left_out)
    print_notes(network.modality.notes(source))
    precision = precision_of(precision, network)
    files: list[dict[str, Any]] = []
    shown: list[Any] = []
    seconds = 0.0
    folder = None
    total = CountedBatches.total_of(batches)
    with progress("reconstructing", total if num is None else min(num, total or num)) as advance, StopRequest() as stop:
        for data, names in batches:
            if num is not None:
                data, names = take(data, slice(num - len(files))), names[: num - len(files)]
            started = time.perf_counter()
            output = reconstruct(
                network, data, seed=seed, batch_size=batch_size, start=len(files), precision=precision, **settings
            )  # fmt: skip
            seconds += time.perf_counter() - started
            folder = folder or outputs.begin()
            if not shown:
                shown = [take(data, slice(SHOWN)), take(output, slice(SHOWN))]
            errors = network.modality.errors(output, data)
            with outputs.writing(disk_space(network.modality.arrays(output), len(names))) as new:
                written = network.modality.write(output, new, start=len(files))
                paths = [path.relative_to(new).as_posix() for path in written]
            for i, (name, path) in enumerate(zip(names, paths, strict=True)):
                files.append(
                    {
                        "input": name,
                        "output": path,
                        **{key: values[i] for key, values in errors.items()},
                    }
                )
            advance(len(names))
            if (num is not None and len(files) >= num) or stop.received is not None:
                break
        if folder is None:
            raise left_out.none_left(source, "reconstruct")
        keys = [key for key in files[0] if key not in ("input", "output")]
        means = {key: sum(file[key] for file in files) / len(files) for key in keys}
        speed = {"samples_per_second": len(files) / seconds}
        has_steps = network.stepped_decoder is not None
        decoding = {key: getattr(sampling, key) for key in settings} if has_steps else {}
        record = {"model": model, "num": len(files), "left_out": left_out.reasons, "seed": seed, "precision": precision,
                  **decoding, "mean": means, **speed, "files": files}  # fmt: skip
        with outputs.writing(disk_space(network.modality.arrays(shown[0]), SHOWN)) as new:
            network.modality.draw_grid(shown, new / "side_by_side.png")
            write_json(new / "metrics.json", record)
    left_out.show()
    if stop.received is not None and len(files) != num:
        leave_stopped(
            stop, f"{count_of(len(files), 'reconstruction is', 'reconstructions are')} in {folder}", STARTS_AGAIN
        )
    summary = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
    print(
        f"{count_of(len(files), 'reconstruction')} in {folder}: mean {summary}; "
        f"{speed['samples_per_second']:.3g} per second{left_out}"
    )
    return {"out": folder, **record}
