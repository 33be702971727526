"""What a run shows of itself: samples, reconstructions, curves and evaluations, always of the EMA weights."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..batches import shown_batch, shown_size
from ..config import ConfigError
from ..evaluation.evaluate import (
    EvaluatedMetric,
    Evaluation,
    EvaluationRequest,
    Evaluator,
    Interrupted,
    SampleSet,
    choose_metrics,
    heavy_spaces,
    prepare,
)
from ..evaluation.reference import find_reference
from ..evaluation.table import as_json, from_json, is_better, table, write_evaluation
from ..faults import reach
from ..files import read_json, write_json
from ..listings import Listings
from ..maths.solvers import ADAPTIVE
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..modalities.base import Modality, Splits
from ..model_card import CARD, PICTURES, RECORD, card_of, is_untouched, write_card, write_record
from ..processes import Processes
from ..runs.crash import first_line
from ..runs.curves import draw_curves
from ..runs.journal import Journal
from ..runs.record import record_of
from ..sampling import reconstruct, sample_batches, sample_rows
from ..signals import StopRequest
from ..tables import show
from ..types import Given
from .config import RunConfig
from .loggers import Loggers
from .memory import OUT_OF_MEMORY, is_out_of_memory
from .state import TrainingState
from .whole import whole_copy

MAX_REFERENCE = 20_000
"""Training samples that an evaluation during a run is compared with, at most, unless it names its metrics."""
DRAWN, BATCH = 16, 64
"""Held-out samples whose reconstructions are drawn, at most; samples of one forward pass for drawing."""

BEST = "best.json"
"""The file of RUN/best with the model's number, so that both become visible with one renaming."""
BEGIN_AGAIN = "delete best/ to begin again"


def check_evaluation(
    config: RunConfig, modality: Modality, splits: Splits, sharded: bool, processes: Processes
) -> SampleSet | None:  # fmt: skip
    """Check, before anything is trained, all that the evaluations of a run will need; return their reference, None for
    the training data.

    ConfigError names an unknown metric, what it lacks (weights, a package,
    held-out samples, a file), or a solver with which processes cannot share a sharded model.
    """
    t = config.training
    try:
        metrics = choose_metrics(modality, t.evaluate_metrics)
    except ValueError as error:
        raise ConfigError(f"training.evaluate_{error}") from None
    known = t.evaluate_metrics or [key for metric in metrics for key in metric.gives]
    if t.best is not None and t.best not in known:
        raise ConfigError(
            f"training.best: {t.best!r} is not measured while training; there are {', '.join(known)}. Others are "
            "measured if training.evaluate_metrics names them"
        )
    solver = config.sampling.solver
    if sharded and solver in ADAPTIVE and (t.sample_every or t.evaluate_samples):
        raise ConfigError(
            f"sampling.solver: {solver} takes other steps for other samples, but the processes of a sharded model need "
            "equally many; use heun, or training.sample_every=0 training.evaluate_samples=0"
        )
    if not t.evaluate_samples:
        return None
    if t.evaluate_metrics and not len(splits.held_out):
        reconstructions = [key for metric in metrics if metric.track != "generation" for key in metric.gives]
        if lacking := [key for key in t.evaluate_metrics if key in reconstructions]:
            raise ConfigError(f"training.evaluate_metrics: {lacking[0]} needs held-out samples; set data.held_out")
    try:
        heavy = heavy_spaces(modality, metrics)
        processes.on_main(lambda: prepare(heavy, torch.device("cpu"), Processes.alone()))
    except ValueError as error:
        way_out = "training.evaluate_samples=0 trains without evaluation"
        raise ConfigError(f"training.evaluate_metrics: {error}. {way_out}") from None
    try:
        source = t.evaluate_reference
        return None if source is None else find_reference(modality, source, Listings(processes))
    except ValueError as error:
        raise ConfigError(f"training.evaluate_reference: {error}") from None


class Monitor:
    """Draws and evaluates a run. All methods are collective; a stop request interrupts them between two batches.

    The processes share the samples. A sharded model they run together, each on its own samples. The first process alone
    computes the metrics, draws and writes; meanwhile the others wait without a timeout (`Processes.meet`).

    sharded: whether the model is. reference: what new samples are compared with; None: training samples.
    """

    def __init__(
        self, run: Path, state: TrainingState, config: RunConfig, splits: Splits, processes: Processes, sharded: bool,
        stop: StopRequest, journal: Journal, loggers: Loggers, reference: SampleSet | None = None,
    ):  # fmt: skip
        self.run, self.state, self.config, self.splits, self.processes = run, state, config, splits, processes
        self.sharded, self.stop, self.journal, self.loggers = sharded, stop, journal, loggers
        self.training, self.reference = config.training, reference
        if processes.is_main:
            for name in ("model", "best"):
                settle(run / name)

    # Images.

    def draw(self) -> bool:
        """Samples, reconstructions and curves of this step, in RUN/samples, RUN/recon and RUN/curves.png.

        Failing to draw (a full disk, no memory) costs one warning, not the run; only a process without memory for its
        part of a sharded model ends it. False if a stop request came first.
        """
        with self.state.ema.applied(self.state.model):
            pictures = self._pictures()
        if pictures is None:
            return False
        self.processes.on_main(lambda: self._draw(*pictures))
        return True

    def publish(self) -> bool:
        """Write the finished model to RUN/model and draw it; False if a stop request came first."""
        with self.state.ema.applied(self.state.model):
            self._save_model("model")
            fingerprint = self.state.model.fingerprint()
        if self.training.sample_every and not self.draw():
            return False
        self.processes.on_main(partial(self._describe, fingerprint))
        self.journal.say(f"finished: {self.run / 'model'}")
        return True

    def _pictures(self) -> tuple[list[dict[str, Any]], str | None] | None:
        """What is to be drawn, in parts, from all processes in the first; or else the reason why one of them could not
        make its own. None in all of them if a stop request came first."""
        count = min(self.training.num_samples, shown_size(self.splits, DRAWN))
        parts: list[dict[str, Any]] = []
        faults: list[str] = []
        kinds = [(self.training.num_samples, self._new_samples), (count, self._reconstructions)]
        if self.config.given is not None:
            kinds.append((count, self._completions))
        for num, make in kinds:
            rank, world = self.processes.rank, self.processes.world
            own = range(rank * num // world, (rank + 1) * num // world)
            turns, batches = self._collecting(make(own, num), parts, faults), -(-len(own) // BATCH)
            company = partial(_first_of, partial(make, range(1), num)) if self.sharded else None
            if not self.processes.take_turns(turns, batches, self._is_stopped, company):
                return None
        fault = next(filter(None, self.processes.gather(next(iter(faults), None))), None)
        gathered = None if fault else self.processes.gather_on_main(parts)
        return [part for of_one in gathered or () for part in of_one], fault

    def _collecting(
        self, made: Iterator[dict[str, Any]], parts: list[dict[str, Any]], faults: list[str]
    ) -> Iterator[None]:  # fmt: skip
        """Put what is made into `parts`, and a reason why the rest cannot be made into `faults`."""
        try:
            for part in made:
                parts.append({name: self.state.model.modality.drawable(data) for name, data in part.items()})
                yield
        except (OSError, *OUT_OF_MEMORY) as error:
            if self.sharded or not _is_bearable(error):  # the others would wait for this process's shards
                raise
            faults.append(first_line(error))

    def _new_samples(self, rows: range, count: int) -> Iterator[dict[str, Any]]:
        model = self.state.model
        for batch in sample_batches(
            model, count, seed=self.config.seed, batch_size=BATCH, start=rows.start, stop=rows.stop,
            precision=self.training.precision, to=model.device,
        ):  # fmt: skip
            yield {"samples": batch.data}

    def _reconstructions(self, rows: range, count: int) -> Iterator[dict[str, Any]]:
        model, seed, precision = self.state.model, self.config.seed, self.training.precision
        if rows:
            real = shown_batch(self.splits, model.modality, rows, count).data
            yield {"real": real, "recon": reconstruct(model, real, seed=seed, start=rows.start, precision=precision)}

    def _completions(self, rows: range, count: int) -> Iterator[dict[str, Any]]:
        """Held-out samples, completed from parts that are drawn as in training."""
        model, seed, settings = self.state.model, self.config.seed, self.config.given
        assert settings is not None
        if not rows:
            return
        batch = shown_batch(self.splits, model.modality, rows, count)
        kinds = settings.kinds or model.modality.given_kinds
        given = Given(batch.data, model.modality.draw_mask(batch.data, Streams(("drawn", seed), rows), kinds))
        made = sample_rows(
            model, rows, batch.values, self.config.sampling, seed, self.training.precision, given=given
        )  # fmt: skip
        yield {"given": model.modality.fill(given), "completed": made.data, "true": batch.data}

    def _is_stopped(self) -> bool:
        return self.stop.received is not None

    def _draw(self, parts: list[dict[str, Any]], fault: str | None) -> None:
        """Draw a grid of samples, one of held-out samples above their reconstructions, one of what was given of them,
        how the model completed it and how they are, and the curves."""
        try:
            if fault is None:
                self._draw_grids(parts)
        except (OSError, *OUT_OF_MEMORY) as error:
            if not _is_bearable(error):
                raise
            fault = first_line(error)
        if fault is not None:
            self.journal.warn("images", f"images of step {self.state.step} not drawn: {fault}")
        try:
            draw_curves(self.run / "metrics.jsonl", self.run / "curves.png")
        except Exception as error:  # whatever a plotting library raises
            self.journal.warn("curves", f"curves of step {self.state.step} not drawn: {first_line(error)}")

    def _draw_grids(self, parts: list[dict[str, Any]]) -> None:
        modality, conditions = self.state.model.modality, self.state.model.conditions
        name = f"step_{self.state.step:08d}.png"

        def of(*names: str) -> list[Any]:
            return [modality.join([part[name] for part in parts if name in part]) for name in names]

        [samples], recon = of("samples"), of("real", "recon")
        captions = conditions.grid_captions(conditions.parse(self.training.num_samples, {}))
        modality.draw_grid([samples], self.run / "samples" / name, columns=conditions.columns, captions=captions)
        modality.draw_grid(recon, self.run / "recon" / name)
        if self.config.given is not None:
            modality.draw_grid(of("given", "completed", "true"), self.run / "given" / name)
        for kind in ("samples", "recon", *(["given"] if self.config.given is not None else [])):
            self.loggers.image(self.state.step, kind, self.run / kind / name)

    # Evaluations.

    @property
    def can_evaluate(self) -> bool:
        return bool(self.training.evaluate_samples and (self.training.evaluate_metrics or len(self.splits.held_out)))

    def evaluation_is_due(self, steps: int) -> bool:
        """Whether this step is evaluated while training; the last of `steps` is evaluated at the end."""
        every, step = self.training.evaluate_every, self.state.step
        return bool(every and 0 < step < steps and step % every == 0 and self.can_evaluate)

    def was_cut_short(self, steps: int) -> bool:
        """Whether the run was stopped after this step was saved and before it was evaluated."""
        return bool(self.processes.highest(self.evaluation_is_due(steps) and not self.evaluation_file.is_file()))

    @property
    def is_evaluated(self) -> bool:
        """Whether an earlier launch evaluated this step already."""
        return bool(self.processes.highest(self.evaluation_file.is_file()))

    @property
    def evaluation_file(self) -> Path:
        return self.run / "eval" / f"step_{self.state.step:08d}.json"

    def evaluate(self, final: bool) -> bool:
        """Evaluate new samples and held-out reconstructions; False if a stop request came first."""
        t, model = self.training, self.state.model
        held_out = " and the held-out ones" if len(self.splits.held_out) else ""
        self.journal.say(f"evaluating {t.evaluate_samples} new samples{held_out}")
        request = EvaluationRequest(
            metrics=t.evaluate_metrics, num_samples=t.evaluate_samples, seed=self.config.seed, batch_size=250,
            precision=t.precision, **({} if t.evaluate_metrics else {"num_reference": MAX_REFERENCE}),
        )  # fmt: skip
        started = time.perf_counter()
        with self.state.ema.applied(model):
            evaluator = Evaluator(
                model, self.splits, self.run / "eval" / "records", request, reference=self.reference,
                processes=self.processes, num_inference_steps=None if final else t.evaluate_steps,
                restarts=None if final or t.evaluate_steps is None else 0,
                stop=self._is_stopped, progress=self.journal.tasks.advance,
            )  # fmt: skip
            for line in evaluator.notes:
                self.journal.warn(line, line)
            try:
                evaluation = evaluator.run()
            except Interrupted:
                return False
            finally:
                self.journal.tasks.clear()

            best = self.processes.from_main(partial(self._best_of, evaluation))
            if best is not None:
                self._save_model("best", best)
            # A kill before the evaluation's file is there repeats the evaluation; its records are kept until then.
            self.processes.on_main(
                partial(self._report, evaluation, evaluator.fingerprint, final, time.perf_counter() - started)
            )
            reach("evaluation.written", self.state.step)
            self.processes.on_main(partial(evaluator.clear, "samples", "reconstructions", "unconditional"))
        return True

    def _report(self, evaluation: Evaluation, fingerprint: str, final: bool, seconds: float) -> None:
        """Write an evaluation's file and numbers, and print the table of the last one."""
        step = self.state.step
        about = {"preset": self.config.preset, "step": step, "fingerprint": fingerprint}
        reach("evaluation.before_file", step)
        write_evaluation(evaluation, self.evaluation_file, about, seconds)
        numbers = {f"eval/{metric.key}": metric.row.value for metric in evaluation.numbers}
        self.journal.log(step, numbers)
        self.loggers.numbers(step, numbers)
        if evaluation.missing:
            self.journal.warn("missing", f"not measured, the data do not allow it: {', '.join(evaluation.missing)}")
        if final:
            self._describe(fingerprint)
            self.journal.bar.stop()
            held_out = f", {len(self.splits.held_out)} held-out" if len(self.splits.held_out) else ""
            title = f"{self.config.preset}, step {step}: {self.training.evaluate_samples} samples{held_out}"
            show(table(evaluation.numbers, title))

    def _best_of(self, evaluation: Evaluation) -> dict[str, Any] | None:
        """The number of a model that is better than that in RUN/best, with its step, as best/best.json has it; None if
        it is not better. Numbers of different protocols are not compared: the model that is there stays."""
        metric, folder = self.training.best, self.run / "best"
        if metric is None:
            return None
        try:
            found = evaluation.find(metric)
            before = -math.inf if found.row.better == "higher" else math.inf
            if folder.is_dir():
                best = _number_of(folder)
                if reason := _incomparable(found, best):
                    self.journal.warn("protocol", f"best/ stays: {reason}; {BEGIN_AGAIN}")
                    return None
                before = best.row.value
            better = is_better(found.row, before) and math.isfinite(found.row.value)
        except ValueError as error:
            self.journal.warn("best", f"the best model is not kept: {first_line(error)}")
            return None
        return {"step": self.state.step, **as_json(found)} if better else None

    def _save_model(self, name: str, best: dict[str, Any] | None = None) -> None:
        """Write the model, with the weights that it has now, to a model folder of the run: after a kill it is the old
        or the new one (`settle`). A model card that is there, and files of others, are kept.

        best: the number for which it is the best model, in best.json.

        This alone needs the whole model in one place: in the first process's CPU memory, to which a sharded one is
        gathered tensor by tensor.
        """
        model = whole_copy(self.state.model, keep=self.processes.is_main) if self.sharded else self.state.model
        self.processes.on_main(partial(self._write_model, model, self.run / name, best))

    def _describe(self, fingerprint: str) -> None:
        """Write what is known of the finished model to its folder: its card, its numbers, its images."""
        folder, record = self.run / "model", record_of(self.run, fingerprint)
        try:
            write_record(folder, record)
            write_card(folder, card_of(self.state.model.facts(), record))
        except OSError as error:
            self.journal.warn("card", f"the card of {folder} is not written: {first_line(error)}")

    def _write_model(self, model: LatentModel, folder: Path, best: dict[str, Any] | None) -> None:
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        if best is not None:
            write_json(temporary / BEST, best)
        reach("model.before_rename", self.state.step)
        if folder.exists():
            folder.rename(_aside(folder))
            reach("model.set_aside", self.state.step)
        temporary.rename(folder)
        reach("model.after_rename", self.state.step)
        settle(folder)
        if best is not None:
            self.journal.say(f"best so far: {best['key']} {best['value']:.4g} at step {best['step']}")


def settle(folder: Path) -> None:
    """End the replacement of a model folder: move what is kept of the old one, then remove it. If a kill came before
    the new one was in place, the old one returns."""
    old = _aside(folder)
    if not old.is_dir():
        return
    if not folder.exists():
        old.rename(folder)
        return
    for path in old.iterdir():
        if path.name in (RECORD, *PICTURES):
            continue
        if (path.name == CARD and not is_untouched(path)) or not (folder / path.name).exists():
            path.replace(folder / path.name)
    shutil.rmtree(old)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _number_of(folder: Path) -> EvaluatedMetric:
    """The number of the model in RUN/best; ValueError if it has none."""
    try:
        return from_json(read_json(folder / BEST, BEGIN_AGAIN))
    except (KeyError, TypeError):
        raise ValueError(f"{folder / BEST}: not the number of a model; {BEGIN_AGAIN}") from None


def _is_bearable(error: BaseException) -> bool:
    """Whether an error of drawing does not stop a run: a full disk, no memory."""
    return isinstance(error, OSError) or is_out_of_memory(error)


def _incomparable(found: EvaluatedMetric, best: EvaluatedMetric) -> str:
    """Why a number cannot be compared with that of the best model; "" if it can."""
    if found.row.key != best.row.key:
        return f"its number is {best.key}, this one {found.key}"
    differing = found.protocol.differences(best.protocol)
    if not differing:
        return ""
    what, now, then = differing[0]
    return f"its {best.key} has {what} {then}, this number {now}"


def _first_of(make: Callable[[], Iterator[object]]) -> None:
    next(make())
