"""unilatent sample"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..maths.solvers import SOLVERS
from .options import (
    AGAIN,
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    Device,
    Model,
    Precision,
    Prompt,
    Prompts,
    Seed,
    autocast,
    clear_numbered,
    decoder_settings,
    leave_stopped,
    load,
    make_folder,
    progress,
    texts_of,
)

GRID = 100
"""At most so many samples are drawn into grid.png."""


def run(
    model: Model,
    num: Annotated[
        int | None, typer.Option(help="How many samples [default: 16; one of each where several prompts are given].")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", "--label", help="3, 0-9, 2,5 or names; cycled. Default: all in turn.")
    ] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="A text that guidance leads away from [default: no text].")
    ] = None,
    property: Annotated[
        str | None,
        typer.Option("--property", help="A number to ask for: 5.2, 4.0-6.0 (ten of them), 4,5.5; cycled."),
    ] = None,
    num_atoms: Annotated[
        str | None, typer.Option(help="Of systems of atoms: 12, 8-12 or 8,12; cycled [default: as training has them].")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="0 unconditional, 1 conditional, above 1 guided.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Guide only where LOW < t < HIGH; t = 1 is noise, 0 is clean (UNITE's paper counts the other way: "
            "its [0.1, 1] is 0 0.9).",
        ),
    ] = None,
    guidance_norm: Annotated[str | None, typer.Option(help="norm_first or guidance_first.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "fp32",
    out: Annotated[
        Path, typer.Option(help="Folder for grid.png, one file a sample, samples.npz and sampling.json.")
    ] = Path("samples"),
) -> None:
    """Draw new samples.

    What is not given is the model's own setting.
    """
    from ..sampling import sample_batches, split_settings
    from ..training.signals import StopRequest
    from ..types import join, take

    network = load(model, device)
    settings: dict[str, Any] = {
        "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_norm": guidance_norm,
        "num_inference_steps": steps, "solver": solver, **decoder_settings(network, decoder_solver, decoder_steps),
    }  # fmt: skip
    chosen, _ = split_settings(network.config.sampling, settings)
    texts = texts_of(prompt, prompts)
    given = {
        "labels": labels, "prompts": texts, "negative_prompts": negative_prompt, "properties": property,
        "num_atoms": num_atoms,
    }  # fmt: skip
    settings |= given
    if num_atoms is not None and "num_atoms" not in network.modality.layout_arguments:
        raise ValueError("--num-atoms: samples of this model have no number of atoms; leave it out")
    num = (len(texts) if texts and len(texts) > 1 else 16) if num is None else num
    with progress("sampling", num) as advance, autocast(network.device, precision), StopRequest() as stop:
        batches = sample_batches(network, num, seed=seed, batch_size=batch_size, progress=advance, **settings)
        first = next(batches)
        folder = make_folder(out)
        clear_numbered(folder, network.modality.subfolders)
        shown, asked, made = [], [], 0
        with NpzWriter(folder / "samples.npz") as arrays:
            for part in _chain(first, batches):
                network.modality.write(part.data, folder, start=part.start)
                values = {key: value.numpy() for key, value in part.values.items()}
                arrays.add({**network.modality.arrays(part.data), **values})
                if part.start < GRID:
                    shown.append(take(part.data, slice(GRID - part.start)))
                    asked.append(take(part.values, slice(GRID - part.start)))
                made += part.count
                if stop.received is not None:
                    break
    conditions = network.conditions
    captions = conditions.grid_captions(join(asked)) if asked[0] else None
    grid = folder / "grid.png"
    network.modality.draw_grid([network.modality.join(shown)], grid, columns=conditions.columns, captions=captions)
    record = {"model": model, "fingerprint": network.fingerprint(), "num": num, "made": made, "seed": seed,
              **given, "precision": precision, **chosen.plain()}  # fmt: skip
    (folder / "sampling.json").write_text(json.dumps(record, indent=2) + "\n")
    if made < num:
        leave_stopped(f"{made} of {num} samples are in {folder}", AGAIN)
    print(f"{num} samples in {folder}: grid.png, samples.npz and one file a sample")


def _chain(first: Any, rest: Any) -> Any:
    yield first
    yield from rest


class NpzWriter:
    """An uncompressed .npz that grows array by array on disk; memory holds one batch. Appears whole or not at all."""

    def __init__(self, path: Path):
        self.path = path
        self.parts: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype] = {}

    def __enter__(self) -> NpzWriter:
        return self

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Append rows to each array."""
        for name, rows in arrays.items():
            part = self.parts.setdefault(name, self.path.with_name(f".{self.path.name}.{name}"))
            start = self.shapes[name][0] if name in self.shapes else 0
            with part.open("ab" if start else "wb") as file:
                file.write(np.ascontiguousarray(rows).tobytes())
            self.shapes[name], self.types[name] = (start + len(rows), *rows.shape[1:]), rows.dtype

    def __exit__(self, kind: object, *exception: object) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        if kind is None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, part in self.parts.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as target, part.open("rb") as source:
                        header = {"descr": self.types[name].str, "fortran_order": False, "shape": self.shapes[name]}
                        np.lib.format.write_array_header_1_0(target, header)
                        while block := source.read(1 << 24):
                            target.write(block)
            temporary.replace(self.path)
        for part in self.parts.values():
            part.unlink(missing_ok=True)
