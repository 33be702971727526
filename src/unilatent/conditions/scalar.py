"""A number that is known of each sample (a column of the data), standardised by the training data's mean and spread.

NaN, a number that is not known, is "no condition", exactly: samples without it take part in training, as unconditional
ones.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nets.embeddings import TimeEmbedding
from ..types import Conditioning
from .base import Condition, ConditionConfig, listed

SLOW = 0.25
"""Of the random frequencies, one cycle for each standard deviation: neighbouring numbers are to be told alike."""
FAR = 1.0
"""Standard deviations outside of all training numbers from which on a number is warned of."""
SPAN = 10
"""Numbers that a range stands for, where it does not say."""
MOST = 10_000
"""Of those that it may say."""
TURN = (math.sqrt(5) - 1) / 2
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class ScalarConfig(ConditionConfig):
    """column: which number; the data choose it. mean, std: of the training data; quantiles: of them, evenly from the
    least to the largest. All are found in the data when left empty, and stored with the model. num_frequencies: of the
    waves that a number is turned into.
    """

    name: Literal["scalar"] = "scalar"
    column: str | None = None
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)
    quantiles: tuple[float, ...] = ()
    num_frequencies: int = Field(default=64, ge=1)

    @classmethod
    def small(cls) -> Self:
        return cls(num_frequencies=8).example()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mean is None) != (self.std is None) or (self.mean is None) != (not self.quantiles):
            raise ValueError("mean, std, quantiles: give all of them or none")
        if list(self.quantiles) != sorted(self.quantiles) or not all(map(math.isfinite, self.quantiles)):
            raise ValueError("quantiles: give finite numbers, the least first")
        return self

    def example(self) -> Self:
        """Of a number spread evenly from 1 to 5."""
        if self.mean is not None:
            return self
        return self.model_copy(update={"mean": 3.0, "std": 2 / 3**0.5, "quantiles": (1.0, 2.0, 3.0, 4.0, 5.0)})

    def with_data(self, **facts: Any) -> Self:
        """facts: `column`, and its `mean`, `std` and `quantiles`, which a model that has its own keeps; ValueError
        where it is another column, or always the same number."""
        column = facts["column"]
        if self.column not in (None, column):
            raise ValueError(
                f"conditions.scalar.column: {self.column!r}, but the data give {column!r}; set "
                f"data.property_column={self.column}, or leave conditions.scalar.column null"
            )
        if self.mean is not None:
            return self.model_copy(update={"column": column})
        if not facts["std"] > 0:
            raise ValueError(
                f"conditions.scalar: {column!r} is {facts['mean']:g} for every training sample; choose another column"
            )
        own = {key: facts[key] for key in ("column", "mean", "std")}
        return self.model_copy(update={**own, "quantiles": tuple(facts["quantiles"])})


class Scalar(Condition):
    """Values are numbers (B,) float32 in the data's own units; NaN where they are not known."""

    Config = ScalarConfig
    argument = "properties"
    given_by = "a column of numbers, named by data.property_column"

    def __init__(self, config: ScalarConfig, dim: int):
        super().__init__(config, dim)
        if config.mean is None or config.std is None:
            raise ValueError("conditions.scalar.mean: not known; set it, or train on data with data.property_column")
        self.mean, self.std = config.mean, config.std
        self.embedding = TimeEmbedding(dim, config.num_frequencies)
        self.null_row = nn.Parameter(torch.randn(dim) * 0.02)

    def standardised(self, values: Tensor) -> Tensor:
        """(v - mean) / std of the training data, in float32."""
        return ((values.double() - self.mean) / self.std).float()

    def embed(self, values: Tensor) -> Conditioning:
        values = values.to(self.null_row.device)
        known = values.isfinite()
        x = self.standardised(torch.where(known, values, self.mean))
        told = Conditioning(self.embedding(SLOW * x).float())
        return told.where(known, self.null(len(values)))

    def null(self, n: int) -> Conditioning:
        return Conditioning(self.null_row.expand(n, -1))

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """As often as the training data have them, neighbours far apart; the first of more are the same."""
        grid = torch.tensor(self.config.quantiles, dtype=torch.float64)
        places = ((0.5 + TURN * torch.arange(n, dtype=torch.float64)) % 1) * (len(grid) - 1)
        low = places.floor().long().clamp(max=max(len(grid) - 2, 0))
        high = (low + 1).clamp(max=len(grid) - 1)
        return torch.lerp(grid[low], grid[high], places - low).float()

    def parse(self, value: Any) -> Tensor:
        """5.2, "5.2", "4.0-6.0" (ten numbers from the one to the other, or "4.0-6.0:5" five of them), "4,5.5", a list
        of them, or an array; NaN is no condition. Warns of numbers that are far from all of training."""
        numbers = [number for part in listed(value) for number in self._numbers(part)]
        if not numbers:
            raise ValueError("properties: empty; give at least one number")
        self._warn_of_far(numbers)
        return torch.tensor(numbers, dtype=torch.float32)

    def _numbers(self, part: Any) -> list[float]:
        if isinstance(part, int | float) and not isinstance(part, bool):
            return [self._finite(float(part))]
        text = str(part).strip()
        if re.fullmatch(rf"{NUMBER}|nan", text, re.IGNORECASE):
            return [self._finite(float(text))]
        if span := re.fullmatch(rf"({NUMBER})-({NUMBER})(?::(\d+))?", text):
            first, last = self._finite(float(span[1])), self._finite(float(span[2]))
            count = int(span[3] or SPAN)
            if first > last:
                raise ValueError(f"properties: {text} runs backwards; write {span[2]}-{span[1]}")
            if not 2 <= count <= MOST:
                raise ValueError(f"properties: {text} stands for {count} numbers; give 2 to {MOST}")
            return torch.linspace(first, last, count, dtype=torch.float64).tolist()
        if isinstance(part, str) and "," in text:
            return [number for piece in text.split(",") for number in self._numbers(piece)]
        raise ValueError(f"properties: {text!r} is neither a number, a range like 4.0-6.0 nor several with commas")

    @staticmethod
    def _finite(number: float) -> float:
        if math.isinf(number):
            raise ValueError("properties: infinite; give a finite number")
        return number

    def _warn_of_far(self, numbers: list[float]) -> None:
        low, high = self.config.quantiles[0], self.config.quantiles[-1]
        room = FAR * self.std
        far = sorted(
            {number for number in numbers if not math.isnan(number) and not low - room <= number <= high + room}
        )
        if far:
            shown = ", ".join(f"{number:g}" for number in far[:3]) + (", ..." if len(far) > 3 else "")
            warnings.warn(
                f"properties: {shown} is far from all that the model has seen of {self.config.column or 'it'}, "
                f"{low:g} to {high:g}; samples need not follow it", stacklevel=3,
            )  # fmt: skip

    def options(self, value: Any) -> list[str]:
        return ["--property", super().options(value)[1]]

    def describe(self, values: Tensor) -> list[str]:
        return ["" if math.isnan(value) else f"{value:.5g}" for value in values.tolist()]
