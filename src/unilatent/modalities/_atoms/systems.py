"""Many systems of atoms in a few flat arrays, and the .npz file that stores them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

HEAVIEST = 99
"""The largest atomic number that has a class of its own."""


@dataclass(frozen=True)
class System:
    """One system of n atoms.

    types: (n,) atomic numbers, 1 to 99. coordinates: (n, 3) float32, Cartesian in Angstrom for a free system,
    fractional in [0, 1) for a periodic one. lattice: (6,) a, b, c in Angstrom and alpha, beta, gamma in degrees; None
    for a free system. name: identifies the system, e.g. its file. columns: further known numbers by name. note: what
    the user has to know about how it was read.
    """

    types: np.ndarray
    coordinates: np.ndarray
    lattice: np.ndarray | None = None
    name: str = ""
    columns: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Systems:
    """S systems with T atoms in total, either all free or all periodic. Atoms are concatenated in system order.

    sizes: (S,) atoms per system. types: (T,) uint8. coordinates: (T, 3) float32. lattice: (S, 6) float32, or None for
    free systems. names: one per system. columns: name -> (S,) float64, NaN where the value is unknown.
    """

    sizes: np.ndarray
    types: np.ndarray
    coordinates: np.ndarray
    lattice: np.ndarray | None
    names: tuple[str, ...]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def starts(self) -> np.ndarray:
        """(S + 1,) offset of the first atom of each system, followed by T."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def __getitem__(self, index: int) -> System:
        index = range(len(self))[index]
        atoms = slice(self.starts[index], self.starts[index + 1])
        columns = {name: float(values[index]) for name, values in self.columns.items()}
        lattice = None if self.lattice is None else self.lattice[index]
        return System(self.types[atoms], self.coordinates[atoms], lattice, self.names[index], columns)

    def __iter__(self) -> Iterator[System]:
        return map(self.__getitem__, range(len(self)))

    def take(self, rows: Sequence[int] | np.ndarray) -> Systems:
        """Return the systems at these indices, in this order."""
        starts, rows = self.starts, np.asarray(rows, dtype=np.int64)
        atoms = [np.arange(starts[row], starts[row + 1]) for row in rows]
        flat = np.concatenate(atoms) if atoms else np.zeros(0, np.int64)
        return Systems(
            self.sizes[rows], self.types[flat], self.coordinates[flat],
            None if self.lattice is None else self.lattice[rows], tuple(self.names[row] for row in rows),
            {name: values[rows] for name, values in self.columns.items()},
        )  # fmt: skip

    @staticmethod
    def of(systems: Sequence[System]) -> Systems:
        """Pack a list of systems, all free or all periodic."""
        periodic = [system.lattice is not None for system in systems]
        assert all(periodic) or not any(periodic), "free and periodic systems cannot be stored together"
        names = dict.fromkeys(name for system in systems for name in system.columns)
        return Systems(
            np.array([len(system.types) for system in systems], np.int64),
            np.concatenate([np.asarray(system.types, np.uint8) for system in systems] or [np.zeros(0, np.uint8)]),
            np.concatenate(
                [np.asarray(system.coordinates, np.float32) for system in systems] or [np.zeros((0, 3), np.float32)]
            ),
            np.array([system.lattice for system in systems], np.float32).reshape(-1, 6) if any(periodic) else None,
            tuple(system.name for system in systems),
            {name: np.array([system.columns.get(name, np.nan) for system in systems]) for name in names},
        )

    def save(self, path: Path) -> None:
        """Write an .npz file without pickled objects, atomically. Equal systems give equal bytes."""
        arrays = {
            "sizes": self.sizes, "types": self.types, "coordinates": self.coordinates, "names": np.array(self.names),
            **({} if self.lattice is None else {"lattice": self.lattice}),
            **{f"column.{name}": values for name, values in self.columns.items()},
        }  # fmt: skip
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: Path) -> Systems:
        """Read a file that `save` wrote; ValueError names the file and what is wrong with it."""
        arrays = load_arrays(path)
        if missing := FIELDS - arrays.keys():
            raise ValueError(f"{path}: not a file of systems (without {', '.join(sorted(missing))}); give another one")
        return Systems.of_arrays(arrays, path)

    @staticmethod
    def of_arrays(arrays: dict[str, np.ndarray], path: Path) -> Systems:
        """Return the systems of the arrays that `save` wrote; ValueError names the file and what does not fit."""
        columns = {name.removeprefix("column."): arrays[name] for name in arrays if name.startswith("column.")}
        integers = [arrays[name].dtype.kind in "iu" and arrays[name].ndim == 1 for name in ("sizes", "types")]
        floats = [arrays[name].dtype.kind == "f" for name in ("coordinates", "lattice") if name in arrays]
        named = arrays["names"].dtype.kind == "U" and arrays["names"].ndim == 1
        if not all((*integers, *floats, named, *(values.dtype.kind in "iuf" for values in columns.values()))):
            raise ValueError(f"{path}: its arrays are not those of systems; give another file")
        systems = Systems(
            arrays["sizes"], arrays["types"], arrays["coordinates"], arrays.get("lattice"),
            tuple(str(name) for name in arrays["names"]), columns,
        )  # fmt: skip
        rows, atoms = len(systems.sizes), int(systems.sizes.sum())
        shapes = [systems.types.shape == (atoms,), systems.coordinates.shape == (atoms, 3), len(systems.names) == rows]
        shapes += [values.shape == (rows,) for values in columns.values()]
        shapes += [] if systems.lattice is None else [systems.lattice.shape == (rows, 6)]
        if not all(shapes) or (rows and systems.sizes.min() < 0):
            raise ValueError(f"{path}: its arrays do not fit each other; give another file")
        return systems


FIELDS = frozenset(("sizes", "types", "coordinates", "names"))
"""Arrays that every file of `Systems.save` has."""


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file, except those that are no plain numbers or text; ValueError names the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: array for name in file.files if (array := _plain(file, name)) is not None}
    except Exception as error:  # OSError, BadZipFile, zlib.error, EOFError, MemoryError, ... of a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a file of systems ({reason[:120]}); copy it again or give another one") from None


def _plain(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray | None:
    try:
        return file[name]
    except ValueError as error:
        if "pickle" in str(error):  # Python objects, which other programs store beside their arrays
            return None
        raise
