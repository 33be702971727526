"""The configuration of a run: all settings of training, with their units and defaults."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from ..config import Config, resolve_as
from ..maths.ema_profiles import LONGEST
from ..model_config import ModelConfig
from ..registry import available, find
from .loggers import LOGGERS


class BatchScaledRate(Config):
    """A learning rate that follows the batch size: base * max(1, batch_size / base_batch_size)."""

    base: float = Field(gt=0)
    """Peak learning rate at batches of at most `base_batch_size` samples."""
    base_batch_size: int = Field(ge=1)
    """Samples per step, over all processes, from which on the rate grows in proportion to the batch."""

    def at(self, batch_size: int) -> float:
        """Return the peak learning rate for batches of that many samples."""
        return self.base if batch_size <= self.base_batch_size else self.base * batch_size / self.base_batch_size


class OptimizerConfig(Config):
    """The optimisers and their hyperparameters: Muon for matrices, AdamW for all other parameters."""

    learning_rate: float | BatchScaledRate = 1e-4
    """Peak learning rate, which the schedule multiplies: a number, or a rule {base, base_batch_size} that follows
    `training.batch_size`; a run stores the number."""
    muon: bool = True
    """Use Muon for the matrices tagged with `use_muon`; false: AdamW for all parameters."""
    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of Muon, whose updates are scaled to AdamW's root mean square; null: `learning_rate`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, per step."""
    eps: float = Field(default=1e-6, gt=0)
    """Term added to AdamW's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of both optimisers; 0: none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum, per step."""
    muon_eps: float = Field(default=1e-7, gt=0)
    """Smallest norm by which Muon divides a matrix before it orthogonalises it."""
    muon_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which Muon orthogonalises; "auto": bfloat16 where the device multiplies it faster, except small
    matrices on a CPU, else float32."""

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _number_or_rule(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return resolve_as(BatchScaledRate, value)
        if isinstance(value, BatchScaledRate):
            return value
        try:
            rate = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            rate = math.nan
        if not 0 < rate < math.inf:
            raise ValueError("give a number above 0, or {base: 1e-4, base_batch_size: 384}")
        return rate

    @property
    def peak(self) -> float:
        """The peak learning rate of a resolved configuration (`RunConfig.resolved`)."""
        assert isinstance(self.learning_rate, float), "the learning rate follows the batch: call RunConfig.resolved"
        return self.learning_rate


class Span(Config):
    """A part of a schedule."""

    start: float = Field(ge=0)
    """Where it begins, in the unit of the schedule."""
    end: float = Field(gt=0)
    """Where it ends, in the unit of the schedule."""

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end: {self.end:g} is before start {self.start:g}")
        return self

    def stretched(self, ratio: float) -> Self:
        """Return a copy with start and end multiplied by `ratio`."""
        return self.model_copy(update={"start": self.start * ratio, "end": self.end * ratio})


class Decay(Span):
    """A cosine from the learning-rate factor at `start` to `factor` at `end`."""

    factor: float = Field(ge=0)
    """Learning-rate factor at the end, relative to the peak."""


class Onset(Span):
    """The delayed start of a part of the loss: its weight is 0 until `start`, 1 from `end` on, linear in between."""


class ScheduleConfig(Config):
    """Learning rate as a factor of its peak: linear warm-up to 1, then constant except during the decays."""

    unit: Literal["steps", "epochs"] = "steps"
    """What all numbers of the schedule count: optimiser steps, or epochs."""
    warmup: float = Field(default=0, ge=0)
    """Length of the linear warm-up from 0 to 1; 0: none."""
    decays: tuple[Decay, ...] = ()
    """Cosine decays one after the other, each from the factor reached before; empty: none."""
    onsets: dict[str, Onset] = Field(default={})
    """Parts of the loss that start later, by name (UNITE: "reconstruction", "flow"); a flow loss that starts once
    latents are informative does not keep them collapsed before."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        marks = [self.warmup, *[mark for decay in self.decays for mark in (decay.start, decay.end)]]
        if marks != sorted(marks):
            raise ValueError(f"warmup and decays overlap or run backwards: {marks}; each must start where one ended")
        return self

    def stretched(self, ratio: float) -> Self:
        """Return a copy with every start, end and the warm-up multiplied by `ratio`."""
        return self.model_copy(
            update={
                "warmup": self.warmup * ratio,
                "decays": tuple(decay.stretched(ratio) for decay in self.decays),
                "onsets": {part: onset.stretched(ratio) for part, onset in self.onsets.items()},
            }
        )


class TrainingConfig(Config):
    """Length, batch, optimiser, logging, checkpoints and hardware of a run.

    "Steps" are optimiser steps.
    """

    # Length and batch.

    steps: int | None = Field(default=None, ge=1)
    """Length of the run in steps; give either this or `epochs`, null for the other."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the training data; give either this or `steps`, null for the other."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per step, over all processes together."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass of one process, which changes only memory and speed; null: all of its share."""

    # Optimiser and EMA.

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimisers and their hyperparameters."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate and of parts of the loss; default: constant."""
    gradient_clip: float | None = Field(default=3.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it; null: no clipping."""
    ema_decay: float = Field(default=0.9978, ge=0, lt=1)
    """Decay per step of the EMA weights, which are the model that a run gives."""
    ema_profiles: tuple[float, ...] = ()
    """Relative EMA lengths (sigma_rel, e.g. 0.05 and 0.1) tracked for `unilatent ema`; empty: none."""
    ema_snapshot_every: int = Field(default=0, ge=0)
    """Steps between snapshots of `ema_profiles` in RUN/ema, also stored at the end; 0: `checkpoint_every`."""
    non_finite: str = Field(default="stop", pattern=r"^(stop|skip:[1-9]\d*)$")
    """What to do if a loss or gradient is not finite: "stop" the run, or "skip:N" such steps, at most N in a row."""

    # Speed and memory.

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"bf16": bfloat16 autocast inside the networks, weights stay in float32; "fp32": float32; "auto": bf16 where the
    hardware multiplies it faster, else fp32; a run that resumes keeps what it had, or takes fp32."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the repeated blocks, and LPIPS, with torch.compile: faster steps after minutes of compilation. "auto": on
    a GPU, for models of at least 100 million trainable parameters, whose runs take long enough."""
    activation_checkpointing: bool = False
    """Recompute the repeated blocks in the backward pass, which saves memory and costs time."""

    # Logging.

    log_every: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl."""
    log_gradients: bool = True
    """Also log the gradient norm of each part of the loss, with a copy of the gradients per part; not with `shard`."""
    loggers: tuple[str, ...] = ()
    """Loggers in addition to metrics.jsonl: "tensorboard", "wandb", "mlflow", "trackio"; empty: none."""
    wandb_project: str = Field(default="unilatent", min_length=1)
    """Project of the run at Weights & Biases or Trackio; its experiment at MLflow."""
    wandb_name: str | None = None
    """Name of the run at Weights & Biases, MLflow or Trackio; null: the name of the run folder."""

    # Samples, checkpoints, evaluation.

    sample_every: int = Field(default=500, ge=0)
    """Steps between grids of samples and reconstructions; 0: never."""
    checkpoint_every: int = Field(default=500, ge=0)
    """Steps between checkpoints; one is always written at the end; 0: only that one."""
    keep_checkpoints: int = Field(default=3, ge=2)
    """Checkpoints to keep; older ones are deleted."""
    num_samples: int = Field(default=40, ge=1)
    """Samples in a grid."""
    evaluate_samples: int = Field(default=0, ge=0)
    """New samples that an evaluation generates; 0: no evaluation."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations, in addition to the one at the end; 0: only that one."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Solver steps of the evaluations before the end, which then have no restarts; null: the model's own settings."""
    evaluate_metrics: tuple[str, ...] = ()
    """Metrics of the evaluations, e.g. ["fid", "is"]; empty: all that need no download."""
    evaluate_reference: str | None = None
    """Real samples that new ones are compared with, a folder, zip or .npz (as `unilatent evaluate --reference`); null:
    training samples, at most 50,000, or 20,000 without `evaluate_metrics`."""
    best: str | None = None
    """Metric by which the best evaluated model is stored in best/, e.g. "fid"; null: none is stored."""
    background_saving: bool = True
    """Continue training while a checkpoint is written, from a copy of its state in CPU memory."""

    # Data and hardware.

    latents: str | None = None
    """A folder that `unilatent encode --views` wrote: its latents are trained on, and the data are not encoded again;
    null: they are encoded in each step. For a generator on the latents of a frozen tokenizer."""
    bad_samples: float = Field(default=0.001, ge=0, le=1)
    """Share of the training set that may be unusable, and is replaced, before the run stops; one sample is always
    tolerated, unless this is 0."""
    workers: int = Field(default=0, ge=0)
    """Processes that read data; 0: the training process reads them itself."""
    worker_timeout: float = Field(default=600, ge=0)
    """Seconds without a batch from a worker after which the run fails; 0: no limit."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per process; 1 costs a small network little and is not stalled by other load on the machine; null:
    torch's choice."""
    device: str | None = None
    """cpu, cuda or cuda:1; null: a GPU if there is one."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds that processes wait for each other before the job fails."""
    shard: Literal["hybrid"] | bool = False
    """Shard parameters and optimiser state over the processes (FSDP2), for models too large for one GPU; "hybrid": over
    those of one machine, so that only sums of gradients travel between machines."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either training.steps or training.epochs, and set the other to null")
        return self

    @field_validator("loggers")
    @classmethod
    def _are_known(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in loggers if name not in LOGGERS]:
            raise ValueError(f"{unknown[0]!r} is unknown; use {' or '.join(LOGGERS)}")
        return loggers

    @field_validator("ema_profiles")
    @classmethod
    def _are_lengths(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(lengths)) < len(lengths) or not all(0 < length <= LONGEST for length in lengths):
            raise ValueError(f"give different relative lengths above 0, at most {LONGEST:.4f}, such as [0.05, 0.1]")
        return lengths

    @property
    def allowed_skips(self) -> int:
        """How many steps in a row may be skipped because they are not finite."""
        return 0 if self.non_finite == "stop" else int(self.non_finite.removeprefix("skip:"))

    def num_steps(self, samples: float) -> int:
        """Return the optimiser steps of the whole run, for a training set of that many samples."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * samples / self.batch_size))


LEARNING = (
    "steps", "epochs", "batch_size", "optimizer", "schedule", "gradient_clip", "ema_decay", "latents",
)  # fmt: skip
"""Settings of training that determine what a run learns, on whatever machine."""


class RunConfig(ModelConfig):
    """A model, its data and how it is trained. A preset is a function that returns one."""

    preset: str = "custom"
    """Name of the preset that this configuration came from."""
    tokenizer: RunConfig | None = None
    """First stage, trained before in RUN/tokenizer with this run's seed, data, modality and given parts;
    `method.tokenizer` is then the path of its model; null: no first stage."""
    seed: int = Field(default=0, ge=0)
    """Seed of all random numbers: initialisation, order of the data, training noise, samples."""
    data: SerializeAsAny[Config]
    """Where the data are and how they are split; its fields depend on the modality."""
    training: TrainingConfig
    """How the model is trained."""

    @model_validator(mode="before")
    @classmethod
    def _data_of_modality(cls, content: Any) -> Any:
        """Parse `data` as the data configuration of the modality."""
        if not isinstance(content, dict) or not isinstance(content.get("data", {}), dict):
            return content
        modality = content.get("modality")
        name = modality.get("name") if isinstance(modality, dict) else getattr(modality, "name", None)
        if name not in available("modalities"):
            return {**content, "data": Config()}  # the error to report is that of the modality
        data = resolve_as(find("modalities", name).DataConfig, content.get("data", {}), prefix="data.")
        return {**content, "data": data}

    def override(self, *assignments: str) -> Self:
        """Return a copy with assignments applied; training.steps and training.epochs replace each other."""
        texts = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in assignments)}
        for length, other in (("training.steps", "training.epochs"), ("training.epochs", "training.steps")):
            if other not in texts and texts.get(length, "null") != "null":
                assignments = (f"{other}=null", *assignments)
        return super().override(*assignments)

    @property
    def first(self) -> RunConfig | None:
        """The first stage, with this run's data, modality and seed; None if there is none or it is trained already."""
        if self.tokenizer is None or getattr(self.method, "tokenizer", None) is not None:
            return None
        shared = {
            "seed": self.seed,
            "data": self.data,
            "modality": self.modality,
            "given": self.given,
            "preset": f"{self.preset}-tokenizer",
        }
        return self.tokenizer.model_copy(update=shared)

    def example(self) -> Self:
        """Return a configuration that can be built without data, and without the model of the first stage."""
        example = super().example()
        if self.first is None:
            return example
        method = self.method.model_copy(update={"tokenizer_model": self.first.example().model().plain()})
        return example.model_copy(update={"method": method})

    def resolved(self) -> Self:
        """Return a copy whose learning rate is a number, where a rule gives it for the batch size."""
        t, rate = self.training, self.training.optimizer.learning_rate
        if not isinstance(rate, BatchScaledRate):
            return self
        optimizer = t.optimizer.model_copy(update={"learning_rate": rate.at(t.batch_size)})
        return self.model_copy(update={"training": t.model_copy(update={"optimizer": optimizer})})

    def computing_in(self, precision: str) -> Self:
        """Return a copy with training.precision set to "fp32" or "bf16" (`devices.resolve_precision`)."""
        return self.model_copy(update={"training": self.training.model_copy(update={"precision": precision})})

    def model(self) -> ModelConfig:
        """Return the part that describes the model."""
        return ModelConfig(
            modality=self.modality, conditions=self.conditions, method=self.method, sampling=self.sampling,
            given=self.given,
        )  # fmt: skip
