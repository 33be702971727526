"""Molecules: a token an atom, with its element and its place in space."""

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
from .data import MoleculeData


class MoleculeConfig(atoms.AtomConfig, atoms.MoleculeLosses):
    """Of molecules; QM9's have 3 to 29 atoms."""

    name: Literal["molecule"] = "molecule"

    @classmethod
    def small(cls) -> MoleculeConfig:
        return cls(max_atoms=29, elements=(1, 6, 7, 8, 9))


class Molecule(atoms.AtomModality):
    """Data: `types` (B, N) and `positions` (B, N, 3) in Angstrom."""

    Config = MoleculeConfig
    DataConfig = MoleculeData
    config: MoleculeConfig
    molecules = True

    def splits(self, data: MoleculeData) -> Splits:
        with progress_of(transient=True) as progress:
            train, held_out = files.load(data, progress, self.config.max_atoms)
        return self.datasets(train, held_out, data.label_column, data.property_column)

    def made(self, source: Path) -> Dataset:
        """Files of `render.read_files`."""
        return self.as_made(render.read_files(source))

    def read(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(render.read_files(path), batch_size)

    def read_own(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(render.read_files(path, own=True), batch_size)

    def spaces(self) -> list[Space]:
        return metrics.spaces()

    def metrics(self) -> list[Metric]:
        return metrics.metrics()

    @property
    def preprocessing(self) -> str:
        return "centred atoms, explicit hydrogens"

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        return metrics.errors(made, data)

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        paste_grid([render.cells(row) for row in rows], path, columns, captions)

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        return render.write(data, folder, start)
