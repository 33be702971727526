"""The loop. Setting up, stepping and finishing are three things; nothing here knows a paper or a modality."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import ConfigError
from ..evaluation.judging import as_json, judge, table
from ..faults import reach
from ..files import write_json, write_text
from ..maths.streams import Streams, seed_of
from ..methods.base import LatentModel, LossPart, load_weights, read_weights, write_config
from ..modalities.base import Modality, Splits, Stream
from ..nets.layers import Repeated
from ..registry import find
from ..sampling import reconstruct, sample
from ..types import Batch
from . import checkpoint as ckpt
from . import lock
from .bad_samples import BadSamples
from .batches import Plan, loader, micro_batches, try_samples, whole, worker_deaths
from .config import RunConfig
from .crash import write_report
from .ema import EMA
from .journal import Journal, trim
from .optimizer import Optimizers, clip_gradients
from .processes import Processes
from .schedule import factor, unreachable
from .signals import SAVE, STOP, StopRequest


class Trainer:
    """One run: its data, model, optimizers and folder.

    Building a Trainer checks everything that can be checked and writes nothing; `fit` trains.
    """

    def __init__(
        self, config: RunConfig, out: Path, resume: str | None = None, console: Console | None = None,
        allow_data_change: bool = False,
    ):  # fmt: skip
        """resume: None starts anew (and refuses a folder that holds a run), "auto" continues from the newest sound
        checkpoint if there is one, a path from exactly that checkpoint.

        allow_data_change: go on from a checkpoint although the data are no longer those it was made with."""
        self.out, self.console = out, console or Console(stderr=True)
        self.allow_data_change, self.data_changed = allow_data_change, False
        modality: Modality = find("modalities", config.modality.name)(config.modality)
        self.splits: Splits = modality.splits(config.data)
        self.config = config.with_data(self.splits.train.facts)
        self.training = self.config.training
        self.samples = self._count()
        if not self.samples:
            raise ConfigError("data.held_out leaves nothing to train on; make it smaller")
        self.steps = self.training.num_steps(self.samples)
        if self.training.threads:
            torch.set_num_threads(self.training.threads)
        self.processes = Processes(self.training.device, self.training.timeout)
        self.device = self.processes.device
        if self.training.batch_size < self.processes.world:
            raise ConfigError(
                f"training.batch_size: {self.training.batch_size} is less than the {self.processes.world} processes; "
                "it counts the samples of all of them together"
            )
        self.checkpoint = self._find_checkpoint(resume)
        self._try_data(modality)
        torch.manual_seed(seed_of("init", self.config.seed))
        self.model = LatentModel.build(self.config.model()).to(self.device)
        self.optimizers = Optimizers(self.model, self.training.optimizer)
        self.ema = EMA(self.model, self.training.ema_decay)
        self.step, self.saved, self.skipped = 0, -1, 0
        self.bad = BadSamples(self.training.bad_samples, self.samples, out, self.processes)
        if self.checkpoint is not None:
            self._load(self.checkpoint)
            if reason := self.bad.refusal(self.step * self.training.batch_size):
                raise ConfigError(reason)
        self.processes.same_weights(self.model)
        self._specialise()
        self.processes.wait()  # nobody writes before everybody has looked

    # Training.

    def fit(self) -> Path:
        """Train to the end and return the folder of the finished model; stopped early, the run can be resumed."""
        self.processes.on_main(self._open_folder)
        try:
            with worker_deaths():
                return self._fit()
        except Exception as error:
            env = environment(self.device, self.processes.world)
            report = write_report(self.out, self.processes.rank, error, self.config.to_yaml(), env)
            self.console.print(f"crash report: {report}", highlight=False, markup=False, soft_wrap=True)
            raise
        finally:
            if self.processes.is_main:
                lock.release(self.out)

    def _fit(self) -> Path:
        with (
            Journal(self.out, self.steps, self.step, self.console, quiet=not self.processes.is_main) as self.journal,
            StopRequest() as stop,
        ):
            self._announce()
            with contextlib.ExitStack() as self.closing:
                for _ in self._steps(stop):
                    self._once_in_a_while()
            if self.step < self.steps:
                self._save()
                name = stop.received.name if stop.received else "stop"
                self.journal.say(f"{name}: saved step {self.step}; go on with --resume auto")
                return self.out
            self._finish()
        return self.out / "model"

    def _steps(self, stop: StopRequest) -> Iterator[None]:
        """Optimiser steps until the end or until asked to stop."""
        t = self.training
        batches = loader(
            self.splits.train, self.model.modality, self._positions(), self.config.seed, t.workers,
            pin_memory=self.device.type == "cuda", timeout=t.worker_timeout,
        )  # fmt: skip
        micro = zip(self._positions(), self.bad.passing(batches), strict=True)
        self.closing.callback(batches.close)  # ends the data workers, however the steps end
        since, done = time.perf_counter(), 0
        while self.step < self.steps and (asked := self.processes.highest(stop.take())) != STOP:
            if asked == SAVE:
                self._save()
                self.journal.say(f"asked to save: step {self.step} is saved, training goes on")
            reach("step.start", self.step)
            logs = self._one_step(list(islice(micro, self._micro_batches_per_step)))
            self.step += 1
            if logs.pop("bad_samples"):
                self._settle_bad_samples()
            done += t.batch_size
            self.journal.advance(self.step)
            if self.step % t.log_every == 0 or self.step == self.steps:
                self._log(logs, done / (time.perf_counter() - since))
                since, done = time.perf_counter(), 0
            yield

    def _positions(self) -> Plan:
        """Places in the endless row of samples of each micro-batch still to come in this process."""
        t, p = self.training, self.processes
        return Plan(range(self.step, self.steps), t.batch_size, t.micro_batch_size, p.rank, p.world)

    def _settle_bad_samples(self) -> None:
        """Every process counts alike; too many end the run, which is saved so that it can go on once they may."""
        self.bad.settle(self.step, self.journal.say)
        if reason := self.bad.refusal(self.step * self.training.batch_size):
            self._save()
            raise ConfigError(reason)

    @property
    def _micro_batches_per_step(self) -> int:
        t, p = self.training, self.processes
        return len(list(micro_batches(range(1), t.batch_size, t.micro_batch_size, p.rank, p.world)))

    def _one_step(self, micro: list[tuple[range, Batch]]) -> dict[str, Tensor]:
        """One optimiser step over its micro-batches; returns what is to be logged, still on the device."""
        torch.manual_seed(seed_of("net", self.config.seed, self.step, self.processes.rank))
        logs: dict[str, Tensor] = {}
        for positions, batch in micro:
            keys = (("train", self.config.seed, position) for position in positions)
            streams = Streams(keys, self.device)
            batch = batch.to(self.device)
            batch = replace(batch, data=self.model.modality.augment(batch.data, streams))
            share = len(positions) / self.training.batch_size
            for part in self._backward(batch, streams, share):
                for key, value in part.logs().items():
                    logs[key] = logs.get(key, 0) + share * value
        if reach("step.gradients", self.step):
            next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = float("nan")
        self.processes.sum_gradients(self.model)
        logs["bad_samples"] = torch.tensor(float(len(self.bad.met)), device=self.device)
        logs = self.processes.sum(logs)
        logs["grad_norm"] = clip_gradients(self.model, self.training.gradient_clip)
        if not self._is_finite(logs, micro):
            self.optimizers.zero_grad()
            return logs
        reach("step.before_optimizer", self.step)
        self.optimizers.set_factor(
            factor(self.training.schedule, self.step + 1, self.samples / self.training.batch_size)
        )
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.ema.update(self.model)
        return logs

    def _backward(self, batch: Batch, streams: Streams, share: float) -> Iterator[LossPart]:
        """Each part of the loss is made under autocast and differentiated outside it, before the next exists."""
        parts = iter(self.model.loss(batch, streams))
        while True:
            with self._autocast():
                part = next(parts, None)
            if part is None:
                return
            (share * part.value).backward()
            yield part

    def _autocast(self) -> torch.autocast:
        """bfloat16 inside networks, if so configured."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def _is_finite(self, logs: dict[str, Tensor], micro: list[tuple[range, Batch]]) -> bool:
        """Before the weights move: a gradient that is not finite never reaches them, nor a checkpoint.

        Loss and norm are sums over processes, so all decide alike. `non_finite` says whether such a step is left out.
        """
        if torch.isfinite(logs["grad_norm"]) and torch.isfinite(logs["loss/total"]):
            self.skipped = 0
            return True
        self.skipped += 1
        named = ", ".join(key for key, value in logs.items() if not torch.isfinite(value))
        self._note_bad_batch(named, micro)
        allowed = self.training.allowed_skips
        if self.skipped > allowed:
            span = f"steps {self.step + 2 - self.skipped} to {self.step + 1}" if allowed else f"step {self.step + 1}"
            raise FloatingPointError(
                f"{span}: {named} is not finite; the weights are those of step {self.step + 1 - self.skipped}. Resume "
                "with a lower training.optimizer.learning_rate or training.precision=fp32, or leave such steps out "
                "with training.non_finite=skip:10"
            )
        self.journal.say(f"step {self.step + 1}: {named} is not finite; left out ({self.skipped} in a row)")
        return False

    def _note_bad_batch(self, named: str, micro: list[tuple[range, Batch]]) -> None:
        """Which samples made a step that is not finite, for whoever looks for the cause."""
        indices = [self.splits.train.index_at(self.config.seed, p) for positions, _ in micro for p in positions]
        record = {"step": self.step + 1, "rank": self.processes.rank, "not_finite": named, "samples": indices}
        with (self.out / f"bad_batches.rank{self.processes.rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _log(self, logs: dict[str, Tensor], speed: float) -> None:
        numbers = {key: float(value) for key, value in logs.items() if torch.isfinite(value)}
        at = factor(self.training.schedule, self.step, self.samples / self.training.batch_size)
        seen = self.step * self.training.batch_size
        self.journal.log(
            self.step,
            {
                **numbers,
                "learning_rate": at * self.training.optimizer.learning_rate,
                "samples": seen,
                "epoch": seen / self.samples,
                "samples_per_second": speed,
                "bad_samples": len(self.bad.indices),
            },
        )

    def _once_in_a_while(self) -> None:
        t = self.training
        if t.sample_every and self.step % t.sample_every == 0 and self.step < self.steps:
            self.processes.on_main(self._draw)
        if t.checkpoint_every and self.step % t.checkpoint_every == 0 and self.step < self.steps:
            self._save()

    # What is looked at.

    def _draw(self) -> None:
        """A grid of samples and one of reconstructions under them, with averaged weights."""
        name = f"step_{self.step:08d}.png"
        modality, t = self.model.modality, self.training
        shown = self.splits.held_out if len(self.splits.held_out) else self.splits.train
        real = whole(shown, modality, limit=min(t.num_samples, 16)).data
        with self.ema.applied(self.model), self._autocast():
            made = sample(self.model, t.num_samples, seed=self.config.seed)
            again = reconstruct(self.model, real, seed=self.config.seed)
        modality.draw_grid([made], self.out / "samples" / name, columns=self.model.conditions.columns)
        modality.draw_grid([real, again], self.out / "recon" / name)

    def _finish(self) -> None:
        self._save()
        if self.bad.indices:
            self.journal.say(self.bad.summary())
        self.processes.on_main(self._publish)

    def _publish(self) -> None:
        """The finished model, its pictures and its table."""
        if self.training.sample_every:
            self._draw()
        with self.ema.applied(self.model):
            temporary = self.out / "model.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.model.save_pretrained(temporary)
            shutil.rmtree(self.out / "model", ignore_errors=True)
            temporary.rename(self.out / "model")
            if self.training.evaluate_samples and len(self.splits.held_out):
                self._judge()
        self.journal.say(f"finished: {self.out / 'model'}")

    def _judge(self) -> None:
        self.journal.say(f"judging {self.training.evaluate_samples} new samples and the held-out ones")
        rows = judge(
            self.model, self.splits, self.training.evaluate_samples, seed=self.config.seed, say=self.journal.say
        )
        path = self.out / "eval" / f"step_{self.step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"step": self.step, "samples": self.training.evaluate_samples, "rows": as_json(rows)})
        title = f"{self.config.preset}, step {self.step}: {self.training.evaluate_samples} samples, " \
                f"{len(self.splits.held_out)} held-out"  # fmt: skip
        self.journal.bar.stop()
        Console().print(table(rows, title))

    # The run folder.

    def _try_data(self, modality: Modality) -> None:
        """Reads the run's first samples and weights of its losses: what is missing is refused before a folder is."""
        modality.prepare(self.device)
        count = min(self.training.batch_size, 8)
        try_samples(self.splits.train, self.config.seed, count, all_usable=not self.training.bad_samples)

    def _count(self) -> float:
        """Training samples of an epoch; infinite for a stream that nobody counted, where nothing asks for epochs."""
        train, t = self.splits.train, self.training
        in_steps = t.epochs is None and t.schedule.unit == "steps"
        return math.inf if in_steps and isinstance(train, Stream) and train.size is None else len(train)

    @property
    def amount(self) -> str:
        """Of training samples, in words."""
        return f"{self.samples:,}" if math.isfinite(self.samples) else "uncounted"

    def _open_folder(self) -> None:
        for sub in ("samples", "recon", "checkpoints"):
            (self.out / sub).mkdir(parents=True, exist_ok=True)
        lock.take(self.out)
        ckpt.clean(self.out / "checkpoints", self.step)
        write_text(self.out / "config.yaml", self.config.to_yaml())
        write_json(self.out / "env.json", environment(self.device, self.processes.world))
        for path in (self.out / "metrics.jsonl", *self.out.glob("bad_samples.rank*.jsonl")):
            trim(path, self.step)
        self.fingerprint = self.splits.train.fingerprint  # of the data as they are now

    def _announce(self) -> None:
        t = self.training
        say = self.journal.say
        say(
            f"{self.config.preset}: {self.model.num_trainable:,} parameters, {self.amount} training samples, "
            f"{len(self.splits.held_out):,} held out, {self.steps:,} steps of {t.batch_size}, {self.device}, "
            f"{t.precision}"
        )
        if self.checkpoint is not None:
            done = "; the run is complete, nothing is left to train" if self.step >= self.steps else ""
            say(f"resumed from {self.checkpoint} at step {self.step}{done}")
        if self.data_changed:
            say(
                "the data are not those the checkpoint was made with: from here on other samples come, in another order"
            )
        for line in self.notes():
            say(line)

    def notes(self) -> list[str]:
        """What somebody about to start this run should know, a line each."""
        t = self.training
        lines = [
            f"{argument}: {len(names)} found in the data: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
            for argument, facts in self.splits.train.facts.items()
            for names in facts.values()
        ]
        lines += [f"note: {line}" for line in unreachable(t.schedule, self.steps, self.samples / t.batch_size)]
        if t.ema_decay and 1 / (1 - t.ema_decay) > self.steps:
            lines.append(f"note: training.ema_decay {t.ema_decay} averages over more steps than the run has")
        if t.batch_size > self.samples:
            lines.append(f"note: training.batch_size {t.batch_size} is more than the {self.amount} training samples")
        return lines

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        folder = self.out / "checkpoints"
        check_writable(self.out)
        lock.refuse_second(self.out)
        if resume is None:
            if (self.out / "config.yaml").exists():
                raise ConfigError(f"--out {self.out}: holds a run already; add --resume auto, or choose another folder")
            return None
        if resume != "auto":
            ckpt.verify(Path(resume))
            return Path(resume)
        found, passed = ckpt.newest(folder)
        for line in passed:
            self.console.print(f"passed over: {line}", highlight=False, markup=False)
        if found is None and passed:
            raise ConfigError(f"--resume auto: no sound checkpoint is left in {folder}; start anew in another folder")
        return found

    def _save(self) -> None:
        if self.saved == self.step:
            return
        self.saved = self.step
        folder = self.out / "checkpoints"
        self.processes.on_main(lambda: ckpt.save(folder, self.step, self._write, self.training.keep_checkpoints))

    def _write(self, folder: Path) -> None:
        weights = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        reach("save.after_model", self.step)
        save_file({k: v.cpu().contiguous() for k, v in self.ema.weights.items()}, folder / "ema.safetensors")
        save_file(
            {k: v.cpu().contiguous() for k, v in self.optimizers.state().items()}, folder / "optimizer.safetensors"
        )
        write_config(self.model.config, folder / "config.json")
        state = {
            "step": self.step,
            "seed": self.config.seed,
            "batch_size": self.training.batch_size,
            "muon": self.training.optimizer.muon,
            "data": self.fingerprint,
            "bad_samples": self.bad.state(),
            "unilatent": __version__,
            "torch": torch.__version__,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _load(self, checkpoint: Path) -> None:
        """Everything a step depends on; a checkpoint of another model, seed, batch size or data is refused by field."""
        self._refuse_other_model(checkpoint)
        state = json.loads((checkpoint / "state.json").read_text())
        own = {
            "seed": self.config.seed,
            "training.batch_size": self.training.batch_size,
            "training.optimizer.muon": self.training.optimizer.muon,
            "data": self.splits.train.fingerprint,
        }
        for field, value in own.items():
            was = state[field.rpartition(".")[2]]
            if field == "data" and was != value:
                if not self.allow_data_change:
                    raise ConfigError(
                        f"data: {value!r}, but the checkpoint was made with {was!r}: samples were added, removed or "
                        "changed. Put them back, start anew, or go on with --allow-data-change"
                    )
                self.data_changed = True
            elif was != value:
                raise ConfigError(
                    f"{field}: {value!r}, but the checkpoint was made with {was!r}; keep it, or start anew"
                )
        if not self.data_changed:
            self.bad.load(state.get("bad_samples"))
        load_weights(self.model, read_weights(checkpoint / "model.safetensors"), checkpoint)
        self.ema.load(read_weights(checkpoint / "ema.safetensors"))
        self.optimizers.load_state(read_weights(checkpoint / "optimizer.safetensors"))
        self.step = state["step"]
        if checkpoint.parent.resolve() == (self.out / "checkpoints").resolve():
            self.saved = self.step

    def _refuse_other_model(self, checkpoint: Path) -> None:
        was = json.loads((checkpoint / "config.json").read_text())
        for field in ("modality", "conditions", "method"):
            if found := first_difference(self.config.model().plain()[field], was[field], field):
                key, new, old = found
                raise ConfigError(f"{key}: {new!r}, but the checkpoint was made with {old!r}; keep it, or start anew")

    def _specialise(self) -> None:
        """Recomputation and compilation of the repeated blocks; neither changes a name or a weight."""
        for module in self.model.modules():
            if isinstance(module, Repeated):
                module.recompute = self.training.activation_checkpointing
                if self.training.compile:
                    module.compile()


def first_difference(new: Any, old: Any, key: str) -> tuple[str, Any, Any] | None:
    """Dotted key and both values of the first place where two plain trees differ."""
    if isinstance(new, dict) and isinstance(old, dict):
        for sub in new.keys() | old.keys():
            if found := first_difference(new.get(sub), old.get(sub), f"{key}.{sub}"):
                return found
        return None
    return None if new == old else (key, new, old)


def check_writable(folder: Path) -> None:
    """ConfigError unless files can be made in the folder, or in the nearest one above it that exists."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder")
        tempfile.TemporaryFile(dir=place).close()  # its own name in every process
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What a run ran on."""
    import numpy
    import safetensors

    info: dict[str, Any] = {
        "unilatent": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "safetensors": safetensors.__version__, "platform": platform.platform(),
        "device": str(device), "threads": torch.get_num_threads(), "processes": processes, "command": sys.argv,
    }  # fmt: skip
    with contextlib.suppress(Exception):
        if device.type == "cuda":
            info["gpu"] = torch.cuda.get_device_name(device)
    return info
