"""unilatent reconstruct"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    AGAIN,
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Model,
    Precision,
    Seed,
    autocast,
    clear_numbered,
    decoder_settings,
    leave_stopped,
    load,
    make_folder,
    progress,
)

SHOWN = 8
"""Pairs in side_by_side.png."""


def run(
    model: Model,
    source: Annotated[Path, typer.Argument(help="A folder, a zip archive or one file.", metavar="INPUT")],
    out: Annotated[Path, typer.Option(help="Folder for reconstructions, side_by_side.png and metrics.json.")] = Path(
        "reconstructions"
    ),
    num: Annotated[int | None, typer.Option(help="Only the first so many.", min=1)] = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Encode and decode your own data.

    Says how far the result is from it.
    """
    from ..sampling import reconstruct, split_settings
    from ..training.signals import StopRequest
    from ..types import take

    network = load(model, device)
    decoding = decoder_settings(network, decoder_solver, decoder_steps)
    chosen, _ = split_settings(network.config.sampling, decoding)
    batches = network.modality.read(source, batch_size)
    files: list[dict[str, Any]] = []
    shown: list[Any] = []
    seconds = 0.0
    folder = None
    with progress("reconstructing", num) as advance, StopRequest() as stop:
        for data, names in batches:
            data, names = (
                (data, names) if num is None else (take(data, slice(num - len(files))), names[: num - len(files)])
            )
            started = time.perf_counter()
            with autocast(network.device, precision):
                made = reconstruct(network, data, seed=seed, batch_size=batch_size, start=len(files), **decoding)
            seconds += time.perf_counter() - started
            folder = folder or clear_numbered(make_folder(out), network.modality.subfolders)
            if not shown:
                shown = [take(data, slice(SHOWN)), take(made, slice(SHOWN))]
            paths = network.modality.write(made, folder, start=len(files))
            errors = network.modality.errors(made, data)
            for i, (name, path) in enumerate(zip(names, paths, strict=True)):
                files.append(
                    {
                        "input": name,
                        "output": path.relative_to(folder).as_posix(),
                        **{key: row[i] for key, row in errors.items()},
                    }
                )
            advance(len(names))
            if (num is not None and len(files) >= num) or stop.received is not None:
                break
    if folder is None:
        raise ValueError(f"{source}: nothing to reconstruct in it")
    network.modality.draw_grid(shown, folder / "side_by_side.png")
    keys = [key for key in files[0] if key not in ("input", "output")]
    means = {key: sum(f[key] for f in files) / len(files) for key in keys}
    speed = {"samples_per_second": len(files) / seconds}
    steps = network.stepped_decoder is not None
    own = {"decoder_solver": chosen.decoder_solver, "decoder_steps": chosen.decoder_steps} if steps else {}
    record = {"model": model, "num": len(files), "seed": seed, **own, "mean": means, **speed, "files": files}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    if stop.received is not None and len(files) != num:
        leave_stopped(f"{len(files)} reconstructions are in {folder}", AGAIN)
    summary = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
    print(f"{len(files)} reconstructions in {folder}: mean {summary}; {speed['samples_per_second']:.3g} a second")
