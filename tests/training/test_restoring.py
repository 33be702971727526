"""Tensors of a checkpoint: read in slices, by the first process for all or by each process its shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from unilatent import tensor_files
from unilatent.processes import Processes, together
from unilatent.tensor_files import TensorFile
from unilatent.training.restoring import restore

TENSORS = {
    "matrix": torch.arange(70.0).view(7, 10),
    "cube": torch.arange(4 * 6 * 5, dtype=torch.bfloat16).view(4, 6, 5),
    "mask": torch.tensor([True, False, True]),
    "counter": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_tensors_and_slices_are_those_of_the_library(file: Path) -> None:
    whole, found = load_file(file), TensorFile.open(file)
    assert found.tensors.keys() == TENSORS.keys()
    with file.open("rb") as opened:
        for name, tensor in whole.items():
            read = found.read(opened, name)
            assert torch.equal(read, tensor) and read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(found.read(opened, "matrix", (2, 0), (3, 10)), whole["matrix"][2:5])
        assert torch.equal(found.read(opened, "cube", (1, 2, 4), (3, 4, 1)), whole["cube"][1:4, 2:6, 4:])
        assert found.read(opened, "matrix", (7, 0), (0, 10)).shape == (0, 10)


def test_a_file_that_is_cut_off_is_no_tensor_file(file: Path) -> None:
    found = TensorFile.open(file)
    file.write_bytes(file.read_bytes()[:-8])
    with file.open("rb") as opened, pytest.raises(OSError, match="too early"):
        for name in TENSORS:
            found.read(opened, name)


class Alone(Processes):
    """A process of a fake group that finds out everything itself; what it is to be sent does not arrive."""

    def __init__(self, is_main: bool = True) -> None:
        super().__init__("cpu")
        self.is_main, self.sent = is_main, list[list[Tensor]]()

    def from_main(self, find: Any) -> Any:
        return find()

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def broadcast(self, tensors: Any) -> None:
        self.sent.append(list(tensors))


@pytest.fixture
def fake_group() -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield lambda rank: dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mesh", "placements", "rank", "rows"),
    [
        ((4,), [Shard(0)], 0, slice(0, 2)),
        ((4,), [Shard(0)], 3, slice(6, 7)),
        ((2, 2), [Replicate(), Shard(0)], 3, slice(4, 7)),
    ],
)
def test_each_process_reads_only_its_shard(
    file: Path, fake_group: Any, monkeypatch: pytest.MonkeyPatch, mesh: Any, placements: Any, rank: int, rows: slice
) -> None:
    """Shards of unequal size, and a copy for each machine. Replicated tensors are sent by the first process."""
    fake_group(rank)
    empty = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    devices = init_device_mesh("cpu", mesh)
    empty["matrix"] = distribute_tensor(empty["matrix"], devices, placements, src_data_rank=None)
    read, original = [], tensor_files._read

    def count(*arguments: Any) -> Tensor:
        tensor = original(*arguments)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(tensor_files, "_read", count)
    processes = Alone(is_main=False)
    restore(file, lambda _: empty, processes)
    local = empty["matrix"].to_local()  # type: ignore[attr-defined]
    assert torch.equal(local, TENSORS["matrix"][rows]) and read == [local.nbytes]
    assert sum(len(group) for group in processes.sent) == len(TENSORS) - 1
    assert not empty["cube"].any(), "this process waits for what it is sent"


def test_the_first_process_fills_and_sends_all(file: Path) -> None:
    empty = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items() if name != "mask"}
    processes = Alone()
    restore(file, lambda _: empty, processes, ignored={"mask"})
    assert all(torch.equal(empty[name], TENSORS[name]) for name in empty)
    assert {id(t) for group in processes.sent for t in group} == {id(t) for t in empty.values()}


@pytest.mark.parametrize("harm", ["nan", "shape", "missing"])
def test_a_file_that_does_not_fit_is_refused_after_all_was_sent(tmp_path: Path, harm: str) -> None:
    path, processes = tmp_path / "y.safetensors", Alone()
    stored = {"a": torch.ones(3), "b": torch.ones(2)}
    if harm == "nan":
        stored["a"][1] = torch.nan
    save_file(stored if harm != "missing" else {"a": stored["a"]}, path)
    empty = {"a": torch.zeros(3), "b": torch.zeros(2 if harm != "shape" else 5)}
    expected = {"nan": "a is not finite", "shape": "other shapes: b", "missing": "lacks b"}[harm]
    with pytest.raises(ValueError, match=rf"y.safetensors: .*{expected}"):
        restore(path, lambda _: empty, processes)
    assert len(processes.sent) == (1 if harm == "nan" else 0), "nobody waits for a tensor that does not come"


def test_small_tensors_are_sent_together_and_large_ones_alone() -> None:
    small, large = [torch.zeros(100) for _ in range(50)], [torch.zeros(2**18), torch.zeros(2**19)]
    other = torch.zeros(3, dtype=torch.int64)
    groups = list(together([*small[:20], large[0], other, *small[20:], large[1]]))
    assert sorted(map(len, groups)) == [1, 1, 1, 50]
    assert {id(t) for group in groups for t in group} == {id(t) for t in (*small, *large, other)}
    many = [torch.zeros(2**17) for _ in range(100)]  # half a MiB each
    assert [len(group) for group in together(many)] == [32, 32, 32, 4]
