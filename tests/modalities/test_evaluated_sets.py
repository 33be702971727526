"""`spread_evenly` on every kind of data set: an example depends on its number alone."""

from __future__ import annotations

import pytest

pytest.importorskip("datasets")

from test_hub import STREAM, opened, parquet

from unilatent.batches import spread_evenly


def seen(dataset, rows: range, count: int) -> list[int]:
    return [round(float(data[0, 0, 0]) * 255) for (data, _), _ in spread_evenly(dataset, rows, count)]


def test_of_a_stream_they_are_its_first_ones_wherever_one_begins(tmp_path):
    stream = opened(parquet(tmp_path / "set"), **STREAM).train
    whole = seen(stream, range(30), 30)
    assert len(set(whole)) == 30
    assert seen(stream, range(12, 30), 30) == whole[12:] and seen(stream, range(7), 30) == whole[:7]


def test_of_others_they_lie_evenly(tmp_path):
    dataset = opened(parquet(tmp_path / "set")).train
    everything = seen(dataset, range(len(dataset)), len(dataset))
    assert seen(dataset, range(10), 10) == [everything[i * len(dataset) // 10] for i in range(10)]
    assert seen(dataset, range(4, 6), 10) == seen(dataset, range(10), 10)[4:6]
