"""What commands do alike: open a model, show progress, stop on a signal, prepare output folders."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import typer

from ..files import SMALLEST, check_writable
from ..outputs import refuse_foreign
from ..plain_text import count_of
from ..progress import progress_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..listings import Listings
    from ..methods.base import LatentModel
    from ..modalities.base import Modality, Splits
    from ..processes import Processes
    from ..signals import StopRequest
    from ..training.config import RunConfig

Computed = Literal["fp32", "bf16"]
RESUMES = "the same command resumes from there"
STARTS_AGAIN = "the same command starts again from the first sample"
NAMED = 10
"""So many samples that are left out are printed."""


def load(source: str, device: str | None, processes: Processes | None = None) -> LatentModel:
    """Load a model onto the device; ValueError if there is no such device.

    processes: of the command, from `join_processes`. The first one reads the model; each has it on its own device.
    """
    from ..devices import pick_device
    from ..loading import load as load_model

    if processes is not None and processes.world > 1:
        return processes.share(lambda: load_model(source, device="cpu")).to(processes.device)
    chosen = pick_device(device, "--device")
    try:
        return load_model(source, device=chosen)
    except (RuntimeError, AssertionError) as error:
        if chosen.type == "cpu":
            raise
        raise ValueError(f"--device {chosen}: not available ({str(error).splitlines()[0]}); use cpu") from None


def join_processes(device: str | None) -> Processes:
    """Return the processes of this command; ValueError if there is no such device."""
    from ..devices import pick_device
    from ..processes import Processes

    if device is not None:
        pick_device(device, "--device")
    return Processes(device)


FIELDS = {"lpips_weights": "perceptual_weights"}
"""Options of an evaluation that the configuration of a modality has under another name."""


def option_name(argument: str) -> str:
    """Return the option that a command's argument is given by."""
    return f"--{argument.replace('_', '-')}"


def for_evaluation(modality: Modality, options: Mapping[str, Any]) -> Modality:
    """Return the modality with other settings of its metrics; ValueError names an option that it has no use for.

    options: argument of a command (`inception_weights`) -> its value, None to leave the setting as it is.
    """
    settings: dict[str, Any] = {}
    for name, value in options.items():
        key = FIELDS.get(name, name)
        if value is None:
            continue
        if key not in type(modality.config).model_fields:
            raise ValueError(f"{option_name(name)}: samples of this model have no such metric; leave it out")
        settings[key] = value
    return type(modality)(type(modality.config).parse({**modality.config.plain(), **settings}))


def precision_of(option: str, model: LatentModel | None, processes: Processes | None = None) -> Computed:
    """Return what a command computes in, "fp32" or "bf16", the same in all processes; ValueError if it is unknown.

    Says in a line where bf16 is slow, or not used because it would be. Lets a GPU's float32 products use TF32,
    unless it is "fp32".
    """
    from ..devices import set_float32_products

    runs_on = processes if model is None else model
    device = "cpu" if runs_on is None else runs_on.device
    trained = "fp32" if model is None else model.precision
    chosen = (
        _precision(option, device, trained)
        if processes is None
        else processes.from_main(lambda: _precision(option, device, trained))
    )
    set_float32_products(device, chosen)
    return chosen


def _precision(option: str, device: torch.device | str, trained: str) -> Computed:
    from ..devices import has_bf16, kind, resolve_precision

    chosen = resolve_precision(option, device, trained, field="--precision")
    if option == "bf16":
        note_drawback(str(device))
    elif option == "auto" and chosen != trained:
        reasons: dict[bool | None, str] = {
            True: "is slower in bf16", False: "has no bf16 instructions", None: "is not known to have bf16 instructions"
        }  # fmt: skip
        reason = reasons[has_bf16(device)]
        print(
            f"note: the model was trained in bf16, but this {kind(device)} {reason}: computing in fp32 "
            "(--precision bf16 computes in bf16 all the same)", file=sys.stderr,
        )  # fmt: skip
    return chosen


@cache
def note_drawback(device: str) -> None:
    """Print once if bf16 is slow on the device."""
    from ..devices import bf16_drawback

    if drawback := bf16_drawback(device):
        print(f"note: --precision bf16: {drawback}", file=sys.stderr)


def print_notes(lines: Iterable[str]) -> None:
    """Print notes on data to stderr: what was found and is not read."""
    for line in lines:
        print(f"note: {' '.join(line.split())}", file=sys.stderr)


class LeftOut:
    """Samples of the input that cannot be used, in order."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(" ".join(reason.split()))

    def show(self) -> None:
        """Print the first ones, and how many others there are."""
        for reason in self.reasons[:NAMED]:
            print(f"left out: {reason}", file=sys.stderr)
        if (others := len(self.reasons) - NAMED) > 0:
            print(f"left out: {count_of(others, 'more sample')}", file=sys.stderr)

    def __str__(self) -> str:
        """For the last line of a command; empty if nothing was left out."""
        return f"; {count_of(len(self.reasons), 'sample')} left out" if self.reasons else ""

    def none_left(self, source: object, work: str) -> ValueError:
        """Return the error of an input without a usable sample."""
        if not self.reasons:
            return ValueError(f"{source}: nothing to {work} in it")
        total = len(self.reasons)
        first = f"all {total:,} samples cannot be used, the first" if total > 1 else "its only sample cannot be used"
        return ValueError(f"{source}: {first}: {self.reasons[0]}")


@contextmanager
def progress(label: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """One progress bar; call it with the number of items that were finished since the last call."""
    with progress_of(quiet=quiet) as advance:
        advance(label, 0, total or 0)
        yield lambda count: advance(label, count, total or 0)


def leave_stopped(stop: StopRequest, done: str, further: str, processes: Processes | None = None) -> NoReturn:
    """Exit before the work is done, after a signal; the first process prints what is there and how to continue."""
    if processes is None or processes.is_main:
        print(f"stopped: {done}; {further}", file=sys.stderr)
    if processes is not None:
        processes.leave()
    raise typer.Exit(stop.exit_code)


def find_run_folder(source: str | None) -> Path | None:
    """Return the path of a run folder, None for any other source of a model."""
    return Path(source) if source is not None and (Path(source) / "config.yaml").is_file() else None


def packaged_run(source: str) -> RunConfig | None:
    """Return the configuration with which a model of the package was trained; None for any other source."""
    from ..model_card import read_record
    from ..packaged import packaged
    from ..presets import preset

    folder = None if Path(source).is_dir() else packaged(source)
    record = None if folder is None else read_record(folder)
    return None if record is None else preset(record.training["preset"])


def splits_for(
    modality: Modality, source: str | None, data: str | None, listings: Listings | None = None
) -> Splits | None:  # fmt: skip
    """Open the data that a model was trained on, or others at the path `data` (`evaluation.reference.splits_of`).

    source: a run or a model of the package; for any other, and without a path, the data are unknown: None.
    """
    from ..evaluation.reference import splits_of
    from ..listings import ALONE

    listings, folder = listings or ALONE, find_run_folder(source)
    if source is not None and folder is None and data is None and (run := packaged_run(source)) is not None:
        return modality.splits(run.data, listings)
    return splits_of(modality, folder, data, listings)


def known_splits(
    modality: Modality, source: str, data: str | None, field: str = "--data", listings: Listings | None = None
) -> Splits:  # fmt: skip
    """As `splits_for`; ValueError names the option `field` if the data are unknown."""
    splits = splits_for(modality, source, data, listings)
    if splits is None:
        raise ValueError(f"{field}: {source} is not a run and does not record its training data; give their path")
    return splits


EVALUATED = re.compile(r"(records|search-records)/.*|(evaluation-|search|step_)[^/]*\.(json|png)")
"""What evaluations and searches write."""


def evaluation_folder(out: Path | None, run_folder: Path | None) -> Path:
    """Return --out, by default RUN/eval or ./evaluation; ValueError if --out holds files of others, but is no run."""
    folder = out or (run_folder / "eval" if run_folder else Path("evaluation"))
    if not any(find_run_folder(str(place)) for place in (folder, folder.parent)):
        ours = ("evaluate", "search")
        refuse_foreign(folder, "an evaluation", lambda name: EVALUATED.fullmatch(name) is not None, ours)
    return folder


def data_of(source: str | None) -> list[str]:
    """Return the paths of the data that a run was trained on, which no output may lie in; none for other sources."""
    from ..config import ConfigError, read_yaml

    run = find_run_folder(source)
    try:
        paths = [] if run is None else data_paths(read_yaml(run / "config.yaml").get("data"))
    except ConfigError:
        return []
    return [path for path in paths if set(Path(path).parts) - {".."}]  # "." is another folder where we are now


def data_paths(settings: object) -> list[str]:
    """Return the values of `path` among plain settings of data, without the words for generated data."""
    from ..config import flat
    from ..presets import preset, presets

    def paths(tree: dict[str, Any]) -> list[str]:
        return [
            value for key, value in flat(tree).items() if key.rpartition(".")[2] == "path" and isinstance(value, str)
        ]

    words = {value for name in presets() for value in paths(preset(name).data.plain())}
    return [path for path in paths(settings) if path not in words] if isinstance(settings, dict) else []


def make_folder(path: Path) -> Path:
    """Create an output folder and return it; ValueError if it cannot be written."""
    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def disk_space(arrays: Mapping[str, np.ndarray], count: int) -> int:
    """Bytes that the files of `count` samples take, about: a file each, and their arrays."""
    return sum(rows.nbytes for rows in arrays.values()) + SMALLEST * count
