"""Crystals: a token an atom, with its element and its place in the cell, and a token for the lattice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ...atoms import modality as atoms
from ...atoms.grid import paste_grid
from ...progress import progress_of
from ..base import Dataset, Metric, Space, Splits
from . import data as files
from . import metrics, render
from .data import CrystalData


class CrystalConfig(atoms.AtomConfig, atoms.CrystalLosses):
    """Of crystals; MP20's have 1 to 20 atoms in their primitive cells."""

    name: Literal["crystal"] = "crystal"

    @classmethod
    def small(cls) -> CrystalConfig:
        return cls(max_atoms=20, elements="found")


class Crystal(atoms.AtomModality):
    """Data: `types` (B, N), `fractional` (B, N, 3) in [0, 1) and `lattice` (B, 6) in Angstrom and degrees."""

    Config = CrystalConfig
    DataConfig = CrystalData
    config: CrystalConfig
    crystals = True
    token_scale = 0.25  # most of a token are the zeros of its class

    def splits(self, data: CrystalData) -> Splits:
        with progress_of(transient=True) as progress:
            train, held_out = files.load(data, progress, self.config.max_atoms)
        label = data.label_column or ("spacegroup" if data.spacegroup else None)
        return self.datasets(train, held_out, label, data.property_column)

    def made(self, source: Path) -> Dataset:
        """Files of `data.read_files`."""
        return self.as_made(files.read_files(source))

    def read(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(files.read_files(path), batch_size)

    def read_own(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(files.read_files(path, own=True), batch_size)

    def spaces(self) -> list[Space]:
        return metrics.spaces()

    def metrics(self) -> list[Metric]:
        return metrics.metrics()

    @property
    def preprocessing(self) -> str:
        return "niggli cells"

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        return metrics.errors(made, data)

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        paste_grid([render.cells(row) for row in rows], path, columns, captions)

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        return render.write(data, folder, start)
