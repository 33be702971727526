"""unilatent sample"""

from __future__ import annotations

import sys
import zipfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import write_json, write_text
from ..outputs import Outputs
from ..plain_text import count_of
from .command import Record, examples
from .options import (
    BatchSize,
    DecoderSolver,
    DecoderSteps,
    DenoiseToZero,
    Device,
    GuidanceInterval,
    GuidanceNorm,
    GuidanceScale,
    Labels,
    Model,
    NegativePrompt,
    NumAtoms,
    Precision,
    Prompt,
    Prompts,
    PropertyOption,
    RestartInterval,
    Restarts,
    Seed,
    SolverOption,
    Steps,
    check_decoder_settings,
    check_restarts,
    sampling_settings,
)
from .running import STARTS_AGAIN, data_of, disk_space, leave_stopped, load, precision_of, progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..methods.base import LatentModel
    from ..types import Given

NUM = 16
GRID = 100
"""At most so many samples are drawn into grid.png and samples.html."""
VIEWER = "samples.html"
"""Where samples can be turned, if they have three dimensions."""


@examples(
    "unilatent sample digits --labels 0-9 --num 100     # in the package",
    "unilatent sample runs/digits --label 3 --guidance-scale 2 --seed 1",
    'unilatent sample runs/scenes --prompt "a red circle left of a blue square"',
    "unilatent sample runs/molecules --num-atoms 8-12 --num 20 --out molecules",
    "unilatent sample runs/clips --given clip.mp4 --frames 4 --out continued",
)
def run(
    model: Model,
    num: Annotated[
        int | None, typer.Option(help=f"How many samples [default: {NUM}; one for each of several prompts].")
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    negative_prompt: NegativePrompt = None,
    property: PropertyOption = None,
    num_atoms: NumAtoms = None,
    given: Annotated[
        Path | None, typer.Option(help="An image or video of which a part is given; the model makes the rest.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of --given that are given [default: 1].", min=1)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="An image that is white where the model is to paint, of the size of --given.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Frames of longer clips: windows that each continue the last --frames of the one before."),
    ] = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_norm: GuidanceNorm = None,
    steps: Steps = None,
    solver: SolverOption = None,
    restarts: Restarts = None,
    restart_interval: RestartInterval = None,
    denoise_to_zero: DenoiseToZero = None,
    decoder_solver: DecoderSolver = None,
    decoder_steps: DecoderSteps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    precision: Precision = "auto",
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for grid.png, samples.npz, sampling.json and one file per sample; for molecules and crystals "
            "also samples.html, where they can be turned."
        ),
    ] = Path("samples"),
) -> Record:
    """Generate new samples with a trained model."""
    from ..sampling import sample_batches, split_settings
    from ..signals import StopRequest
    from ..types import join, take

    outputs = Outputs(out, "sample", [prompts, given, mask, *data_of(model)])
    network = load(model, device)
    known = _given(network, given, frames, mask, length)
    settings = sampling_settings(
        labels=labels, prompt=prompt, prompts=prompts, negative_prompt=negative_prompt, property=property,
        num_atoms=num_atoms, guidance_scale=guidance_scale, guidance_interval=guidance_interval,
        guidance_norm=guidance_norm, steps=steps, solver=solver,
        restarts=restarts, restart_interval=restart_interval, denoise_to_zero=denoise_to_zero,
        decoder_solver=decoder_solver, decoder_steps=decoder_steps,
    )  # fmt: skip
    check_decoder_settings(network, settings)
    check_restarts(network, settings)
    sampling, conditions = split_settings(network.config.sampling, settings)
    if num_atoms is not None and "num_atoms" not in network.modality.layout_arguments:
        raise ValueError("--num-atoms: samples of this model have no number of atoms; leave it out")
    texts = settings["prompts"]
    num = (len(texts) if texts and len(texts) > 1 else NUM) if num is None else num
    precision = precision_of(precision, network)
    with progress("sampling", num) as advance, StopRequest() as stop:
        batches = sample_batches(
            network, num, seed=seed, batch_size=batch_size, precision=precision, progress=advance, all_used=True,
            given=known, length=length, overlap=frames, **settings,
        )  # fmt: skip
        first = next(batches)  # nothing is written if this fails
        if (
            known is not None
            and len(network.conditions)
            and all(wish is None for wish in (labels, prompt, prompts, property))
        ):
            named = list(dict.fromkeys(network.conditions.captions(first.values) or []))
            few = f"{', '.join(named[:3])}{', ...' if len(named) > 3 else ''}"
            print(f"note: no condition is given, so samples have values in turn: {few}", file=sys.stderr)
        folder = outputs.begin()
        shown, shown_values, generated, needed = [], [], 0, 0
        resolved: dict[str, dict[str, list[Any]]] = {}
        with outputs.writing(lambda: needed) as whole, NpzWriter(whole / "samples.npz") as arrays:
            for part in chain([first], batches):
                rows = network.modality.arrays(part.data)
                needed = 2 * disk_space(rows, part.count) * (num - part.start) // part.count
                with outputs.writing(needed) as new:
                    network.modality.write(part.data, new, start=part.start)
                _add_values(resolved, network, part.values)
                values = {key: value.numpy() for key, value in part.values.items()}
                arrays.add({**rows, **values})
                if part.start < GRID:
                    shown.append(take(part.data, slice(GRID - part.start)))
                    shown_values.append(take(part.values, slice(GRID - part.start)))
                generated += part.count
                if stop.received is not None:
                    break
        captions = network.conditions.grid_captions(join(shown_values)) if shown_values[0] else None
        grid = network.modality.join(shown)
        record = {"model": model, "fingerprint": network.fingerprint(), "num": num, "made": generated, "seed": seed,
                  **conditions, "precision": precision, **sampling.plain(), "resolved": resolved}  # fmt: skip
        if known is not None:
            record |= {"given": str(given), "mask": None if mask is None else str(mask)}
        if frames is not None:
            record |= {"frames": frames, "length": length}
        with outputs.writing(disk_space(network.modality.arrays(grid), 2)) as new:
            drawn = [grid] if known is None else _beside(network, known, grid)
            network.modality.draw_grid(drawn, new / "grid.png", columns=network.conditions.columns, captions=captions)
            every = network.conditions.captions(join(shown_values)) if shown_values[0] else None
            if (page := network.modality.viewer(grid, every, f"Samples of {model}, seed {seed}")) is not None:
                write_text(new / VIEWER, page)
            write_json(new / "sampling.json", record)
    if generated < num:
        leave_stopped(stop, f"{generated} of {count_of(num, 'sample')} are in {folder}", STARTS_AGAIN)
    viewer = f", {VIEWER} (to turn them)" if (folder / VIEWER).is_file() else ""
    print(f"{count_of(num, 'sample')} in {folder}: grid.png{viewer}, samples.npz and one file per sample")
    return {"out": folder, **record}


def _given(
    network: LatentModel, path: Path | None, frames: int | None, mask: Path | None, length: int | None
) -> Given | None:
    """Read the given part; ValueError names an option that has no meaning without it."""
    if path is not None:
        return network.modality.read_given(path, mask, frames)
    if mask is not None:
        raise ValueError(f"--mask: {mask}, but nothing is given; add --given FILE")
    if frames is not None and length is None:
        raise ValueError(f"--frames: {frames}, but nothing is given; add --given FILE, or --length")
    return None


def _beside(network: LatentModel, part: Given, made: Any) -> list[Any]:
    """Return rows for a grid: what is given of each sample, the sample, and what the file has there, if it has it."""
    from ..types import count

    modality, number = network.modality, count(made)
    known, true = (modality.join([data] * number) for data in (modality.fill(part), part.data))
    return [known, made, true] if part.complete else [known, made]


def _add_values(resolved: dict[str, dict[str, list[Any]]], network: LatentModel, values: dict[str, Tensor]) -> None:
    """Append what each sample is conditioned on: the names of its values, and the indices of classes."""
    for condition in network.conditions.all:
        rows = values[condition.argument]
        lists = resolved.setdefault(condition.argument, {})
        lists.setdefault("names", []).extend(condition.describe(rows))
        if rows.ndim == 1 and not rows.is_floating_point():
            lists.setdefault("indices", []).extend(rows.tolist())


class NpzWriter:
    """Writes an uncompressed .npz that grows on disk; memory holds one batch. The file is written atomically."""

    def __init__(self, path: Path):
        self.path = path
        self.parts: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype] = {}

    def __enter__(self) -> NpzWriter:
        return self

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Append rows to each array."""
        import numpy as np

        for name, rows in arrays.items():
            part = self.parts.setdefault(name, self.path.with_name(f".{self.path.name}.{name}"))
            start = self.shapes[name][0] if name in self.shapes else 0
            with part.open("ab" if start else "wb") as file:
                file.write(np.ascontiguousarray(rows).tobytes())
            self.shapes[name], self.types[name] = (start + len(rows), *rows.shape[1:]), rows.dtype

    def __exit__(self, kind: object, *exception: object) -> None:
        import numpy as np

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
