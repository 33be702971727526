"""Many systems of atoms in a few arrays, and the one file they are kept in."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

HEAVIEST = 99
"""The largest atomic number that has a class of its own."""


@dataclass(frozen=True)
class System:
    """One molecule or crystal of n atoms.

    types: (n,) atomic numbers, 1 to 99. coordinates: (n, 3) float32: Cartesian in Angstrom of a molecule, fractional in
    [0, 1) of a crystal. lattice: a, b, c in Angstrom and alpha, beta, gamma in degrees; None of a molecule.
    name: where it came from. columns: further numbers that are known of it.
    """

    types: np.ndarray
    coordinates: np.ndarray
    lattice: np.ndarray | None = None
    name: str = ""
    columns: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Systems:
    """S systems of T atoms in all, atoms of one after those of the other.

    sizes: (S,) atoms of each. types: (T,) uint8. coordinates: (T, 3) float32. lattice: (S, 6) float32, or None when all
    are molecules. names: S. columns: name -> (S,) float64, NaN where it is not known.
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
        """(S + 1,) where each one's atoms begin, and the end."""
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
        """Those systems, in that order."""
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
        """All molecules, or all crystals."""
        periodic = [system.lattice is not None for system in systems]
        assert all(periodic) or not any(periodic), "molecules and crystals are kept apart"
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
        """As an .npz that needs no pickle; it appears whole or not at all. The same systems give the same bytes."""
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
        """ValueError names the file and what is wrong with it."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(f"{path}: not a file of systems ({error}); make it again") from None
        missing = {"sizes", "types", "coordinates", "names"} - found.keys()
        if missing:
            raise ValueError(f"{path}: not a file of systems (without {', '.join(sorted(missing))}); make it again")
        columns = {name.removeprefix("column."): found[name] for name in found if name.startswith("column.")}
        systems = Systems(
            found["sizes"], found["types"], found["coordinates"], found.get("lattice"),
            tuple(str(name) for name in found["names"]), columns,
        )  # fmt: skip
        rows, atoms = len(systems.sizes), int(systems.sizes.sum())
        of_atoms = (systems.types.shape, systems.coordinates.shape)
        of_rows = [len(systems.names), *(len(values) for values in columns.values())]
        of_rows += [] if systems.lattice is None else [len(systems.lattice)]
        if of_atoms != ((atoms,), (atoms, 3)) or any(size != rows for size in of_rows):
            raise ValueError(f"{path}: its arrays do not fit each other; make it again")
        return systems
