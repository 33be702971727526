"""`Systems` in memory and on disk."""

from pathlib import Path

import numpy as np
import pytest

from unilatent.modalities._atoms.systems import System, Systems


def salts() -> list[System]:
    return [
        System(np.array([11, 17]), np.eye(2, 3) / 2, np.array([3, 3, 3, 90, 90, 90.0]), "a", {"x": 1.0}),
        System(np.array([29]), np.zeros((1, 3)), np.array([2, 2, 2, 60, 60, 60.0]), "b"),
    ]  # fmt: skip


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    Systems.of(salts()).save(tmp_path / "s.npz")
    first = (tmp_path / "s.npz").read_bytes()
    found = Systems.load(tmp_path / "s.npz")
    for i, system in enumerate(salts()):
        assert found[i].types.tolist() == system.types.tolist() and found[i].name == system.name
        assert np.array_equal(found[i].coordinates, system.coordinates.astype(np.float32))
        assert found[i].lattice is not None and np.allclose(found[i].lattice, system.lattice)
    assert found.columns["x"][0] == 1.0 and np.isnan(found.columns["x"][1])
    found.save(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == first
    turned = found.take([1, 0])
    assert turned.names == ("b", "a") and turned[1].types.tolist() == [11, 17]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"s\.npz: not a file of systems"):
        Systems.load(path)
    np.savez(
        path, sizes=np.array([2]), types=np.zeros(1, np.uint8), coordinates=np.zeros((1, 3)), names=np.array(["a"])
    )
    with pytest.raises(ValueError, match="do not fit each other"):
        Systems.load(path)
    Systems.of(salts()).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"s\.npz"):
        Systems.load(path)
