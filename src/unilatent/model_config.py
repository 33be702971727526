"""The configuration of a model: its modality, conditions, method, and default sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .config import Config, ConfigError, component
from .maths.solvers import find_solver
from .modalities.base import Splits
from .registry import find


class SamplingConfig(Config):
    """How latents are sampled; every field can be overridden when sampling.

    solver, num_inference_steps: integrate from noise (t = 1) to data (t = 0).
    time_shift: factor of `times.shift` on the time grid (UNITE: 2).
    denoise_to_zero: the last step, to t = 0, returns the clean estimate itself. Not for models whose latents are noisy
        at t = 0 (Unified Latents).
    restarts, restart_interval: how often the steps between two times (t = 0 clean, t = 1 noise) are taken again, from
        new noise (`solvers.restarting`).
    decoder_solver, decoder_steps: of a diffusion decoder; a decoder in one pass has no steps.
    guidance_scale: of classifier-free guidance; 1 is the conditional estimate, 0 the unconditional one.
    guidance_interval: guidance applies where low < t < high (t = 0 clean, t = 1 noise); elsewhere every scale, 0 too,
        gives the conditional estimate.
    guidance_norm: "norm_first" combines finished estimates (`LatentModel.finish_latents`), "guidance_first" raw ones.
    """

    solver: str = "heun"
    num_inference_steps: int = Field(default=50, ge=1)
    time_shift: float = Field(default=1.0, gt=0)
    denoise_to_zero: bool = False
    restarts: int = Field(default=0, ge=0)
    restart_interval: tuple[float, float] = (0.3, 0.6)
    decoder_solver: str = "ddim"
    decoder_steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=1.0, ge=0)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_norm: Literal["norm_first", "guidance_first"] = "norm_first"

    @field_validator("solver", "decoder_solver")
    @classmethod
    def _known(cls, name: str) -> str:
        find_solver(name)
        return name

    @field_validator("guidance_interval", "restart_interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError("low and high must satisfy 0 <= low < high <= 1 (t = 0 clean, t = 1 noise)")
        return interval


class GivenConfig(Config):
    """Which parts of training samples a model is given, so that it learns to complete samples as well as to draw whole
    ones.

    kinds: what may be given (`Modality.given_kinds`); one is drawn for each sample, all equally likely. None: all.
    nothing: share of samples of which nothing is given.
    """

    kinds: tuple[str, ...] | None = None
    nothing: float = Field(default=0.3, ge=0, lt=1)


class ModelConfig(Config):
    """Everything that is needed to build a model and sample from it.

    modality: what a sample is; `modality.name` selects it.
    conditions: what samples are conditioned on, by the name of each condition; empty: nothing.
    method: how latents are made and generated; `method.name` selects it.
    sampling: default settings of sampling.
    given: `{}` trains a model that can be given parts of a sample; None: one that draws whole samples only.
    """

    modality: component("modalities")  # type: ignore[valid-type]
    conditions: dict[str, component("conditions")] = Field(default={})  # type: ignore[valid-type]
    method: component("methods")  # type: ignore[valid-type]
    sampling: SamplingConfig = SamplingConfig()
    given: GivenConfig | None = None

    @field_validator("conditions", mode="before")
    @classmethod
    def _named(cls, conditions: Any) -> Any:
        """The key of a condition is its name."""
        if not isinstance(conditions, dict):
            return conditions
        return {key: {"name": key, **value} if isinstance(value, dict) else value for key, value in conditions.items()}

    @model_validator(mode="after")
    def _known_kinds(self) -> Self:
        if self.given is None:
            return self
        kinds = find("modalities", self.modality.name).given_kinds
        if not kinds:
            raise ValueError(f"given: no part of a sample of {self.modality.name} can be given; leave it out")
        unknown = [kind for kind in self.given.kinds or () if kind not in kinds]
        if unknown or self.given.kinds == ():
            named = repr(unknown[0]) if unknown else "nothing"
            raise ValueError(f"given.kinds: {named} is no part that can be given; use {' or '.join(kinds)}")
        return self

    def example(self) -> Self:
        return self.model_copy(update={"conditions": {name: c.example() for name, c in self.conditions.items()}})

    def with_sources(self) -> Self:
        """Fill in what the method reads from other runs, such as a frozen tokenizer's configuration."""
        return self.model_copy(update={"method": self.method.with_sources()})

    def with_data(self, splits: Splits) -> Self:
        """Fill in what the data determines: of the modality (its sizes, say) and each condition (its class names, say).

        ConfigError names a condition whose values the data lacks.
        """
        modality = find("modalities", self.modality.name)(self.modality).fitted(splits)
        follow(self.conditions, splits)
        facts, filled = splits.train.facts, {}
        for name, condition in self.conditions.items():
            kind = find("conditions", name)
            argument = kind.argument
            if argument not in facts:
                hint = f"; {hint}" if (hint := splits.train.hints.get(argument)) else ""
                raise ConfigError(
                    f"conditions.{name}: the data under data.path has no {argument} ({kind.given_by}){hint}; "
                    "give data that has, or train without the condition: conditions={}"
                )
            filled[name] = condition.with_data(**facts[argument])
        return self.model_copy(update={"modality": modality, "conditions": filled})


def follow(conditions: Mapping[str, Any], splits: Splits) -> None:
    """Let data take over what configurations of conditions store where data leave a choice: the order of classes."""
    for name, condition in conditions.items():
        for part in (splits.train, splits.held_out):
            part.adopt(find("conditions", name).argument, condition.plain())


class MethodConfig(Config):
    """Base of a method's configuration."""

    def with_sources(self) -> Self:
        """Fill in what is read from other runs; ConfigError names a run that cannot be read."""
        return self
