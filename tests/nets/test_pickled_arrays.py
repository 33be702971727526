"""Arrays are read from a pickle; whatever else a pickle could do is refused before it happens."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from unilatent.nets.pickled_arrays import is_pickle, read_arrays


def written(folder: Path, content: object, protocol: int = 4) -> Path:
    path = folder / "weights.ckpt"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_nested_arrays(tmp_path: Path, protocol: int):
    row = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = written(tmp_path, {"a": {"b/c": row, "d": np.asfortranarray(row)}, "e": np.float64([1.5])}, protocol)
    found = read_arrays(path)
    assert is_pickle(path) and list(found) == ["a/b/c", "a/d", "e"]
    assert torch.equal(found["a/b/c"], torch.from_numpy(row)) and torch.equal(found["a/d"], torch.from_numpy(row))
    assert found["e"].dtype == torch.float64 and found["e"].tolist() == [1.5]


class Attack:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load])
def test_nothing_is_run(tmp_path: Path, function):
    mark = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(mark)!r})" if function is eval else str(mark)
    path = written(tmp_path, {"a": Attack(function, argument)})
    with pytest.raises(ValueError, match=r"it names .*, which is not loaded"):
        read_arrays(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": [1]}, "a holds a list, not arrays by name"),
        ([np.zeros(2)], "it holds a list"),
        ({1: np.zeros(2)}, "not arrays by name"),
        ({"a": np.array([print], dtype=object)}, "names builtins.print"),
        ({"a": np.array(["x"], dtype=object)}, "an array of Python objects"),
        ({"a": np.zeros(2, dtype=np.int64)}, "elements of type <i8 are not read"),
        ({"a": np.zeros(2, dtype=">f4")}, "elements of type >f4 are not read"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: object, words: str):
    with pytest.raises(ValueError, match=words):
        read_arrays(written(tmp_path, content))


def test_damaged_files(tmp_path: Path):
    whole = pickle.dumps({"a": np.zeros(100, dtype=np.float32)}, protocol=4)
    path = tmp_path / "weights.ckpt"
    for content in (whole[: len(whole) // 2], b"\x80\x04.", whole.replace(b"K\x64\x85", b"K\x65\x85")):
        path.write_bytes(content)
        assert content != whole
        with pytest.raises(ValueError, match="not a readable pickle of arrays") as refusal:
            read_arrays(path)
        assert "\n" not in str(refusal.value)
    path.write_bytes(b"PK\x03\x04")
    assert not is_pickle(path)
