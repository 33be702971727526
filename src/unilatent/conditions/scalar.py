"""A number per sample (a column of the data), standardised by mean and standard deviation of the training data.

NaN, an unknown number, is exactly "no condition": samples without the number are trained on unconditionally.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..controls import Control
from ..nets.embeddings import TimeEmbedding
from ..types import Conditioning
from .base import Condition, ConditionConfig, as_list

SLOW = 0.25
"""Factor on the input of the random Fourier features: low frequencies, so that similar numbers embed similarly."""
FAR = 1.0
"""Distance outside the training range, in standard deviations, above which a number causes a warning."""
SPAN = 10
"""Default number of values in a range such as 4.0-6.0."""
MOST = 10_000
"""Largest number of values in a range."""
TURN = (math.sqrt(5) - 1) / 2
"""Inverse golden ratio: its multiples modulo 1 are a low-discrepancy sequence."""
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class ScalarConfig(ConditionConfig):
    """All but `num_frequencies` are read from the data if left empty, and stored with the model.

    column: name of the number in the data.
    mean, std: of the number over the training data.
    quantiles: of the training data, at even steps from the minimum to the maximum.
    num_frequencies: number of random Fourier features.
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
            raise ValueError("quantiles: give finite numbers in ascending order")
        return self

    def example(self) -> Self:
        """Return a copy for a number that is uniform from 1 to 5, unless the statistics are known."""
        if self.mean is not None:
            return self
        return self.model_copy(update={"mean": 3.0, "std": 2 / 3**0.5, "quantiles": (1.0, 2.0, 3.0, 4.0, 5.0)})

    def with_data(self, **facts: Any) -> Self:
        """facts: `column`, and its `mean`, `std` and `quantiles`, ignored if the model already has statistics.

        ValueError if it is another column, or constant.
        """
        column = facts["column"]
        if self.column not in (None, column):
            raise ValueError(
                f"conditions.scalar.column: {self.column!r}, but the data has {column!r}; set "
                f"data.property_column={self.column}, or leave conditions.scalar.column null"
            )
        if self.mean is not None:
            return self.model_copy(update={"column": column})
        if not facts["std"] > 0:
            raise ValueError(
                f"conditions.scalar: {column!r} is {facts['mean']:g} for every training sample; choose another column"
            )
        statistics = {key: facts[key] for key in ("column", "mean", "std")}
        return self.model_copy(update={**statistics, "quantiles": tuple(facts["quantiles"])})


class Scalar(Condition):
    """Values are numbers (B,) float32 in the data's units; NaN where unknown."""

    Config = ScalarConfig
    argument = "properties"
    given_by = "a column of numbers, named in data.property_column"

    def __init__(self, config: ScalarConfig, dim: int):
        super().__init__(config, dim)
        if config.mean is None or config.std is None:
            raise ValueError(
                "conditions.scalar.mean: unknown; set conditions.scalar.mean and .std, or name data.property_column"
            )
        self.mean, self.std = config.mean, config.std
        self.embedding = TimeEmbedding(dim, config.num_frequencies)
        self.null_row = nn.Parameter(torch.randn(dim) * 0.02)

    @property
    def column(self) -> str | None:
        column: str | None = self.config.column
        return column

    def standardised(self, values: Tensor) -> Tensor:
        """Return (values - mean) / std of the training data, in float32."""
        return ((values.double() - self.mean) / self.std).float()

    def embed(self, values: Tensor) -> Conditioning:
        values = values.to(self.null_row.device)
        known = values.isfinite()
        x = self.standardised(torch.where(known, values, self.mean))
        embedded = Conditioning(self.embedding(SLOW * x).float())
        return embedded.where(known, self.null(len(values)))

    def null(self, n: int) -> Conditioning:
        return Conditioning(self.null_row.expand(n, -1))

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n numbers with the training data's distribution, a low-discrepancy sequence of its quantiles.

        The first n of a longer sequence are the same; consecutive numbers are far apart.
        """
        grid = torch.tensor(self.config.quantiles, dtype=torch.float64)
        positions = ((0.5 + TURN * torch.arange(n, dtype=torch.float64)) % 1) * (len(grid) - 1)
        low = positions.floor().long().clamp(max=max(len(grid) - 2, 0))
        high = (low + 1).clamp(max=len(grid) - 1)
        return torch.lerp(grid[low], grid[high], positions - low).float()

    def parse(self, value: Any) -> Tensor:
        """Parse 5.2, "5.2", "4.0-6.0" (ten numbers from 4 to 6; "4.0-6.0:5" for five), "4,5.5", a list of these, or an
        array; NaN is "no condition". Warn about numbers far outside the training range."""
        numbers = [number for part in as_list(value) for number in self._numbers(part)]
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
                raise ValueError(f"properties: {text} is a range of {count} numbers; use 2 to {MOST}")
            return torch.linspace(first, last, count, dtype=torch.float64).tolist()
        if isinstance(part, str) and "," in text:
            return [number for piece in text.split(",") for number in self._numbers(piece)]
        raise ValueError(f"properties: {text!r} is neither a number, a range like 4.0-6.0 nor a list with commas")

    @staticmethod
    def _finite(number: float) -> float:
        if math.isinf(number):
            raise ValueError("properties: infinite; give a finite number")
        return number

    def _warn_of_far(self, numbers: list[float]) -> None:
        low, high = self.config.quantiles[0], self.config.quantiles[-1]
        margin = FAR * self.std
        far = sorted(
            {number for number in numbers if not math.isnan(number) and not low - margin <= number <= high + margin}
        )
        if far:
            shown = ", ".join(f"{number:g}" for number in far[:3]) + (", ..." if len(far) > 3 else "")
            warnings.warn(
                f"properties: {shown} is far outside the training range of {self.config.column or 'it'}, "
                f"{low:g} to {high:g}; samples may not follow it", stacklevel=3,
            )  # fmt: skip

    def options(self, value: Any) -> list[str]:
        return ["--property", super().options(value)[1]]

    def control(self) -> Control:
        """A line for numbers and ranges."""
        low, high = self.config.quantiles[0], self.config.quantiles[-1]
        hint = f"{low:.4g} to {high:.4g} in training; a number, a list 1,2 or a range 1-2; empty: as in training"
        middle = self.config.quantiles[len(self.config.quantiles) // 2]
        return Control(self.config.column or "Property", examples=(f"{middle:.4g}",), hint=hint)

    def describe(self, values: Tensor) -> list[str]:
        return ["" if math.isnan(value) else f"{value:.5g}" for value in values.tolist()]
