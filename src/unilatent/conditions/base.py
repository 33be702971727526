"""Conditions convert values to a `Conditioning`, the only form that networks and guidance receive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Config as Settings
from ..controls import Control
from ..processes import Processes
from ..registry import available, find
from ..types import Conditioning, refuse_unused

MAX_COLUMNS = 16
NEGATIVE = "negative_"
"""Prefix of a condition's argument: a negative value, which guidance uses in place of "no condition"."""


class ConditionConfig(Settings):
    """Settings of every condition.

    dropout: share of training rows whose condition is replaced by its null, for guidance.
    """

    dropout: float = Field(default=0.1, ge=0, le=1)

    def with_data(self, **facts: Any) -> Self:
        """Return a copy completed from the data's facts (`Dataset.facts`); ValueError if they contradict it."""
        return self

    def keeping(self, stored: dict[str, Any]) -> Self:
        """Return a copy with what a checkpoint stores about this condition where data leave a choice (the order of
        classes). Default: unchanged."""
        return self


class Condition(nn.Module, ABC):
    """One condition of a model. Rows are independent; `null` is the embedding that dropout and guidance use."""

    Config: ClassVar[type[ConditionConfig]]
    argument: ClassVar[str]
    """The keyword argument of `sample` that takes its values (a class condition: "labels")."""
    given_by: ClassVar[str] = "for images: one folder per class"
    """Where the values in a data set come from, for the error that it has none."""

    def __init__(self, config: Any, dim: int):
        """dim: D of its Conditioning."""
        super().__init__()
        self.config = config
        self.dim = dim

    @property
    def cycle(self) -> int | None:
        """The number of rows after which `example` repeats, or None."""
        return None

    @property
    def column(self) -> str | None:
        """The column of the data that its values are numbers of; None if they are not numbers of one."""
        return None

    @property
    def gives_tokens(self) -> bool:
        """Whether its Conditioning has tokens in addition to a vector."""
        return False

    @property
    def reads_on_cpu(self) -> bool:
        """Whether `embed` reads its values on the CPU; copying them back from a GPU would synchronise."""
        return False

    def prepare(self, processes: Processes | None = None) -> None:
        """Load what embedding needs, such as pretrained weights; ValueError names what is missing. Default: nothing.

        processes: all call this; the first one reads for all.
        """
        return None

    @abstractmethod
    def embed(self, values: Tensor) -> Conditioning:
        """Embed B values as a Conditioning of B rows."""

    @abstractmethod
    def null(self, n: int) -> Conditioning:
        """Return n rows of "no condition", of the form of `embed`; the number of tokens may be another."""

    def remarks(self, values: Sequence[Any]) -> list[str]:
        """Return what somebody who trains on these values of data should know, one line each: which of them are not
        read as they are, and what to do. Default: none."""
        return []

    @abstractmethod
    def parse(self, value: Any) -> Tensor:
        """Convert user input (a number, a name, a range, or a list of these) to values; ValueError names the fault."""

    def options(self, value: Any) -> list[str]:
        """Return the command-line options that are equivalent to passing `value` to `parse`."""
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return [f"--{self.argument.replace('_', '-')}", text]

    def control(self) -> Control:
        """Return how a person is asked for values. Default: a line of text for `parse`."""
        return Control(self.argument.replace("_", " ").capitalize())

    @abstractmethod
    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n example values, spread evenly over those in the training data."""

    def describe(self, values: Tensor) -> list[str]:
        """Return a caption for each value."""
        return [str(value.tolist()) for value in values]


def as_list(value: Any) -> list[Any]:
    """Return user input as a list: the elements of a list, tuple, range or array, or else the single value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple | range) else [value]


class Conditions(nn.ModuleDict):
    """All conditions of a model, combined: vectors are added, tokens concatenated.

    Values are a dict from a condition's `argument` to a tensor with B rows.
    """

    _device: Tensor

    def __init__(self, configs: dict[str, Any], dim: int):
        super().__init__({name: find("conditions", name)(config, dim) for name, config in configs.items()})
        self.dim = dim
        self.register_buffer("_device", torch.empty(0), persistent=False)

    @property
    def all(self) -> list[Condition]:
        """All conditions, in order."""
        return cast("list[Condition]", list(self.values()))

    @property
    def columns(self) -> int:
        """The number of columns of a sample grid, chosen so that each column shows one condition where possible."""
        cycles = [condition.cycle for condition in self.all if condition.cycle]
        return cycles[0] if len(cycles) == 1 and cycles[0] <= MAX_COLUMNS else 10

    @property
    def give_tokens(self) -> bool:
        """Whether a network that is built for these conditions receives tokens."""
        return any(condition.gives_tokens for condition in self.all)

    @property
    def on_cpu(self) -> frozenset[str]:
        """Arguments whose values should stay on the CPU; all others are moved to the model's device."""
        return frozenset(condition.argument for condition in self.all if condition.reads_on_cpu)

    def prepare(self, processes: Processes | None = None) -> None:
        """Prepare every condition; ValueError names what is missing. processes: the first one reads for all."""
        for condition in self.all:
            condition.prepare(processes)

    def captions(self, values: dict[str, Tensor]) -> list[str]:
        """Return a caption per row, from all conditions in `values`; [] if there are none."""
        descriptions = [c.describe(values[c.argument]) for c in self.all if c.argument in values]
        return [", ".join(filter(None, row)) for row in zip(*descriptions, strict=True)]

    def grid_captions(self, values: dict[str, Tensor]) -> list[str] | None:
        """Return captions for a grid of samples; None if its columns already show the conditions."""
        return self.captions(values) if any((c.cycle or MAX_COLUMNS + 1) > MAX_COLUMNS for c in self.all) else None

    @property
    def arguments(self) -> list[str]:
        """The keyword argument of each condition."""
        return [condition.argument for condition in self.all]

    def forward(self, values: dict[str, Tensor], drop: Tensor | None = None) -> Conditioning:
        """Embed B rows of values of every condition as one Conditioning.

        drop: (f B, number of conditions), uniform in [0, 1). A condition is replaced by its null in the rows where its
        column is below its `dropout` rate. Values are embedded once and the whole batch is then repeated f times. None
        drops nothing.
        """
        missing = [argument for argument in self.arguments if argument not in values]
        if missing:
            raise ValueError(f"conditions: values for {', '.join(missing)} are missing; got {sorted(values)}")
        parts = []
        for column, condition in enumerate(self.all):
            part = condition.embed(values[condition.argument])
            if drop is not None:
                part = part.repeat(len(drop) // len(part))
                part = part.where(drop[:, column] >= condition.config.dropout, condition.null(len(part)))
            parts.append(part)
        return self._join(parts, 0)

    def null(self, n: int, values: dict[str, Tensor] | None = None) -> Conditioning:
        """Return n unconditional rows; a condition with negative values in `values` is embedded from these instead."""
        values = values or {}
        negatives = [(condition, NEGATIVE + condition.argument) for condition in self.all]
        return self._join([c.embed(values[key]) if key in values else c.null(n) for c, key in negatives], n)

    def example(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return n rows of example values."""
        return {condition.argument: condition.example(n, generator) for condition in self.all}

    def parse(self, n: int, given: dict[str, Any], all_used: bool = False) -> dict[str, Tensor]:
        """Convert user input, by each condition's `argument`, to n rows of values; shorter lists are cycled.

        all_used: refuse more than n values; else the first n are used.

        Conditions without input get `example` values. Input for `negative_` + argument is returned under that key.
        ValueError on a keyword that belongs to no condition.
        """
        known = {key for argument in self.arguments for key in (argument, NEGATIVE + argument)}
        unknown = [key for key, value in given.items() if value is not None and key not in known]
        if unknown:
            has = f"it takes {', '.join(self.arguments)}" if self.arguments else "it is unconditional"
            argument = unknown[0].removeprefix(NEGATIVE)
            names = [name for name in available("conditions") if find("conditions", name).argument == argument]
            train = f"; for one that has it, train with conditions.{names[0]}={{}}" if names else ""
            raise ValueError(f"{unknown[0]}: this model has no such condition; {has}{train}")
        values = {}
        for condition in self.all:
            value = given.get(condition.argument)
            rows = condition.example(n) if value is None else condition.parse(value)
            if all_used and value is not None:
                refuse_unused(condition.argument, len(rows), n)
            values[condition.argument] = rows[torch.arange(n) % len(rows)]
            negative = given.get(NEGATIVE + condition.argument)
            if negative is not None:
                rows = condition.parse(negative)
                if all_used:
                    refuse_unused(NEGATIVE + condition.argument, len(rows), n)
                values[NEGATIVE + condition.argument] = rows[torch.arange(n) % len(rows)]
        return values

    def _join(self, parts: list[Conditioning], n: int) -> Conditioning:
        if not parts:
            return Conditioning(torch.zeros(n, self.dim, device=self._device.device))
        vector = torch.stack([part.vector for part in parts]).sum(0) if len(parts) > 1 else parts[0].vector
        spoken = [part for part in parts if part.tokens is not None]
        if not spoken:
            return Conditioning(vector)
        tokens = torch.cat([cast("Tensor", part.tokens) for part in spoken], dim=1)
        if all(part.mask is None for part in spoken):  # no padding, so attention needs no mask
            return Conditioning(vector, tokens)
        masks = [part.padded(cast("Tensor", part.tokens).shape[1]).mask for part in spoken]
        return Conditioning(vector, tokens, torch.cat(cast("list[Tensor]", masks), dim=1))
