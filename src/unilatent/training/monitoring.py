"""What a run shows of itself: samples, reconstructions, curves and evaluations, always of the EMA weights."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..batches import load_all
from ..config import ConfigError
from ..evaluation.evaluate import Evaluation, EvaluationRequest, Evaluator, Interrupted, choose_metrics
from ..evaluation.table import is_better, table, write_evaluation
from ..files import read_json, write_json
from ..methods.base import LatentModel
from ..modalities.base import Modality, Splits
from ..processes import Processes
from ..runs.crash import first_line
from ..runs.curves import draw_curves
from ..runs.journal import Journal
from ..sampling import reconstruct, sample
from ..signals import Stopped, StopRequest
from .config import RunConfig
from .loggers import Loggers
from .memory import OUT_OF_MEMORY, is_out_of_memory
from .state import TrainingState
from .twin import twin

CARD = "README.md"
"""Of a model folder: users edit it."""
MAX_REFERENCE = 20_000
"""Training samples that an evaluation during a run is compared with, at most."""


def refuse_unknown_best(best: str | None, modality: Modality) -> None:
    """ConfigError if `training.best` is a metric that no evaluation of a run measures."""
    known = [key for metric in choose_metrics(modality, ()) for key in metric.gives]
    if best is not None and best not in known:
        raise ConfigError(f"training.best: {best!r} is not measured while training; there are {', '.join(known)}")


class Monitor:
    """Draws and evaluates a run. All methods are collective; a stop request interrupts them between two batches.

    sharded: whether the model is; then the first process works on an unsharded copy of it.
    """

    def __init__(
        self, run: Path, state: TrainingState, config: RunConfig, splits: Splits, processes: Processes, sharded: bool,
        stop: StopRequest, journal: Journal, loggers: Loggers,
    ):  # fmt: skip
        self.run, self.state, self.config, self.splits, self.processes = run, state, config, splits, processes
        self.sharded, self.stop, self.journal, self.loggers = sharded, stop, journal, loggers
        self.training = config.training

    # Images.

    def draw(self) -> None:
        """Samples, reconstructions and curves of this step, in RUN/samples, RUN/recon and RUN/curves.png."""
        self._on_main(self._draw_if_possible)

    def publish(self) -> bool:
        """Write the finished model to RUN/model and draw it; False if a stop request came first."""

        def work(model: LatentModel) -> None:
            self._save_model(model, "model")
            if self.training.sample_every:
                self._draw_if_possible(model)
            self.journal.say(f"finished: {self.run / 'model'}")

        return self._on_main(work)

    def _draw_if_possible(self, model: LatentModel) -> None:
        """Failing to draw (a full disk, no memory) costs one warning, not the run."""
        try:
            self._draw(model)
        except (OSError, *OUT_OF_MEMORY) as error:
            if not (isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            self.journal.warn("images", f"images of step {self.state.step} not drawn: {first_line(error)}")
        try:
            draw_curves(self.run / "metrics.jsonl", self.run / "curves.png")
        except Exception as error:  # whatever a plotting library raises
            self.journal.warn("curves", f"curves of step {self.state.step} not drawn: {first_line(error)}")

    def _draw(self, model: LatentModel) -> None:
        """A grid of samples, and one of held-out samples above their reconstructions."""
        name = f"step_{self.state.step:08d}.png"
        modality, t, seed = model.modality, self.training, self.config.seed
        dataset = self.splits.held_out if len(self.splits.held_out) else self.splits.train
        real = load_all(dataset, modality, limit=min(t.num_samples, 16)).data
        self.stop.between_batches()
        samples = sample(
            model, t.num_samples, seed=seed, precision=t.precision, progress=self.stop.between_batches
        )  # fmt: skip
        reconstructions = reconstruct(model, real, seed=seed, precision=t.precision)
        conditions = self.state.model.conditions
        captions = conditions.grid_captions(conditions.parse(t.num_samples, {}))
        modality.draw_grid([samples], self.run / "samples" / name, columns=conditions.columns, captions=captions)
        modality.draw_grid([real, reconstructions], self.run / "recon" / name)
        for kind in ("samples", "recon"):
            self.loggers.image(self.state.step, kind, self.run / kind / name)

    # Evaluations.

    @property
    def can_evaluate(self) -> bool:
        return bool(self.training.evaluate_samples and len(self.splits.held_out))

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
        """Evaluate new samples and held-out reconstructions with every metric that needs no download.

        Processes share the work, unless the model is sharded. False if a stop request came first.
        """
        t = self.training
        self.journal.say(f"evaluating {t.evaluate_samples} new samples and the held-out ones")
        request = EvaluationRequest(
            num_samples=t.evaluate_samples, num_reference=MAX_REFERENCE, seed=self.config.seed, batch_size=250,
            precision=t.precision,
        )  # fmt: skip
        steps = None if final else t.evaluate_steps
        done = True

        def work(model: LatentModel) -> None:
            nonlocal done
            started = time.perf_counter()
            evaluator = Evaluator(
                model, self.splits, self.run / "eval" / "records", request,
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
                self._report(model, evaluation, final, time.perf_counter() - started)

        with self._ema_model() as model:
            if self.sharded:
                self.processes.on_main(lambda: work(model))
            else:
                work(model)
        return not self.processes.highest(not done)

    def _report(self, model: LatentModel, evaluation: Evaluation, final: bool, seconds: float) -> None:
        """Write an evaluation's file and numbers, keep the best model, and print the table of the last one."""
        step = self.state.step
        about = {"preset": self.config.preset, "step": step, "fingerprint": model.fingerprint()}
        write_evaluation(evaluation, self.evaluation_file, about, seconds)
        numbers = {f"eval/{metric.key}": metric.row.value for metric in evaluation.numbers}
        self.journal.log(step, numbers)
        self.loggers.numbers(step, numbers)
        if self.training.best is not None:
            self._keep_best(model, evaluation, self.training.best)
        if final:
            self.journal.bar.stop()
            title = f"{self.config.preset}, step {step}: {self.training.evaluate_samples} samples, " \
                    f"{len(self.splits.held_out)} held-out"  # fmt: skip
            Console().print(table(evaluation.numbers, title))

    def _keep_best(self, model: LatentModel, evaluation: Evaluation, metric: str) -> None:
        """Write RUN/best, a model folder, and best.json with its step and number, if it is the best so far."""
        path = self.run / "best.json"
        try:
            measured = evaluation.find(metric)
            before = read_json(path, "delete it") if path.is_file() and (self.run / "best").is_dir() else None
            better = before is None or is_better(measured.row, float(before["value"]))
        except (ValueError, KeyError, TypeError) as error:
            self.journal.warn("best", f"the best model is not kept: {first_line(error)}")
            return
        if not better or not math.isfinite(measured.row.value):
            return
        self._save_model(model, "best")
        write_json(path, {"step": self.state.step, "key": measured.key, "value": measured.row.value})
        self.journal.say(f"best so far: {measured.key} {measured.row.value:.4g} at step {self.state.step}")

    def _save_model(self, model: LatentModel, name: str) -> None:
        """Write a model folder of the run atomically. A model card that is there, and files of others, are kept."""
        folder, temporary = self.run / name, self.run / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == CARD or not (temporary / path.name).exists():
                path.replace(temporary / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    # The model with EMA weights.

    def _on_main(self, work: Callable[[LatentModel], None]) -> bool:
        """Let the first process work on the model with EMA weights; False if a stop request interrupted it."""
        done = True

        def attempt(model: LatentModel) -> None:
            nonlocal done
            try:
                work(model)
            except Stopped:
                done = False

        with self._ema_model() as model:
            self.processes.on_main(lambda: attempt(model))
        return not self.processes.highest(not done)

    @contextmanager
    def _ema_model(self) -> Iterator[LatentModel]:
        """The model with EMA weights, unsharded in the first process."""
        model, ema = self.state.model, self.state.ema
        if not self.sharded:
            with ema.applied(model):
                yield model
            return
        weights = {**model.state_dict(), **ema.weights}
        copy = twin(self.config.model(), weights, self.processes.device, keep=self.processes.is_main) or model
        copy.precision = model.precision
        yield copy
