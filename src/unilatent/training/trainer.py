"""The loop of a run. Nothing here knows a paper or a modality.

`fit` is the recipe. One optimiser step is in `step`, what comes before the first in `setup`, checkpoints in `saving`,
images and evaluations in `monitoring`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..batches import Plan, collate, loader, worker_deaths
from ..config import ConfigError
from ..devices import peak_memory, resolve_precision, set_float32_products
from ..faults import reach
from ..listings import LISTING, Listings
from ..maths.streams import GENERATOR
from ..methods.base import LatentModel
from ..modalities.base import Modality, Splits
from ..plain_text import count_of
from ..processes import Processes
from ..registry import find
from ..runs import checkpoint as ckpt
from ..runs import lock
from ..runs.crash import first_line, write_report
from ..runs.journal import AlarmChange, Journal, Lines
from ..signals import FAILED, NOTHING, SAVE, STOP, StopRequest
from ..stored_latents import refuse_other_tokenizer
from ..terminal import lasting_output
from . import setup
from .alarms import Alarms
from .bad_samples import BadSamples
from .config import RunConfig
from .loggers import LoggedRun, Logger, Loggers, check_loggers, open_logger
from .memory import Memory, estimate, is_out_of_memory, micro_batch
from .monitoring import Monitor, check_evaluation
from .resuming import (
    changed_settings,
    find_checkpoint,
    keep_stored,
    refuse_fewer_steps,
    refuse_other_run,
    settings_without_effect,
    stored_precision,
)
from .saving import Checkpoints
from .schedule import factor
from .state import TrainingState, refuse_non_finite
from .step import MicroBatch, OptimiserStep, StepResult
from .step_batches import StepBatches, paired


class Trainer:
    """One run: its data, model, optimizers and folder.

    Building a Trainer checks everything that can be checked and writes nothing; `fit` trains.
    """

    def __init__(
        self, config: RunConfig, out: Path, resume: str | None = None, console: Console | None = None,
        allow_data_change: bool = False,
    ):  # fmt: skip
        """resume: None starts a new run (and refuses a folder that holds one), "auto" resumes from the newest valid
        checkpoint if there is one, a path from exactly that checkpoint.

        allow_data_change: resume although the data are not those that the checkpoint was written with.
        """
        self.out, self.console = out, console or Console(stderr=True)
        config = config.resolved()
        self.processes = Processes(config.training.device, config.training.timeout)
        self.listings = Listings(self.processes, out / LISTING)
        modality: Modality = find("modalities", config.modality.name)(config.modality)
        self.splits: Splits = modality.splits(config.data, self.listings)
        self.config = setup.completed(config, self.splits, self.processes)
        t = self.training = self.config.training
        self.samples = setup.count_samples(self.splits, t)
        self.steps = t.num_steps(self.samples)

        self.device = self.processes.device
        if t.threads:
            torch.set_num_threads(t.threads)
        self.sharded = bool(t.shard) and self.processes.world > 1
        setup.check_processes(t, self.processes.world)
        check_loggers(t.loggers)
        self.reference = check_evaluation(self.config, modality, self.splits, self.sharded, self.processes)
        self.checkpoint = find_checkpoint(out, resume, self.processes, self._print)
        if self.checkpoint is not None:
            self.config = keep_stored(self.checkpoint, modality, self.config, self.splits, self.processes)
        self.allow_data_change = allow_data_change
        self.automatic = t.precision == "auto"
        self.config = self.config.computing_in(self.processes.from_main(self._precision))
        self.training = self.config.training
        self.train_set = setup.training_set(self.config, self.splits, modality, self.processes)
        self.examples = setup.read_examples(self.config, self.train_set, modality, self.processes)
        self.data_changed = self.checkpoint is not None and self.processes.from_main(self._refuse_other_run)

        model = setup.build_model(self.config, self.checkpoint is not None, config.method, self.processes, self.sharded)
        model.precision = self.training.precision
        self.state = TrainingState(model, t)
        self.bad = BadSamples(t.bad_samples, self.samples, out, self.processes)
        self.checkpoints = Checkpoints(out / "checkpoints", self.state, self.config, self.processes, self.bad)
        self.optimise = OptimiserStep(
            self.state, self.config, self.processes, self.samples / t.batch_size,
            measure_gradients=t.log_gradients and not self.sharded,
        )  # fmt: skip
        self.stop = StopRequest()
        self.changed: list[str] = []
        self.compiled = self.monitored = False
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        refuse_other_tokenizer(self.train_set, model)
        self.processes.wait()  # nobody writes before everybody has looked

    def _precision(self) -> str:
        """What this run computes in; one that resumes keeps what it was trained in, if it is left to us."""
        trained = None if self.checkpoint is None else stored_precision(self.checkpoint)
        return resolve_precision(self.training.precision, self.device, trained)

    def _refuse_other_run(self) -> bool:
        """Whether the data changed since the checkpoint; ConfigError if that, or anything else, may not."""
        assert self.checkpoint is not None
        fingerprint = self.train_set.fingerprint
        return refuse_other_run(self.checkpoint, self.config, fingerprint, self.allow_data_change)

    def _restore(self, checkpoint: Path) -> None:
        facts = self.state.load(checkpoint, self.processes)
        refuse_fewer_steps(checkpoint, self.step, self.steps, self.training)
        if self.step < self.steps:
            if self.processes.is_main:
                self.changed = changed_settings(checkpoint, self.training, self.automatic)
            if facts.get("noise") != GENERATOR:
                self.changed.append(
                    "the checkpoint is from a version that drew other random numbers: the run goes on with other noise "
                    "than it would have had there"
                )
        elif self.processes.is_main:
            self.changed = settings_without_effect(self.out, self.config)
        if not self.data_changed:
            self.bad.load(facts.get("bad_samples"))
        if checkpoint.parent.resolve() == (self.out / "checkpoints").resolve():
            self.checkpoints.saved = self.step
        if reason := self.bad.refusal(self.step * self.training.batch_size):
            raise ConfigError(reason)

    @property
    def model(self) -> LatentModel:
        return self.state.model

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    # The recipe.

    def fit(self) -> Path:
        """Train to the end and return the folder of the finished model; a run that is stopped early can be resumed."""
        set_float32_products(self.device, self.training.precision)
        self.processes.on_main(self._open_folder)
        with lasting_output(), self._crash_reports(), self._open_journal(), self.stop:
            self._announce()
            if self.monitor.was_cut_short(self.steps):
                self.monitor.evaluate(final=False)
            with self._data() as micro:
                for _ in self._train(micro):
                    self._monitor_and_save()
            self.checkpoints.save_now()
            if self.step == self.steps and self._finish():
                return self.out / "model"
            name = self.stop.received.name if self.stop.received else "stop"
            self.journal.say(f"{name}: saved step {self.step}; resume with --resume auto")
        return self.out

    def _train(self, micro: Iterator[MicroBatch]) -> Iterator[None]:
        """Take optimiser steps until the end or until asked to stop."""
        since, done = time.perf_counter(), 0
        request = self.processes.highest(self._request())
        while self.step < self.steps and request != STOP:
            if request == FAILED:
                self.checkpoints.wait()  # raises what failed
            if request == SAVE:
                self.checkpoints.save_now()
                self.journal.say(f"asked to save: step {self.step} is saved, training continues")
            reach("step.start", self.step)
            log_is_due, begun = self._log_is_due, time.perf_counter()
            result = self._one_step(StepBatches(micro, self._micro_batches_per_step))
            self.state.advance()
            self._note_compiled(time.perf_counter() - begun)
            if result.counts["bad_samples"]:
                self._settle_bad_samples()
            done += self.training.batch_size
            self.journal.advance(self.step)
            self._raise_alarms(self.alarms.after_step(self.step, result.grad_norm))
            if log_is_due:
                self._log(result.logs, done / (time.perf_counter() - since))
                since, done = time.perf_counter(), 0
            yield
            request = self._next_request(result.counts)

    def _note_compiled(self, seconds: float) -> None:
        """Say how long the first step took, in which the networks are compiled."""
        if not self.compiled and setup.compiles(self.training, self.model):
            self.journal.say(f"compiled: step {self.step} took {seconds:.0f} s; the next ones are faster")
            self.compiled = True

    def _one_step(self, micro: StepBatches) -> StepResult:
        """One optimiser step; returns what is to be logged. A step that is not finite is left out, or ends the run."""
        result = self.optimise(micro, measure=self._log_is_due, count=self._counts)
        if result.finite:
            self.state.skipped = 0
        else:
            self._leave_out(result.logs)
        return result

    def _monitor_and_save(self) -> None:
        """What is done once in a while, after a step; what happens at the end of the run is in `_finish`."""
        t, step = self.training, self.step
        snapshot_every = t.ema_snapshot_every or t.checkpoint_every
        snapshot_is_due = step == self.steps or (snapshot_every and step % snapshot_every == 0)
        due: list[Callable[[], object]] = []
        if t.sample_every and step % t.sample_every == 0 and step < self.steps:
            due.append(self.monitor.draw)
        if t.ema_profiles and snapshot_is_due:
            due.append(partial(self.checkpoints.save_ema_snapshot, self.out, self.journal.warn))
        if t.checkpoint_every and step % t.checkpoint_every == 0 and step < self.steps:
            due.append(self.checkpoints.save)
        if self.monitor.evaluation_is_due(self.steps):
            due.append(partial(self.monitor.evaluate, final=False))
        for work in due:
            work()
        self.monitored = bool(due)

    def _finish(self) -> bool:
        """The finished model, its images and its table; False if a stop request came before all of it was done."""
        if self.bad.indices:
            self.journal.say(self.bad.summary())
        files = self.state.tensors()
        refuse_non_finite({name: files[name] for name in ("model", "ema")}, self.step, self.processes)
        if not self.monitor.publish():
            return False
        if self.monitor.can_evaluate and self.monitor.is_evaluated:
            self.journal.say(f"evaluated before: {self.monitor.evaluation_file}")
            return True
        return not self.monitor.can_evaluate or self.monitor.evaluate(final=True)

    # Opening and closing.

    def _open_folder(self) -> None:
        setup.open_run_folder(self.out, self.step, self.config, self._environment, trains=self.step < self.steps)
        self.checkpoints.fingerprint = self.train_set.fingerprint  # of the data as they are now
        self.listings.write()

    @contextlib.contextmanager
    def _open_journal(self) -> Iterator[None]:
        """Journal, loggers, alarms and monitor of the run, until the block ends."""
        quiet = not self.processes.is_main
        with (
            Journal(self.out, self.steps, self.step, self.console, quiet=quiet) as self.journal,
            Loggers(self._loggers(), self.journal.warn) as self.loggers,
        ):
            self.alarms = Alarms(self.steps, min(self.model.latent_channels, self.training.batch_size - 1))
            if self.processes.is_main:
                self.alarms.replay(self.out / "metrics.jsonl")
            self.monitor = Monitor(
                self.out, self.state, self.config, self.splits, self.processes, self.sharded, self.stop, self.journal,
                self.loggers, self.reference,
            )  # fmt: skip
            yield

    def _loggers(self) -> dict[str, Callable[[], Logger]]:
        """What opens each requested logger; only the first process logs."""
        if not self.processes.is_main:
            return {}
        run = LoggedRun(self.out, self.step, self.training.wandb_project, self.training.wandb_name, self.config.plain())
        return {name: partial(open_logger, name, run) for name in self.training.loggers}

    @contextlib.contextmanager
    def _crash_reports(self) -> Iterator[None]:
        """Write a crash report when training fails, say how to resume, and release the run folder in any case."""
        try:
            with worker_deaths():
                yield
        except Exception as error:
            if (unsaved := self.checkpoints.writer.settle()) is not None and unsaved is not error:
                error.add_note(f"besides: {unsaved}")
            report = write_report(self.out, self.processes.rank, error, self.config.to_yaml(), self._environment)
            self._print(f"crash report: {report}")
            if is_out_of_memory(error):
                raise MemoryError(self._way_out_of_memory(error)) from error
            raise
        finally:
            if self.processes.is_main:
                lock.release(self.out)

    @property
    def _environment(self) -> dict[str, object]:
        return setup.environment(self.device, self.processes.world, self.training.precision)

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

    # Data.

    @contextlib.contextmanager
    def _data(self) -> Iterator[Iterator[MicroBatch]]:
        """This process's remaining micro-batches and the positions of their samples; readers end with the block."""
        t, positions = self.training, self._positions(range(self.step, self.steps))
        batches = loader(
            self.train_set, self.model.modality, positions, self.config.seed, t.workers,
            pin_memory=self.device.type == "cuda", timeout=t.worker_timeout,
        )  # fmt: skip
        with contextlib.closing(batches):
            yield paired(positions, self.bad.passing(batches))

    def _positions(self, steps: range) -> Plan:
        """Positions, in the infinite sample sequence, of this process's micro-batches in these steps."""
        t, p = self.training, self.processes
        return Plan(steps, t.batch_size, t.micro_batch_size, p.rank, p.world)

    @property
    def _micro_batches_per_step(self) -> int:
        return len(list(self._positions(range(1))))

    def _settle_bad_samples(self) -> None:
        """Share this step's bad samples among processes; too many end the run, which is saved so that it can resume."""
        self.bad.settle(self.step, self.journal.say, self.journal.warn)
        if reason := self.bad.refusal(self.step * self.training.batch_size):
            self.checkpoints.save()
            raise ConfigError(reason)

    # Steps.

    def _request(self) -> int:
        """What this process has been asked to do, or has to report."""
        return FAILED if self.checkpoints.writer.failed else self.stop.take()

    def _counts(self) -> dict[str, int]:
        """What all processes must know of this one after a step."""
        request = self._request()
        return {"bad_samples": len(self.bad.met)} | {str(kind): int(kind == request) for kind in (SAVE, STOP, FAILED)}

    def _next_request(self, counts: dict[str, int]) -> int:
        """The highest request of all processes. It came with the numbers of the step, and is asked for again where that
        costs nothing or much time has passed since."""
        request = max((kind for kind in (SAVE, STOP, FAILED) if counts[str(kind)]), default=NOTHING)
        if self.processes.world == 1 or self.monitored:
            request = max(request, self.processes.highest(self._request()))
        return request

    def _leave_out(self, logs: dict[str, Tensor]) -> None:
        """Note a step that is not finite; FloatingPointError once there are more in a row than `non_finite` allows."""
        self.state.skipped += 1
        names = ", ".join(key for key, value in logs.items() if not torch.isfinite(value))
        self._note_bad_batch(names)
        allowed, skipped, step = self.training.allowed_skips, self.state.skipped, self.step + 1
        if skipped > allowed:
            span = f"steps {step + 1 - skipped} to {step}" if allowed else f"step {step}"
            raise FloatingPointError(
                f"{span}: {names} is not finite; the weights are those of step {step - skipped}. Resume with a lower "
                "training.optimizer.learning_rate or training.precision=fp32, or leave such steps out with "
                "training.non_finite=skip:10"
            )
        self.journal.say(f"step {step}: {names} is not finite; left out ({skipped} in a row)")

    def _note_bad_batch(self, names: str) -> None:
        """Write down the samples of a step that is not finite."""
        micro = self._positions(range(self.step, self.step + 1))
        indices = [self.train_set.index_at(self.config.seed, p) for positions in micro for p in positions]
        record = {"step": self.step + 1, "rank": self.processes.rank, "not_finite": names, "samples": indices}
        Lines(self.out / f"bad_batches.rank{self.processes.rank}.jsonl", self.journal.warn).write(json.dumps(record))

    # Words and numbers.

    @property
    def _log_is_due(self) -> bool:
        """Whether the step about to be taken is logged."""
        return (self.step + 1) % self.training.log_every == 0 or self.step + 1 == self.steps

    def _log(self, logs: dict[str, Tensor], speed: float) -> None:
        values = torch.stack([value.double() for value in logs.values()]).tolist()
        numbers = {key: value for key, value in zip(logs, values, strict=True) if math.isfinite(value)}
        rate = factor(self.training.schedule, self.step, self.samples / self.training.batch_size)
        seen = self.step * self.training.batch_size
        numbers |= {
            "learning_rate": rate * self.training.optimizer.peak,
            "samples": seen,
            "epoch": seen / self.samples,
            "samples_per_second": speed,
            "bad_samples": len(self.bad.indices),
        }
        if (peak := peak_memory(self.device)) is not None:
            numbers["memory_gib"] = peak / 2**30
        self.journal.log(self.step, numbers)
        self.loggers.numbers(self.step, numbers)
        self._raise_alarms(self.alarms.after_log(self.step, numbers))

    def _raise_alarms(self, changes: list[AlarmChange]) -> None:
        for change in changes:
            self.journal.alarm(change)

    def _print(self, line: str) -> None:
        """Print where no journal is open."""
        with lasting_output():
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _announce(self) -> None:
        t, say = self.training, self.journal.say
        say(
            f"{self.config.preset}: {self.model.num_trainable:,} parameters, {self.amount} training samples, "
            f"{len(self.splits.held_out):,} held out, {count_of(self.steps, 'step')} of {t.batch_size}, {self.device}, "
            f"{self.precision}"
        )
        if self.checkpoint is not None:
            done = "; the run is complete, nothing is left to train" if self.step == self.steps else ""
            say(f"resumed from {self.checkpoint} at step {self.step}{done}")
        if self.data_changed:
            say(
                "the data are not those the checkpoint was written with: from here on other samples come, in another "
                "order"
            )
        if self.processes.is_main:
            say(f"memory: {self.memory}")
            for line in self.notes():
                say(line)
            say(self._where_to_look())

    def _where_to_look(self) -> str:
        """Where a run shows itself, in words."""
        given = "" if self.config.given is None else f", {self.out / 'given'}"
        every = self.training.sample_every
        when = f"every {count_of(every, 'step')} and at the end" if every else "none (training.sample_every=0)"
        return (
            f"images: {self.out / 'samples'}, {self.out / 'recon'}{given}, {when}; curves: {self.out / 'curves.png'}; "
            f"numbers: {self.out / 'metrics.jsonl'}"
        )

    def notes(self) -> list[str]:
        """What somebody who starts this run should know, one line each."""
        lines = [f"note: {line}" for line in self.changed]
        lines += setup.notes(self.config, self.splits, self.model, self.steps, self.samples, self.processes.world)
        if self.step < self.steps and self.processes.is_main:
            lines += [f"note: {line}" for line in setup.slow(self.training, self.model)]
        if self.processes.is_main and (warning := self.memory.warning()):
            lines.append(f"note: {warning}")
        if self.processes.is_main and (scarce := self.checkpoints.space_note(self.steps)):
            lines.append(f"note: {scarce}")
        return lines

    @property
    def precision(self) -> str:
        """What the run computes in, in words."""
        return self.training.precision + (" (auto)" if self.automatic else "")

    @property
    def amount(self) -> str:
        """The number of training samples, in words."""
        return setup.amount(self.samples)

    @cached_property
    def memory(self) -> Memory:
        """What a step of this run will need, measured without allocating it."""
        example = collate(self.examples, self.model.modality)
        return estimate(self.config, example, self.device, self.processes.world)
