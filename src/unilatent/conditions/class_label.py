"""Class labels: one learned vector per class, and one for "no class"."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nets.layers import use_muon
from ..types import Conditioning
from .base import Condition, ConditionConfig, as_list


class ClassLabelConfig(ConditionConfig):
    """num_classes and class_names are read from the data if left null, and stored with the model."""

    name: Literal["class_label"] = "class_label"
    num_classes: int | None = Field(default=None, ge=1)
    class_names: tuple[str, ...] | None = None
    reserved_rows: int = Field(default=0, ge=0)
    """Unused rows after the null row. UNITE's released checkpoints contain two unused vectors (an extra label row and a
    special time); keeping them makes conversion lossless and parameter counts equal."""

    @classmethod
    def small(cls) -> Self:
        return cls(num_classes=10)

    def example(self) -> Self:
        return self if self.num_classes else self.model_copy(update={"num_classes": 10})

    def with_data(self, **facts: Any) -> Self:
        """facts: `class_names` of the data; ValueError if the configuration contradicts them."""
        class_names = facts["class_names"]
        if self.num_classes is not None and self.num_classes != len(class_names):
            raise ValueError(
                f"conditions.class_label.num_classes: {self.num_classes}, but the data has {len(class_names)} classes; "
                "leave it null to use the data's"
            )
        if self.class_names is not None and tuple(self.class_names) != tuple(class_names):
            raise ValueError("conditions.class_label.class_names differ from the data's; leave them null")
        return self.model_copy(update={"num_classes": len(class_names), "class_names": tuple(class_names)})


class ClassLabel(Condition):
    """Values are class indices (B,) int64 in [0, num_classes)."""

    Config = ClassLabelConfig
    argument = "labels"

    def __init__(self, config: ClassLabelConfig, dim: int):
        super().__init__(config, dim)
        if config.num_classes is None:
            raise ValueError("conditions.class_label.num_classes: unknown; set it, or train on data with classes")
        self.num_classes = config.num_classes
        self.table = use_muon(nn.Embedding(self.num_classes + 1 + config.reserved_rows, dim))
        nn.init.normal_(self.table.weight, std=0.02)

    @property
    def cycle(self) -> int:
        return self.num_classes

    def embed(self, values: Tensor) -> Conditioning:
        return Conditioning(self.table(values.to(self.table.weight.device)))

    def null(self, n: int) -> Conditioning:
        return Conditioning(self.table.weight[self.num_classes].expand(n, -1))

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(n) % self.num_classes

    def parse(self, value: Any) -> Tensor:
        """Parse 3, "3", "0-9", "2,5", "tench", a list of these, or an array of indices. Only text can be a name."""
        labels = [label for part in as_list(value) for label in self._labels(part)]
        if not labels:
            raise ValueError("labels: empty; give at least one class")
        return torch.tensor(labels)

    def _labels(self, part: Any) -> list[int]:
        names = list(self.config.class_names or ())
        if isinstance(part, int) and not isinstance(part, bool):
            return [self._in_range(part)]
        text = str(part).strip()
        if text in names:
            return [names.index(text)]
        if re.fullmatch(r"-?\d+", text):
            return [self._in_range(int(text))]
        if span := re.fullmatch(r"(\d+)-(\d+)", text):
            first, last = self._in_range(int(span[1])), self._in_range(int(span[2]))
            if first > last:
                raise ValueError(f"labels: {text} runs backwards; write {last}-{first}")
            return list(range(first, last + 1))
        if "," in text:
            return [label for piece in text.split(",") for label in self._labels(piece)]
        known = f"; classes: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else ""
        raise ValueError(f"labels: {text!r} is neither a class number, a range like 0-9 nor a class name{known}")

    def _in_range(self, label: int) -> int:
        if not 0 <= label < self.num_classes:
            raise ValueError(f"labels: {label} is out of range; this model has classes 0 to {self.num_classes - 1}")
        return label

    def describe(self, values: Tensor) -> list[str]:
        names = self.config.class_names
        return [names[int(value)] if names else str(int(value)) for value in values]
