"""Checkpoints are written while training continues: the state is copied at once, a thread writes the files."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..faults import reach
from ..files import nearest, readable, size_text
from ..maths.streams import GENERATOR
from ..model_folder import write_config
from ..plain_text import count_of
from ..processes import Processes
from ..runs import checkpoint as ckpt
from ..runs.crash import first_line
from ..runs.snapshots import write_snapshot
from ..sharding import full
from ..version import __version__
from .bad_samples import BadSamples
from .config import RunConfig
from .state import TrainingState, refuse_non_finite


class HostCopies:
    """Copies of tensors in this process's memory, which is reused for the next copies."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Unsharded copies on the CPU, valid until the next call. Collective; processes that do not `keep` get none."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            source = full(tensor.detach())
            if keep:
                copies[name] = self._buffer(name, source).copy_(source)
        self._buffers = copies
        return dict(copies)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class BackgroundWriter:
    """Runs one job at a time in a thread; a job's error waits for the next caller."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised by `wait`."""
        return self._error is not None

    def start(self, job: Callable[[], object]) -> None:
        """Start once the previous job is done; if that one failed, raise its error instead."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="saving", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no job runs; raise the error of the last one, once."""
        if (error := self.settle()) is not None:
            raise error

    def settle(self) -> Exception | None:
        """Wait until no job runs; return the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            self._error = error


class Checkpoints:
    """The checkpoints of a run that is training, in `folder` (RUN/checkpoints).

    saved: the newest step that is written or being written. fingerprint: of the training data, set when the run folder
    is opened. All methods are collective.
    """

    def __init__(self, folder: Path, state: TrainingState, config: RunConfig, processes: Processes, bad: BadSamples):
        self.folder, self.state, self.config, self.processes, self.bad = folder, state, config, processes, bad
        self.writer, self.copies = BackgroundWriter(), HostCopies()
        self.saved, self.fingerprint = -1, ""

    def save(self) -> None:
        """Save the current step, unless it is saved; raises the error of the previous save, if it failed."""
        if self.saved == self.state.step:
            return
        self.wait()
        files = self.state.tensors()
        refuse_non_finite(files, self.state.step, self.processes)
        self.saved = step = self.state.step
        copies, facts = self._copies(files), self._facts() if self.processes.is_main else {}
        needed = sum(tensor.nbytes for tensors in copies.values() for tensor in tensors.values())

        def write() -> None:
            ckpt.save(
                self.folder, step, lambda folder: self._write(folder, step, copies, facts),
                self.config.training.keep_checkpoints, needed=needed,
            )  # fmt: skip

        background = self.config.training.background_saving
        self.processes.on_main(lambda: self.writer.start(write) if background else write())

    def save_now(self) -> None:
        """Save the current step and wait until it is written."""
        self.save()
        self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises the error of what was."""
        self.processes.on_main(self.writer.wait)

    def save_ema_snapshot(self, run: Path, warn: Callable[[str, str], None]) -> None:
        """Write the power-function EMAs of this step to RUN/ema; a full disk costs only this snapshot.

        Called before the checkpoint of the same step, which then never lacks its snapshot.
        """
        refuse_non_finite({"ema_profiles": self.state.power_emas.weights}, self.state.step, self.processes)
        weights: dict[str, Tensor] = {}
        for name, tensor in self.state.power_emas.weights.items():
            unsharded = full(tensor)
            if self.processes.is_main:
                weights[name] = unsharded.cpu()

        def write() -> None:
            try:
                write_snapshot(run, self.state.step, weights)
            except OSError as error:
                warn("ema", f"EMA snapshot of step {self.state.step} not written: {first_line(error)}")

        self.processes.on_main(write)

    def space_note(self, steps: int) -> str | None:
        """Return a line if the disk has less space than a run of so many steps will need; None otherwise."""
        training, left = self.config.training, steps - self.state.step
        saves = -(-left // (training.checkpoint_every or left)) if left else 0
        most = training.keep_checkpoints + 1  # an old one is removed after a new one is written
        count = min(saves, max(1, most - len(ckpt.published(self.folder))))
        one, model = self.state.checkpoint_bytes, sum(t.nbytes for t in self.state.model.state_dict().values())
        snapshot = sum(weights.nbytes for weights in self.state.power_emas.weights.values())
        every = training.ema_snapshot_every or training.checkpoint_every or max(left, 1)
        snapshots = -(-left // every) if snapshot else 0
        needed = count * one + (1 + (training.best is not None)) * model + snapshots * snapshot
        free = shutil.disk_usage(nearest(self.folder)).free
        if not left or needed <= free:
            return None
        fewer = ", or set training.keep_checkpoints=2" if training.keep_checkpoints > 2 else ""
        parts = f"{count_of(count, 'checkpoint')} of {size_text(one)}"
        if snapshots:
            parts += f", {count_of(snapshots, 'EMA snapshot')} of {size_text(snapshot)}"
        if snapshots * snapshot > count * one:
            fewer = f", or set training.ema_snapshot_every above {every:,}"
        return (
            f"{self.folder.parent}: the run will need about {size_text(needed)} ({parts}, and the model), but "
            f"{size_text(free)} are free there; free some space, give another --out{fewer}"
        )

    def _copies(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Unsharded copies on the first process, which later steps do not change."""
        flat = {f"{file}/{key}": value for file, tensors in files.items() for key, value in tensors.items()}
        copies = self.copies.take(flat, keep=self.processes.is_main)
        return {file: {key: copies[f"{file}/{key}"] for key in tensors if copies} for file, tensors in files.items()}

    def _facts(self) -> dict[str, Any]:
        """state.json of a checkpoint, as it is now."""
        training = self.config.training
        return {
            "step": self.state.step,
            "seed": self.config.seed,
            "batch_size": training.batch_size,
            "muon": training.optimizer.muon,
            "ema_profiles": list(training.ema_profiles),
            "data": self.fingerprint,
            "training": training.plain(),
            "bad_samples": self.bad.state(),
            "skipped": self.state.skipped,
            "noise": GENERATOR,
            "unilatent": __version__,
            "torch": torch.__version__,
        }

    def _write(self, folder: Path, step: int, files: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        for file, tensors in files.items():
            save_file(tensors, folder / f"{file}.safetensors")
            readable(folder / f"{file}.safetensors")
            if file == "model":
                reach("save.after_model", step)
        write_config(self.state.model.config, folder / "config.json", self.state.model.precision)
        (folder / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
