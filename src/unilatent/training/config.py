"""The configuration of a whole run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from ..config import Config, resolve_as
from ..maths.ema_profiles import LONGEST
from ..methods.base import ModelConfig
from ..registry import available, find


class OptimizerConfig(Config):
    """Muon for the matrices tagged with `use_muon`, AdamW for the rest (and for all of them with muon=false).

    muon_learning_rate: None takes `learning_rate`; Muon's updates are scaled to AdamW's root mean square.
    """

    learning_rate: float = Field(default=1e-4, gt=0)
    muon: bool = True
    muon_learning_rate: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)


class Span(Config):
    """From one mark of a schedule to another."""

    start: float = Field(ge=0)
    end: float = Field(gt=0)

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end: {self.end:g} is before start {self.start:g}")
        return self

    def stretched(self, ratio: float) -> Self:
        return self.model_copy(update={"start": self.start * ratio, "end": self.end * ratio})


class Decay(Span):
    """A cosine from the factor reached before to `factor`."""

    factor: float = Field(ge=0)


class Onset(Span):
    """A part of the loss comes in: weight 0 until `start`, full from `end` on, linear between."""


class ScheduleConfig(Config):
    """Learning rate as a factor: linear warm-up to 1, constant, then each decay in turn; constant between and after.

    onsets: parts of the loss that come in later, by name (UNITE's: "reconstruction", "flow"). A flow loss that waits
        until latents say something does not hold them flat meanwhile.

    Everything counts optimiser steps, or epochs of optimiser steps, whatever the accumulation.
    """

    unit: Literal["steps", "epochs"] = "steps"
    warmup: float = Field(default=0, ge=0)
    decays: tuple[Decay, ...] = ()
    onsets: dict[str, Onset] = Field(default={})

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        marks = [self.warmup, *[mark for decay in self.decays for mark in (decay.start, decay.end)]]
        if marks != sorted(marks):
            raise ValueError(f"warmup and decays overlap or run backwards: {marks}; each must start where one ended")
        return self

    def stretched(self, ratio: float) -> Self:
        """With every mark moved by that ratio."""
        return self.model_copy(
            update={
                "warmup": self.warmup * ratio,
                "decays": tuple(decay.stretched(ratio) for decay in self.decays),
                "onsets": {part: onset.stretched(ratio) for part, onset in self.onsets.items()},
            }
        )


class TrainingConfig(Config):
    """How long, how much at once, how fast, and what is written on the way.

    steps or epochs: exactly one; steps are optimiser steps.
    batch_size: samples of one optimiser step, over all processes; micro_batch_size: how many go through the network
        at once in one process (None: all of its share). The optimisation is the same for any micro_batch_size.
    gradient_clip: largest global norm; None does not clip. ema_decay: per optimiser step.
    ema_profiles: relative lengths (sigma_rel, e.g. 0.05 and 0.1) of further averages, stored in RUN/ema every
        ema_snapshot_every steps (0: checkpoint_every) and at the end; others are made from them (`unilatent ema`).
    non_finite: what to do with a step whose loss or gradient is not finite: "stop", or "skip:N", which leaves such
        steps out until there are more than N in a row. Either way it never reaches the weights.
    compile: torch.compile of the repeated blocks. activation_checkpointing: recompute them in the backward pass.
    log_every, sample_every, checkpoint_every: in optimiser steps; 0 is never (a last checkpoint is always written).
    num_samples: pictures in a grid; evaluate_samples: samples judged at the end (0: no evaluation), and every
        evaluate_every steps (0: never) with evaluate_steps solver steps (None: the model's own).
    best: key of the metric by which the best evaluated model is kept in best/; None keeps none.
    background_saving: go on training while a checkpoint is written; its state is first copied to CPU memory.
    bad_samples: share of the training set that may turn out unusable (and is replaced) before the run stops; one sample
        always may, unless it is 0.
    log_gradients: also log the gradient norm of each part of the loss (not with `shard`); keeps a copy of the gradients
        a part meanwhile.
    loggers: "tensorboard" and "wandb" beside metrics.jsonl, which is always written. wandb_project, wandb_name: where
        the latter files the run; the name is the run folder's unless given.
    workers: processes that read data; worker_timeout: seconds after which one that gives nothing ends the run (0:
        never). threads: CPU threads of one process; None leaves torch's choice. A small network
        loses little with one, and is not stalled by other work on the machine as several waiting for each other are.
    device: cpu, cuda, cuda:1; None takes a GPU if there is one.
    timeout: seconds that processes wait for each other before the job ends.
    shard: cut parameters, gradients and optimizer state over the processes (FSDP2), for models that do not fit in one.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clip: float | None = Field(default=3.0, gt=0)
    ema_decay: float = Field(default=0.9978, ge=0, lt=1)
    ema_profiles: tuple[float, ...] = ()
    ema_snapshot_every: int = Field(default=0, ge=0)
    non_finite: str = Field(default="stop", pattern=r"^(stop|skip:[1-9]\d*)$")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    log_every: int = Field(default=20, ge=1)
    log_gradients: bool = True
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb_project: str = Field(default="unilatent", min_length=1)
    wandb_name: str | None = None
    sample_every: int = Field(default=500, ge=0)
    checkpoint_every: int = Field(default=500, ge=0)
    keep_checkpoints: int = Field(default=3, ge=2)
    num_samples: int = Field(default=40, ge=1)
    evaluate_samples: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    evaluate_steps: int | None = Field(default=None, ge=1)
    best: str | None = None
    background_saving: bool = True
    bad_samples: float = Field(default=0.001, ge=0, le=1)
    workers: int = Field(default=0, ge=0)
    worker_timeout: float = Field(default=600, ge=0)
    threads: int | None = Field(default=None, ge=1)
    device: str | None = None
    timeout: float = Field(default=1800, gt=0)
    shard: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either training.steps or training.epochs, and set the other to null")
        return self

    @field_validator("ema_profiles")
    @classmethod
    def _are_lengths(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(lengths)) < len(lengths) or not all(0 < length <= LONGEST for length in lengths):
            raise ValueError(f"give different relative lengths above 0, at most {LONGEST:.4f}, such as [0.05, 0.1]")
        return lengths

    @property
    def allowed_skips(self) -> int:
        """Steps in a row that may be left out."""
        return 0 if self.non_finite == "stop" else int(self.non_finite.removeprefix("skip:"))

    def num_steps(self, samples: float) -> int:
        """Optimiser steps of the whole run over a training set of that many samples."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * samples / self.batch_size))


class RunConfig(ModelConfig):
    """A model and how it is trained. A preset is a function that returns one.

    tokenizer: a run to be finished first, in the folder `tokenizer` inside this one's; `method.tokenizer` then names
    its model. It takes seed and data from here.
    """

    preset: str = "custom"
    tokenizer: RunConfig | None = None
    seed: int = Field(default=0, ge=0)
    data: SerializeAsAny[Config]
    training: TrainingConfig

    @model_validator(mode="before")
    @classmethod
    def _data_of_modality(cls, content: Any) -> Any:
        """`data` is whatever the modality's data is."""
        if not isinstance(content, dict) or not isinstance(content.get("data", {}), dict):
            return content
        modality = content.get("modality")
        name = modality.get("name") if isinstance(modality, dict) else getattr(modality, "name", None)
        if name not in available("modalities"):
            return {**content, "data": Config()}  # the modality's own fault is the one to report
        data = resolve_as(find("modalities", name).DataConfig, content.get("data", {}), prefix="data.")
        return {**content, "data": data}

    def override(self, *assignments: str) -> Self:
        """As of any configuration; one of training.steps and training.epochs takes the place of the other."""
        said = {key.strip(): value.strip() for key, _, value in (words.partition("=") for words in assignments)}
        for given, other in (("training.steps", "training.epochs"), ("training.epochs", "training.steps")):
            if other not in said and said.get(given, "null") != "null":
                assignments = (f"{other}=null", *assignments)
        return super().override(*assignments)

    @property
    def first(self) -> RunConfig | None:
        """The run to be finished before this one, on this one's data, modality and seed; None if there is none."""
        if self.tokenizer is None or getattr(self.method, "tokenizer", None) is not None:
            return None
        own = {"seed": self.seed, "data": self.data, "modality": self.modality, "preset": f"{self.preset}-tokenizer"}
        return self.tokenizer.model_copy(update=own)

    def example(self) -> Self:
        """Also with the tokenizer that the first run would make."""
        own = super().example()
        if self.first is None:
            return own
        method = self.method.model_copy(update={"tokenizer_model": self.first.example().model().plain()})
        return own.model_copy(update={"method": method})

    def model(self) -> ModelConfig:
        """The part that describes the model alone."""
        return ModelConfig(
            modality=self.modality, conditions=self.conditions, method=self.method, sampling=self.sampling
        )
