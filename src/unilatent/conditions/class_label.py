"""Class labels: one learned vector per class, and one for "no class".

How users name classes, in this order: text that equals a class name is that class, and a number is also the one class
whose name has its value (1 is 01); a range of such numbers runs over the names that are numbers, in the order of the
numbers; all other numbers count classes from 0. An `int` in Python always counts.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..controls import Control
from ..nets.layers import use_muon
from ..plain_text import composed, count_of, same_names
from ..types import Conditioning
from .base import Condition, ConditionConfig, as_list

_NUMBER = re.compile("[0-9]+")
_FIRST = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@lru_cache(maxsize=8)
def _lookup(names: tuple[str, ...]) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Return the class of each name, as it is and with its accents composed, and the classes of each number."""
    by_name = {name: i for i, name in enumerate(names)}
    by_value: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        by_name.setdefault(composed(name), i)
        if _NUMBER.fullmatch(name):
            by_value.setdefault(int(name), []).append(i)
    return by_name, by_value


def _place(index: int) -> str:
    return f"the {_FIRST[index]} class" if index < len(_FIRST) else f"class {index + 1} in their order"


def _is_index(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


class ClassLabelConfig(ConditionConfig):
    """Both are read from the data if left null, and stored with the model.

    num_classes: number of classes; data with another number are refused.
    class_names: names of the classes, in the order of their indices.
    """

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
        """facts: `class_names` of the data; ValueError if the configuration contradicts them.

        Data that have the configured names in another order have taken over that order before (`Dataset.adopt`).
        """
        class_names = facts["class_names"]
        if self.num_classes is not None and self.num_classes != len(class_names):
            raise ValueError(
                f"conditions.class_label.num_classes: {self.num_classes}, but the data has "
                f"{count_of(len(class_names), 'class')}; "
                "set it to null to use the data's"
            )
        if self.class_names is not None and tuple(self.class_names) != tuple(class_names):
            raise ValueError("conditions.class_label.class_names differ from the data's; set them to null")
        return self.model_copy(update={"num_classes": len(class_names), "class_names": tuple(class_names)})

    def keeping(self, stored: dict[str, Any]) -> Self:
        """Return a copy with the stored order of the class names, if they are the same names."""
        names = tuple(stored.get("class_names") or ())
        same = same_names(names, self.class_names or ())
        return self.model_copy(update={"class_names": names}) if same else self


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
        """Parse 3, "3", "0-9", "2,5", "tench", a list of these, or an array of indices; see the module for the rule.

        An index that is also the name of another class is warned of. ValueError names what is no class.
        """
        labels = [label for part in as_list(value) for label in self._labels(part)]
        if not labels:
            raise ValueError("labels: empty; give at least one class")
        return torch.tensor(labels)

    def options(self, value: Any) -> list[str]:
        """Return the options for these classes: an int that is also a class name becomes the name of its class."""
        names = self._names
        parts = [names[part] if _is_index(part) and self._called(str(part)) else part for part in as_list(value)]
        return super().options(parts)

    def control(self) -> Control:
        """All classes to choose from."""
        names = self._names or tuple(map(str, range(self.num_classes)))
        return Control("Class", choices=names, hint="none chosen: all classes, evenly")

    @property
    def _names(self) -> tuple[str, ...]:
        return self.config.class_names or ()

    def _labels(self, part: Any) -> list[int]:
        names = self._names
        if _is_index(part):
            return [self._index(part)]
        text = str(part).strip()
        if called := self._called(text):
            if len(called) > 1:
                raise ValueError(f"labels: {text} may be {' or '.join(repr(names[i]) for i in called)}; write the name")
            return called
        if re.fullmatch(r"-?[0-9]+", text):
            label = self._in_range(int(text))
            if _NUMBER.fullmatch("".join(names[label : label + 1])):
                warnings.warn(
                    f"labels: no class is called {text!r}; it counts classes from 0: the class called "
                    f"{names[label]!r}. Write class names",
                    stacklevel=2,
                )
            return [label]
        if span := re.fullmatch(r"([0-9]+)\s*-\s*([0-9]+)", text):
            return self._called(f"{span[1]}-{span[2]}") or self._range(span[1], span[2])
        if "," in text:
            return [label for piece in self._pieces(text) for label in self._labels(piece)]
        known = f"; classes: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else ""
        raise ValueError(f"labels: {text!r} is neither a class number, a range like 0-9 nor a class name{known}")

    def _called(self, text: str) -> list[int]:
        """Return the class of this name; of a number that is no name, all classes whose names have its value."""
        by_name, by_value = _lookup(self._names)
        for name in (text, composed(text)):
            if name in by_name:
                return [by_name[name]]
        return by_value.get(int(text), []) if _NUMBER.fullmatch(text) else []

    def _range(self, first: str, last: str) -> list[int]:
        """Return the classes from `first` to `last`: of names that are numbers where these are meant, else of indices.

        A number that no class has may end a range of names if it lies between two of them.
        """
        names, text = self._names, f"{first}-{last}"
        start, end = int(first), int(last)
        if start > end:
            raise ValueError(f"labels: {text} runs backwards; write {last}-{first}")
        numbers = sorted((int(name), name) for name in names if _NUMBER.fullmatch(name))
        named = [bound for bound in (first, last) if self._called(bound)]
        within = bool(numbers) and numbers[0][0] <= start and end <= numbers[-1][0]
        counts = all(int(name) == i for i, name in enumerate(names) if start <= i <= end and _NUMBER.fullmatch(name))
        if len(named) == 2 or (within and (named or not counts)):
            low = (start, first if first in names else "")
            inside = [name for value, name in numbers if low <= (value, name) and value <= end]
            if last in names:
                inside = [name for name in inside if (int(name), name) <= (end, last)]
            if inside:
                return [names.index(name) for name in inside]
        given = f"give two class names ({', '.join(names[:12])}{' ...' if len(names) > 12 else ''})"
        if named and (not counts or int(named[0]) not in self._called(named[0])):
            other = last if named[0] == first else first
            raise ValueError(f"labels: {text}: {named[0]} is the name of a class and {other} is not; {given}")
        if not counts:
            raise ValueError(f"labels: {text}: no class is called {' or '.join(dict.fromkeys((first, last)))}; {given}")
        return list(range(self._in_range(start), self._in_range(end) + 1))

    def _pieces(self, text: str) -> list[str]:
        """Split a list at its commas, but not inside the longest class names that contain commas."""
        words, pieces = text.split(","), []
        longest = 1 + max((name.count(",") for name in self._names), default=0)
        while words:
            counts = range(min(longest, len(words)), 1, -1)
            count = next((n for n in counts if self._called(",".join(words[:n]).strip())), 1)
            pieces.append(",".join(words[:count]))
            words = words[count:]
        return pieces

    def _index(self, index: int) -> int:
        """Return an index that was given as a number; a warning if it is also the name of another class."""
        names, called = self._names, self._called(str(index))
        if called and self._in_range(index) not in called:
            name = names[called[0]]
            warnings.warn(
                f"labels: {index} as a number means {_place(index)}, {names[index]!r}; for class {name!r} pass the "
                f"text {name!r}",
                stacklevel=2,
            )
        return self._in_range(index)

    def _in_range(self, label: int) -> int:
        if not 0 <= label < self.num_classes:
            names = self._names
            known = f", called {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else ""
            rule = "; what equals a class name is that class, other numbers count from 0" if names else ""
            raise ValueError(
                f"labels: {label} is out of range; this model has classes 0 to {self.num_classes - 1}{known}{rule}"
            )
        return label

    def describe(self, values: Tensor) -> list[str]:
        names = self.config.class_names
        return [names[int(value)] if names else str(int(value)) for value in values]
