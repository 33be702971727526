"""The loop. Setting up, stepping and finishing are three things; nothing here knows a paper or a modality."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import ConfigError
from ..evaluation.evaluate import Evaluation, Evaluator, Interrupted, Request, choose_metrics
from ..evaluation.table import is_better, table, write
from ..faults import reach
from ..files import read_json, write_json, write_text
from ..maths.streams import Streams, seed_of
from ..methods.base import LatentModel, LossPart, load_weights, read_weights, write_config
from ..modalities.base import Modality, Splits, Stream
from ..nets.layers import Repeated
from ..registry import find
from ..sampling import reconstruct, sample
from ..types import Batch
from . import checkpoint as ckpt
from . import lock
from .alarms import Alarms, Change
from .bad_samples import BadSamples
from .batches import Plan, collate, loader, micro_batches, try_samples, whole, worker_deaths
from .config import RunConfig
from .crash import first_line, write_report
from .curves import draw_curves
from .ema import EMA, PowerEMAs
from .journal import Journal, Lines, trim
from .loggers import LoggedRun, Logger, Loggers, check_loggers, open_logger
from .measuring import Measurement
from .memory import OUT_OF_MEMORY, Memory, estimate, is_out_of_memory, micro_batch
from .optimizer import Optimizers, clip_gradients
from .processes import Processes
from .resuming import find_checkpoint, refuse_other_run
from .saving import Saving, Snapshot
from .schedule import factor, unreachable, weight
from .sharding import local, shard, twin
from .sharding import whole as put_together
from .signals import FAILED, SAVE, STOP, StopAsked, StopRequest
from .snapshots import trim_snapshots, write_snapshot


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
        self.data_changed = False
        modality: Modality = find("modalities", config.modality.name)(config.modality)
        self.splits: Splits = modality.splits(config.data)
        self.config = config.with_data(self.splits).with_sources()
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
        self.sharded = self.training.shard and self.processes.world > 1
        self._refuse_uneven_shards()
        check_loggers(self.training.loggers)
        self._refuse_unknown_best(modality)
        self.checkpoint = find_checkpoint(out, resume, self.processes, self._print)
        self._try_data(modality)
        torch.manual_seed(seed_of("init", self.config.seed))
        self.model = LatentModel.build(self.config.model()).to(self.device)
        self.model.conditions.prepare()
        if self.checkpoint is None:
            self.model.start(config.method)
        else:
            fingerprint = self.splits.train.fingerprint
            self.data_changed = refuse_other_run(self.checkpoint, self.config, fingerprint, allow_data_change)
            weights = self.checkpoint / "model.safetensors"
            load_weights(self.model, read_weights(weights), weights)
        self.processes.same_weights(self.model)
        self._specialise()
        self.optimizers = Optimizers(self.model, self.training.optimizer)
        self.ema = EMA(self.model, self.training.ema_decay)
        self.profiles = PowerEMAs(self.model, self.training.ema_profiles)
        self.step, self.saved, self.skipped = 0, -1, 0
        self.stop, self.saving, self.snapshot = StopRequest(), Saving(), Snapshot()
        self.bad = BadSamples(self.training.bad_samples, self.samples, out, self.processes)
        if self.checkpoint is not None:
            self._load(self.checkpoint)
            if reason := self.bad.refusal(self.step * self.training.batch_size):
                raise ConfigError(reason)
        self.processes.wait()  # nobody writes before everybody has looked

    # Training.

    def fit(self) -> Path:
        """Train to the end and return the folder of the finished model; stopped early, the run can be resumed."""
        self.processes.on_main(self._open_folder)
        try:
            with worker_deaths():
                return self._fit()
        except Exception as error:
            if (unsaved := self.saving.settle()) is not None and unsaved is not error:
                error.add_note(f"besides: {unsaved}")
            env = environment(self.device, self.processes.world)
            report = write_report(self.out, self.processes.rank, error, self.config.to_yaml(), env)
            self._print(f"crash report: {report}")
            if is_out_of_memory(error):
                raise MemoryError(self._way_out_of_memory(error)) from error
            raise
        finally:
            if self.processes.is_main:
                lock.release(self.out)

    def _fit(self) -> Path:
        with (
            Journal(self.out, self.steps, self.step, self.console, quiet=not self.processes.is_main) as self.journal,
            Loggers(self._open_loggers(), self.journal.warn) as self.loggers,
            self.stop,
        ):
            self.alarms = Alarms(self.steps, min(self.model.latent_channels, self.training.batch_size - 1))
            self.alarms.replay(self.out / "metrics.jsonl")
            self._announce()
            if self.processes.highest(self._was_cut_short):
                self._evaluate(final=False)
            with self._data() as micro:
                for _ in self._steps(micro):
                    self._once_in_a_while()
            self._save()
            self.processes.on_main(self.saving.wait)
            if self.step == self.steps and self._finish():
                return self.out / "model"
            name = self.stop.received.name if self.stop.received else "stop"
            self.journal.say(f"{name}: saved step {self.step}; go on with --resume auto")
        return self.out

    def _print(self, line: str) -> None:
        """Where no journal is open."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _open_loggers(self) -> dict[str, Callable[[], Logger]]:
        """What opens each logger that was asked for; the first process alone logs."""
        if not self.processes.is_main:
            return {}
        run = LoggedRun(self.out, self.step, self.training.wandb_project, self.training.wandb_name, self.config.plain())
        return {name: partial(open_logger, name, run) for name in self.training.loggers}

    def _way_out_of_memory(self, error: BaseException) -> str:
        micro = micro_batch(self.training, self.processes.world)
        smaller = f"training.micro_batch_size={micro // 2} (the optimisation stays the same)" if micro > 1 else ""
        ways = [smaller, "" if self.training.activation_checkpointing else "training.activation_checkpointing=true"]
        newest, _ = ckpt.newest(self.out / "checkpoints")
        saved = (
            f"the checkpoint of step {int(newest.name[5:])} is intact" if newest else "no checkpoint was written yet"
        )
        return (
            f"out of memory after step {self.step} on {self.device} with micro-batches of {micro}: resume with "
            f"{' or '.join(filter(None, ways)) or 'a smaller model'}; {saved} ({first_line(error)})"
        )

    @contextlib.contextmanager
    def _data(self) -> Iterator[Iterator[tuple[range, Batch]]]:
        """Every micro-batch still to come in this process, with its positions; the readers end with the block."""
        t = self.training
        batches = loader(
            self.splits.train, self.model.modality, self._positions(), self.config.seed, t.workers,
            pin_memory=self.device.type == "cuda", timeout=t.worker_timeout,
        )  # fmt: skip
        with contextlib.closing(batches):
            yield zip(self._positions(), self.bad.passing(batches), strict=True)

    def _steps(self, micro: Iterator[tuple[range, Batch]]) -> Iterator[None]:
        """Optimiser steps until the end or until asked to stop."""
        t = self.training
        since, done = time.perf_counter(), 0
        while self.step < self.steps and (asked := self.processes.highest(self._asked())) != STOP:
            if asked == FAILED:
                self.processes.on_main(self.saving.wait)
            if asked == SAVE:
                self._save()
                self.processes.on_main(self.saving.wait)
                self.journal.say(f"asked to save: step {self.step} is saved, training goes on")
            reach("step.start", self.step)
            due = self._log_is_due
            logs = self._one_step(list(islice(micro, self._micro_batches_per_step)))
            self.step += 1
            self.profiles.update(self.model, self.step)
            if logs.pop("bad_samples"):
                self._settle_bad_samples()
            done += t.batch_size
            self.journal.advance(self.step)
            self._raise_alarms(self.alarms.after_step(self.step, float(logs["grad_norm"])))
            if due:
                self._log(logs, done / (time.perf_counter() - since))
                since, done = time.perf_counter(), 0
            yield

    def _asked(self) -> int:
        """What this process has been asked to do, or has to report."""
        return FAILED if self.saving.failed else self.stop.take()

    def _positions(self) -> Plan:
        """Places in the endless row of samples of each micro-batch still to come in this process."""
        t, p = self.training, self.processes
        return Plan(range(self.step, self.steps), t.batch_size, t.micro_batch_size, p.rank, p.world)

    def _settle_bad_samples(self) -> None:
        """Every process counts alike; too many end the run, which is saved so that it can go on once they may."""
        self.bad.settle(self.step, self.journal.say, self.journal.warn)
        if reason := self.bad.refusal(self.step * self.training.batch_size):
            self._save()
            raise ConfigError(reason)

    @property
    def _micro_batches_per_step(self) -> int:
        t, p = self.training, self.processes
        return len(list(micro_batches(range(1), t.batch_size, t.micro_batch_size, p.rank, p.world)))

    @property
    def _log_is_due(self) -> bool:
        """Whether the step about to be taken is logged."""
        return (self.step + 1) % self.training.log_every == 0 or self.step + 1 == self.steps

    def _one_step(self, micro: list[tuple[range, Batch]]) -> dict[str, Tensor]:
        """One optimiser step over its micro-batches; returns what is to be logged, still on the device."""
        torch.manual_seed(seed_of("net", self.config.seed, self.step, self.processes.rank))
        logs: dict[str, Tensor] = {}
        met = set()
        measurement = (
            Measurement(self.model, self.training.log_gradients and not self.sharded) if self._log_is_due else None
        )
        for positions, batch in micro:
            keys = (("train", self.config.seed, position) for position in positions)
            streams = Streams(keys, self.device)
            batch = batch.to(self.device, staying=self.model.conditions.on_cpu)
            batch = replace(batch, data=self.model.modality.augment(batch.data, streams))
            share = len(positions) / self.training.batch_size
            for part in self._backward(batch, streams, share, measurement):
                met.add(part.title)
                for key, value in part.logs().items():
                    logs[key] = logs.get(key, 0) + share * value
        if unmet := set(self.training.schedule.onsets) - met:
            raise ConfigError(
                f"training.schedule.onsets.{min(unmet)}: no part of this method's loss; it has {', '.join(sorted(met))}"
            )
        if poison := reach("step.gradients", self.step):
            _poison([local(p.grad) for p in self.model.parameters() if p.grad is not None], poison)
        self.processes.sum_gradients(self.model)
        logs["bad_samples"] = torch.tensor(float(len(self.bad.met)), device=self.device)
        logs = self.processes.sum(logs)
        if measurement is not None:
            logs |= measurement.numbers(self.processes)
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

    def _backward(
        self, batch: Batch, streams: Streams, share: float, measurement: Measurement | None = None
    ) -> Iterator[LossPart]:
        """Each part of the loss is made under autocast and differentiated outside it, before the next exists."""
        parts = iter(self.model.loss(batch, streams))
        while True:
            with self._autocast():
                part = next(parts, None)
            if part is None:
                return
            at = weight(self.training.schedule, part.title, self.step, self.samples / self.training.batch_size)
            part = part if at == 1 else replace(part, value=at * part.value)
            with measurement.of(part) if measurement is not None else contextlib.nullcontext():
                (share * part.value).backward(retain_graph=part.retain)
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
        Lines(self.out / f"bad_batches.rank{self.processes.rank}.jsonl", self.journal.warn).write(json.dumps(record))

    def _log(self, logs: dict[str, Tensor], speed: float) -> None:
        numbers = {key: float(value) for key, value in logs.items() if torch.isfinite(value)}
        at = factor(self.training.schedule, self.step, self.samples / self.training.batch_size)
        seen = self.step * self.training.batch_size
        numbers |= {
            "learning_rate": at * self.training.optimizer.learning_rate,
            "samples": seen,
            "epoch": seen / self.samples,
            "samples_per_second": speed,
            "bad_samples": len(self.bad.indices),
        }
        self.journal.log(self.step, numbers)
        self.loggers.numbers(self.step, numbers)
        self._raise_alarms(self.alarms.after_log(self.step, numbers))

    def _raise_alarms(self, changes: list[Change]) -> None:
        for change in changes:
            self.journal.alarm(change)

    def _once_in_a_while(self) -> None:
        t = self.training
        if t.sample_every and self.step % t.sample_every == 0 and self.step < self.steps:
            self._until_stopped(self._draw_if_possible)
        every = t.ema_snapshot_every or t.checkpoint_every
        if t.ema_profiles and (self.step == self.steps or (every and self.step % every == 0)):
            self._keep_profiles()
        if t.checkpoint_every and self.step % t.checkpoint_every == 0 and self.step < self.steps:
            self._save()
        if self._evaluation_is_due:
            self._evaluate(final=False)

    def _keep_profiles(self) -> None:
        """A snapshot of the power averages, before the checkpoint of this step, which then never lacks it."""
        self._refuse_non_finite({"ema_profiles": self.profiles.weights})
        weights: dict[str, Tensor] = {}
        for name, tensor in self.profiles.weights.items():
            joined = put_together(tensor)
            if self.processes.is_main:
                weights[name] = joined.cpu()

        def keep() -> None:
            try:
                write_snapshot(self.out, self.step, weights)
            except OSError as error:
                self.journal.warn(
                    "ema", f"averages of step {self.step} not kept: {first_line(error)}; training goes on"
                )

        self.processes.on_main(keep)

    # What is looked at.

    def _until_stopped(self, work: Callable[[LatentModel], None]) -> bool:
        """Work of the first process on a model with averaged weights; whether it was done, and not given up between two
        of its batches since a stop was asked for."""
        done = True

        def attempt(model: LatentModel) -> None:
            nonlocal done
            try:
                work(model)
            except StopAsked:
                done = False

        with self._averaged() as model:
            self.processes.on_main(lambda: attempt(model))
        return not self.processes.highest(not done)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[LatentModel]:
        """A whole model with averaged weights, in the first process; all processes come here together."""
        if not self.sharded:
            with self.ema.applied(self.model):
                yield self.model
            return
        weights = {**self.model.state_dict(), **self.ema.weights}
        yield twin(self.config.model(), weights, self.device, keep=self.processes.is_main) or self.model

    def _draw_if_possible(self, model: LatentModel) -> None:
        """Pictures are worth no run: a full disk or memory costs them, and one warning."""
        try:
            self._draw(model)
        except (OSError, *OUT_OF_MEMORY) as error:
            if not (isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            self.journal.warn("pictures", f"pictures of step {self.step} not drawn: {first_line(error)}")
        try:
            draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")
        except Exception as error:  # whatever a plotting library comes up with
            self.journal.warn("curves", f"curves of step {self.step} not drawn: {first_line(error)}")

    def _draw(self, model: LatentModel) -> None:
        """A grid of samples and one of reconstructions under them, with averaged weights."""
        name = f"step_{self.step:08d}.png"
        modality, t = self.model.modality, self.training
        shown = self.splits.held_out if len(self.splits.held_out) else self.splits.train
        real = whole(shown, modality, limit=min(t.num_samples, 16)).data
        self.stop.between_batches()
        with self._autocast():
            made = sample(model, t.num_samples, seed=self.config.seed, progress=self.stop.between_batches)
            again = reconstruct(model, real, seed=self.config.seed)
        conditions = self.model.conditions
        captions = conditions.grid_captions(conditions.parse(t.num_samples, {}))
        modality.draw_grid([made], self.out / "samples" / name, columns=conditions.columns, captions=captions)
        modality.draw_grid([real, again], self.out / "recon" / name)
        for kind in ("samples", "recon"):
            self.loggers.picture(self.step, kind, self.out / kind / name)

    def _finish(self) -> bool:
        """The finished model, its pictures and its table; whether all of it was done before a stop was asked for."""
        if self.bad.indices:
            self.journal.say(self.bad.summary())
        self._refuse_non_finite({"model": self.model.state_dict(), "ema": self.ema.weights})
        if not self._until_stopped(self._publish):
            return False
        if self._can_evaluate and self._is_evaluated:
            self.journal.say(f"evaluated before: {self._numbers_file}")
            return True
        return not self._can_evaluate or self._evaluate(final=True)

    @property
    def _can_evaluate(self) -> bool:
        return bool(self.training.evaluate_samples and len(self.splits.held_out))

    @property
    def _evaluation_is_due(self) -> bool:
        """Between two steps; the one at the end is another matter."""
        every = self.training.evaluate_every
        return bool(every and 0 < self.step < self.steps and self.step % every == 0 and self._can_evaluate)

    @property
    def _was_cut_short(self) -> bool:
        """Whether the run was stopped after saving this step and before evaluating it."""
        return self._evaluation_is_due and not self._numbers_file.is_file()

    @property
    def _is_evaluated(self) -> bool:
        """Whether the last step was evaluated by an earlier start, of which this one trained nothing more."""
        return bool(self.processes.highest(self._numbers_file.is_file()))

    @property
    def _numbers_file(self) -> Path:
        return self.out / "eval" / f"step_{self.step:08d}.json"

    def _publish(self, model: LatentModel) -> None:
        self._save_model(model, "model")
        if self.training.sample_every:
            self._draw_if_possible(model)
        self.journal.say(f"finished: {self.out / 'model'}")

    def _evaluate(self, final: bool) -> bool:
        """New samples and the held-out ones before every judge that needs no download; whether it was done before a
        stop was asked for. All processes share the work, unless the model is cut up over them."""
        t = self.training
        self.journal.say(f"evaluating {t.evaluate_samples} new samples and the held-out ones")
        request = Request(num_samples=t.evaluate_samples, num_reference=20_000, seed=self.config.seed, batch_size=250)
        steps = None if final else t.evaluate_steps
        done = True

        def work(model: LatentModel) -> None:
            nonlocal done
            started = time.perf_counter()
            evaluator = Evaluator(
                model, self.splits, self.out / "eval" / "records", request, autocast=self._autocast,
                processes=None if self.sharded else self.processes, num_inference_steps=steps,
                stop=lambda: self.stop.received is not None,
            )  # fmt: skip
            try:
                evaluation = evaluator.run()
            except Interrupted:
                done = False
                return
            if self.processes.is_main:
                evaluator.clear("samples", "reconstructions")
                self._tell(model, evaluation, final, time.perf_counter() - started)

        with self._averaged() as model:
            if self.sharded:
                self.processes.on_main(lambda: work(model))
            else:
                work(model)
        return not self.processes.highest(not done)

    def _tell(self, model: LatentModel, evaluation: Evaluation, final: bool, seconds: float) -> None:
        """An evaluation's file, table and numbers; and the model, if it is the best so far."""
        about = {"preset": self.config.preset, "step": self.step, "fingerprint": model.fingerprint()}
        write(evaluation, self._numbers_file, about, seconds)
        numbers = {f"eval/{measured.key}": measured.row.value for measured in evaluation.numbers}
        self.journal.log(self.step, numbers)
        self.loggers.numbers(self.step, numbers)
        if self.training.best is not None:
            self._keep_best(model, evaluation, self.training.best)
        if final:
            self.journal.bar.stop()
            title = f"{self.config.preset}, step {self.step}: {self.training.evaluate_samples} samples, " \
                    f"{len(self.splits.held_out)} held-out"  # fmt: skip
            Console().print(table(evaluation.numbers, title))

    def _keep_best(self, model: LatentModel, evaluation: Evaluation, metric: str) -> None:
        """best/, a model folder, and best.json: which step it is of, and the number that says so."""
        path = self.out / "best.json"
        try:
            measured = evaluation.find(metric)
            before = read_json(path, "delete it") if path.is_file() and (self.out / "best").is_dir() else None
            better = before is None or is_better(measured.row, float(before["value"]))
        except (ValueError, KeyError, TypeError) as error:
            self.journal.warn("best", f"the best model is not kept: {first_line(error)}")
            return
        if not better or not math.isfinite(measured.row.value):
            return
        self._save_model(model, "best")
        write_json(path, {"step": self.step, "key": measured.key, "value": measured.row.value})
        self.journal.say(f"best so far: {measured.key} {measured.row.value:.4g} at step {self.step}")

    def _save_model(self, model: LatentModel, name: str) -> None:
        temporary = self.out / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        shutil.rmtree(self.out / name, ignore_errors=True)
        temporary.rename(self.out / name)

    # The run folder.

    def _try_data(self, modality: Modality) -> None:
        """Reads the run's first samples and weights of its losses: what is missing is refused before a folder is."""
        modality.prepare(self.device)
        count, all_usable = min(self.training.batch_size, 8), not self.training.bad_samples
        self.examples = try_samples(self.splits.train, self.config.seed, count, all_usable)

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
        logs = (self.out / "metrics.jsonl", self.out / "alarms.jsonl", *self.out.glob("bad_samples.rank*.jsonl"))
        for path in logs:
            trim(path, self.step)
        trim_snapshots(self.out, self.step)
        for path in (self.out / "eval").glob("step_*.json"):
            if path.stem[5:].isdigit() and int(path.stem[5:]) > self.step:
                path.unlink()
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
        if self.processes.is_main:
            say(f"memory: {self.memory}")
        for line in self.notes():
            say(line)

    def notes(self) -> list[str]:
        """What somebody about to start this run should know, a line each."""
        t = self.training
        lines = [
            f"{argument}, for instance: {'; '.join(names[:3])}" if fact == "examples" else
            f"{argument}: {len(names)} found in the data: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
            for argument, facts in self.splits.train.facts.items()
            for fact, names in facts.items()
            if isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        ]  # fmt: skip
        lines += [
            f"note: {argument}: the data have them, but no condition of this model reads them"
            for argument in self.splits.train.facts
            if argument not in self.model.conditions.arguments
        ]
        lines += [f"note: {line}" for line in unreachable(t.schedule, self.steps, self.samples / t.batch_size)]
        if t.ema_decay and 1 / (1 - t.ema_decay) > self.steps:
            lines.append(f"note: training.ema_decay {t.ema_decay} averages over more steps than the run has")
        if t.best is not None and not self._can_evaluate:
            lines.append("note: training.best does nothing without training.evaluate_samples and data.held_out")
        if t.batch_size > self.samples:
            lines.append(f"note: training.batch_size {t.batch_size} is more than the {self.amount} training samples")
        if t.shard and not self.sharded:
            lines.append("note: training.shard does nothing in a single process; start several with torchrun")
        if self.processes.is_main and (warning := self.memory.warning()):
            lines.append(f"note: {warning}")
        return lines

    @cached_property
    def memory(self) -> Memory:
        """What a step of this run will need, measured without allocating it."""
        example = collate(self.examples, self.model.modality)
        return estimate(self.config, example, self.device, self.processes.world)

    def _save(self) -> None:
        if self.saved == self.step:
            return
        self.processes.on_main(self.saving.wait)
        kinds = self._kinds()
        self._refuse_non_finite(kinds)
        self.saved = step = self.step
        tensors, facts = self._copies(kinds), self._facts() if self.processes.is_main else {}
        needed = sum(tensor.nbytes for copies in tensors.values() for tensor in copies.values())

        def write() -> None:
            ckpt.save(
                self.out / "checkpoints", step, lambda at: self._write(at, step, tensors, facts),
                self.training.keep_checkpoints, needed=needed,
            )  # fmt: skip

        self.processes.on_main(lambda: self.saving.start(write) if self.training.background_saving else write())

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensors of a checkpoint, as they are now."""
        kinds = {"model": self.model.state_dict(), "ema": self.ema.weights, "optimizer": self.optimizers.state()}
        if self.training.ema_profiles:
            kinds["ema_profiles"] = self.profiles.weights
        return kinds

    def _refuse_non_finite(self, kinds: dict[str, dict[str, Tensor]]) -> None:
        """FloatingPointError in all processes, naming the first tensor that is not finite in any: what is written is
        what later starts go on from."""
        own = first_non_finite(
            {f"{kind} {key}": value for kind, tensors in kinds.items() for key, value in tensors.items()}
        )
        if found := next(filter(None, self.processes.gather(own)), None):
            raise FloatingPointError(
                f"step {self.step}: {found} is not finite, so nothing of it is written; older checkpoints are "
                "untouched. Resume with a lower training.optimizer.learning_rate or training.precision=fp32"
            )

    def _copies(self, kinds: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Whole ones, which later steps do not change; of the first process. All come here together."""
        flat = {f"{kind}/{key}": value for kind, tensors in kinds.items() for key, value in tensors.items()}
        copies = self.snapshot.take(flat, keep=self.processes.is_main)
        return {kind: {key: copies[f"{kind}/{key}"] for key in kinds[kind] if copies} for kind in kinds}

    def _facts(self) -> dict[str, Any]:
        """state.json of a checkpoint, as it is now."""
        return {
            "step": self.step,
            "seed": self.config.seed,
            "batch_size": self.training.batch_size,
            "muon": self.training.optimizer.muon,
            "ema_profiles": list(self.training.ema_profiles),
            "data": self.fingerprint,
            "bad_samples": self.bad.state(),
            "skipped": self.skipped,
            "unilatent": __version__,
            "torch": torch.__version__,
        }

    def _write(self, folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        save_file(tensors["model"], folder / "model.safetensors")
        reach("save.after_model", step)
        save_file(tensors["ema"], folder / "ema.safetensors")
        save_file(tensors["optimizer"], folder / "optimizer.safetensors")
        if "ema_profiles" in tensors:
            save_file(tensors["ema_profiles"], folder / "ema_profiles.safetensors")
        write_config(self.model.config, folder / "config.json")
        (folder / "state.json").write_text(json.dumps(facts, indent=2) + "\n")

    def _load(self, checkpoint: Path) -> None:
        """Everything but the weights that a step depends on."""
        averages, optimizer = checkpoint / "ema.safetensors", checkpoint / "optimizer.safetensors"
        self.ema.load(read_weights(averages), averages)
        self.optimizers.load_state(read_weights(optimizer), optimizer)
        if self.training.ema_profiles:
            profiles = checkpoint / "ema_profiles.safetensors"
            self.profiles.load(read_weights(profiles), profiles)
        state = read_json(checkpoint / "state.json", "use an older checkpoint")
        self.step, self.skipped = state["step"], int(state.get("skipped", 0))
        if not self.data_changed:
            self.bad.load(state.get("bad_samples"))
        if checkpoint.parent.resolve() == (self.out / "checkpoints").resolve():
            self.saved = self.step

    def _specialise(self) -> None:
        """Recomputation, compilation and sharding of the repeated blocks; none changes a name or a weight."""
        for module in self.model.modules():
            if isinstance(module, Repeated):
                module.recompute = self.training.activation_checkpointing
                if self.training.compile:
                    module.compile()
        if self.sharded:
            shard(self.model, self.device, self.processes.world)

    def _refuse_unknown_best(self, modality: Modality) -> None:
        """A metric that no evaluation of this run will measure."""
        best = self.training.best
        known = [key for metric in choose_metrics(modality, ()) for key in metric.gives]
        if best is not None and best not in known:
            raise ConfigError(f"training.best: {best!r} is not measured while training; there are {', '.join(known)}")

    def _refuse_uneven_shards(self) -> None:
        """Processes that pass unlike numbers of micro-batches would wait for each other's blocks for ever."""
        t, world = self.training, self.processes.world
        passes = {len(list(micro_batches(range(1), t.batch_size, t.micro_batch_size, r, world))) for r in range(world)}
        if self.sharded and len(passes) > 1:
            raise ConfigError(
                f"training.batch_size: {t.batch_size} gives the {world} processes {min(passes)} to {max(passes)} "
                f"micro-batches, training.shard needs as many in each; make it a multiple of {world}"
            )


def _poison(gradients: list[Tensor], how: str) -> None:
    """What an armed fault does to gradients: one element not a number, or all of them zero."""
    if how == "nan":
        gradients[0].view(-1)[0] = float("nan")
    else:
        torch._foreach_zero_(gradients)


def first_non_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first of which this process's part holds NaN or infinity."""
    parts = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    sound: dict[torch.device, list[Tensor]] = {}
    for part in parts.values():
        sound.setdefault(part.device, []).append(part.isfinite().all())
    if all(bool(torch.stack(flags).all()) for flags in sound.values()):  # one wait for each device, where all is well
        return None
    return next(name for name, part in parts.items() if not part.isfinite().all())


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
