"""Conditions turn values into a Conditioning. Networks and guidance see only that record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Config as Settings
from ..registry import available, find
from ..types import Conditioning

MAX_COLUMNS = 16
NEGATIVE = "negative_"
"""Before a condition's argument: what guidance leads away from, in place of "no condition"."""


class ConditionConfig(Settings):
    """What every condition can be told. dropout: share of training rows that see its null instead."""

    dropout: float = Field(default=0.1, ge=0, le=1)

    def with_data(self, **facts: Any) -> Self:
        """With what the data knows (`Dataset.facts`) filled in; ValueError where they contradict."""
        return self


class Condition(nn.Module, ABC):
    """One thing a sample can be conditioned on. Rows are independent; `null` is what dropout and guidance use."""

    Config: ClassVar[type[ConditionConfig]]
    argument: ClassVar[str]
    """The keyword under which users give its values to `sample` (a class condition: "labels")."""
    given_by: ClassVar[str] = "for pictures: a folder a class"
    """Where data have its values from, for the message that they have none."""

    def __init__(self, config: Any, dim: int):
        """dim: D of the Conditioning it makes."""
        super().__init__()
        self.config = config
        self.dim = dim

    @property
    def cycle(self) -> int | None:
        """After how many rows `example` repeats itself, if it does."""
        return None

    @property
    def gives_tokens(self) -> bool:
        """Whether it makes tokens beside a vector."""
        return False

    @property
    def reads_on_cpu(self) -> bool:
        """Whether `embed` looks at its values on the CPU: fetching them back from a device would wait for it."""
        return False

    def prepare(self) -> None:
        """Loads what embedding needs (pretrained weights, say); ValueError says what is missing. Default: nothing."""
        return None

    @abstractmethod
    def embed(self, values: Tensor) -> Conditioning:
        """B values to a Conditioning of B rows."""

    @abstractmethod
    def null(self, n: int) -> Conditioning:
        """n rows of "no condition", of the same form as `embed`'s."""

    @abstractmethod
    def parse(self, value: Any) -> Tensor:
        """What users write (a number, a name, a range, a list of them) as values; ValueError names what is wrong."""

    def options(self, value: Any) -> list[str]:
        """What users write on the command line for what they would give to `parse`."""
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return [f"--{self.argument.replace('_', '-')}", text]

    @abstractmethod
    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n values as they could come from data, spread evenly over what there is."""

    def describe(self, values: Tensor) -> list[str]:
        """A caption for each value."""
        return [str(value.tolist()) for value in values]


def listed(value: Any) -> list[Any]:
    """What users give for one or several values, an array too, as a list of them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple | range) else [value]


class Conditions(nn.ModuleDict):
    """All conditions of a model as one: vectors add, tokens follow each other.

    Values come as a dict: a condition's `argument` -> a tensor with B rows.
    """

    _device: Tensor

    def __init__(self, configs: dict[str, Any], dim: int):
        super().__init__({name: find("conditions", name)(config, dim) for name, config in configs.items()})
        self.dim = dim
        self.register_buffer("_device", torch.empty(0), persistent=False)

    @property
    def all(self) -> list[Condition]:
        """Every condition, in order."""
        return cast("list[Condition]", list(self.values()))

    @property
    def columns(self) -> int:
        """How many samples to draw in a row of a grid, so that a column is one condition where that is possible."""
        cycles = [condition.cycle for condition in self.all if condition.cycle]
        return cycles[0] if len(cycles) == 1 and cycles[0] <= MAX_COLUMNS else 10

    @property
    def give_tokens(self) -> bool:
        """Whether a network that is built for these conditions has tokens to read."""
        return any(condition.gives_tokens for condition in self.all)

    @property
    def on_cpu(self) -> frozenset[str]:
        """Arguments whose values had better stay on the CPU; all others go where the model is."""
        return frozenset(condition.argument for condition in self.all if condition.reads_on_cpu)

    def prepare(self) -> None:
        """Loads what every condition needs; ValueError says what is missing."""
        for condition in self.all:
            condition.prepare()

    def captions(self, values: dict[str, Tensor]) -> list[str]:
        """What each row is asked to be, by every condition there are values of; [] without any."""
        told = [c.describe(values[c.argument]) for c in self.all if c.argument in values]
        return [", ".join(filter(None, row)) for row in zip(*told, strict=True)]

    def grid_captions(self, values: dict[str, Tensor]) -> list[str] | None:
        """Captions for a picture of samples with these values; None where its columns say as much."""
        return self.captions(values) if any((c.cycle or MAX_COLUMNS + 1) > MAX_COLUMNS for c in self.all) else None

    @property
    def arguments(self) -> list[str]:
        """The keyword of each condition."""
        return [condition.argument for condition in self.all]

    def forward(self, values: dict[str, Tensor], drop: Tensor | None = None) -> Conditioning:
        """B rows of every condition's values, to one Conditioning.

        drop: (f B, number of conditions) uniforms in [0, 1): a condition is replaced by its null where its column is
        below its own `dropout` rate, each row and condition on its own. Values are embedded once and repeated f times,
        all of them and then all again. None drops nothing.
        """
        missing = [argument for argument in self.arguments if argument not in values]
        if missing:
            raise ValueError(f"conditions: values for {', '.join(missing)} are missing; given: {sorted(values)}")
        parts = []
        for column, condition in enumerate(self.all):
            part = condition.embed(values[condition.argument])
            if drop is not None:
                part = part.repeat(len(drop) // len(part))
                part = part.where(drop[:, column] >= condition.config.dropout, condition.null(len(part)))
            parts.append(part)
        return self._join(parts, 0)

    def null(self, n: int, values: dict[str, Tensor] | None = None) -> Conditioning:
        """n rows without any condition; where `values` has a condition's negative ones, with those instead."""
        values = values or {}
        named = [(condition, NEGATIVE + condition.argument) for condition in self.all]
        return self._join([c.embed(values[key]) if key in values else c.null(n) for c, key in named], n)

    def example(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """n rows of example values."""
        return {condition.argument: condition.example(n, generator) for condition in self.all}

    def parse(self, n: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """Users' keyword values, by each condition's `argument`, as n rows each; shorter lists are cycled.

        A condition that is not given gets `example` values. With `negative_` before its argument, what guidance leads
        away from, under that key. ValueError on a keyword no condition answers to.
        """
        known = {key for argument in self.arguments for key in (argument, NEGATIVE + argument)}
        unknown = [key for key, value in given.items() if value is not None and key not in known]
        if unknown:
            has = f"it takes {', '.join(self.arguments)}" if self.arguments else "it is unconditional"
            wanted = unknown[0].removeprefix(NEGATIVE)
            named = [name for name in available("conditions") if find("conditions", name).argument == wanted]
            train = f"; for one that has it, train with conditions.{named[0]}={{}}" if named else ""
            raise ValueError(f"{unknown[0]}: this model has no such condition; {has}{train}")
        values = {}
        for condition in self.all:
            value = given.get(condition.argument)
            rows = condition.example(n) if value is None else condition.parse(value)
            values[condition.argument] = rows[torch.arange(n) % len(rows)]
            negative = given.get(NEGATIVE + condition.argument)
            if negative is not None:
                rows = condition.parse(negative)
                values[NEGATIVE + condition.argument] = rows[torch.arange(n) % len(rows)]
        return values

    def _join(self, parts: list[Conditioning], n: int) -> Conditioning:
        if not parts:
            return Conditioning(torch.zeros(n, self.dim, device=self._device.device))
        vector = torch.stack([part.vector for part in parts]).sum(0) if len(parts) > 1 else parts[0].vector
        whole = [part.padded(part.tokens.shape[1]) for part in parts if part.tokens is not None]
        if not whole:
            return Conditioning(vector)
        tokens = [part.tokens for part in whole if part.tokens is not None]
        masks = [part.mask for part in whole if part.mask is not None]
        return Conditioning(vector, torch.cat(tokens, dim=1), torch.cat(masks, dim=1))
