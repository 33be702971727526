"""Condition values of generated samples that are taken from the data, where no default covers them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batches import value_rows, values_of
from ..conditions.base import Condition
from ..modalities.base import Dataset, Splits, Stream


def values_from_data(
    conditions: Sequence[Condition], given: Mapping[str, Any], splits: Splits | None, num: int
) -> dict[str, Tensor]:
    """Return values for `num` samples of the conditions that are not given, taken from real samples; {} if not needed.

    They are needed if the values of such a condition cannot be enumerated (texts, numbers). They come from held-out
    samples, or from training samples if none are held out, spread evenly. All conditions take them from the same
    samples, so that they belong together. Where some conditions are given, only samples with those values are used;
    ValueError if there are none.
    """
    missing = [c for c in conditions if given.get(c.argument) is None]
    if not num or splits is None or all(c.cycle is not None for c in missing):
        return {}
    dataset = splits.shown
    keys = [c.argument for c in missing if c.argument in dataset.facts]
    if not keys:
        return {}
    size = num if isinstance(dataset, Stream) else len(dataset)
    fixed = {c: given[c.argument] for c in conditions if c not in missing}
    indices = _matching(dataset, size, fixed, keys, num) if fixed else [row * size // num for row in range(num)]
    chosen = values_of(dataset, indices)
    return {key: value_rows([values[key] for values in chosen]) for key in keys}


def _matching(dataset: Dataset, size: int, fixed: dict[Condition, Any], keys: list[str], num: int) -> list[int]:
    """Return, for each of `num` samples, a sample of the data that has its given values, spread evenly over those."""
    way_out = f"give {' and '.join(keys)} as well"
    for condition in fixed:
        if condition.argument not in dataset.facts:
            raise ValueError(
                f"{condition.argument}: given, but the data has none, so it cannot supply matching {keys[0]}; {way_out}"
            )
    rows = {condition.argument: condition.parse(value) for condition, value in fixed.items()}
    requested = [tuple(_comparable(rows[key][i % len(rows[key])]) for key in rows) for i in range(num)]
    indices_by_values: dict[tuple[Any, ...], list[int]] = {}
    for index, values in enumerate(values_of(dataset, range(size))):
        key_values = tuple(_comparable(value_rows([values[key]])[0]) for key in rows)
        indices_by_values.setdefault(key_values, []).append(index)
    totals, used = Counter(requested), Counter[tuple[Any, ...]]()
    chosen = []
    for i, key_values in enumerate(requested):
        candidates = indices_by_values.get(key_values)
        if candidates is None:
            described = ", ".join(c.describe(rows[c.argument][[i % len(rows[c.argument])]])[0] for c in fixed)
            raise ValueError(f"{next(iter(rows))}: no sample of the data has {described}; {way_out}")
        chosen.append(candidates[used[key_values] * len(candidates) // totals[key_values]])
        used[key_values] += 1
    return chosen


def _comparable(row: Tensor) -> Any:
    """Return one condition value as a hashable; of a text, its bytes without padding."""
    return row.numpy().tobytes().rstrip(b"\0") if row.dtype == torch.uint8 else row.tolist()
