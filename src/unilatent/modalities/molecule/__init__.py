"""Molecules: one token per atom, with its element and its Cartesian position."""

from __future__ import annotations

from typing import Literal

from ...listings import ALONE, Listings
from ...progress import progress_of
from .._atoms import modality as atoms
from ..base import Splits
from . import data as files
from . import metrics, render
from .data import MoleculeData


class MoleculeConfig(atoms.AtomConfig, atoms.FreeLossConfig):
    """Configuration of the molecule modality. Molecules of QM9 have 3 to 29 atoms."""

    name: Literal["molecule"] = "molecule"

    @classmethod
    def small(cls) -> MoleculeConfig:
        return cls(max_atoms=29, elements=(1, 6, 7, 8, 9))


class Molecule(atoms.SingleKindModality):
    """Data: `types` (B, N) and `positions` (B, N, 3) in Angstrom."""

    Config = MoleculeConfig
    DataConfig = MoleculeData
    config: MoleculeConfig
    has_free = True
    files_module = files
    metrics_module = metrics
    render_module = render

    def splits(self, data: MoleculeData, listings: Listings = ALONE) -> Splits:
        with progress_of(transient=True) as progress:
            train, held_out = listings.share(lambda: files.load(data, progress, self.config.max_atoms, listings))
        return self.datasets(train, held_out, data.label_column, data.property_column)

    @property
    def preprocessing(self) -> str:
        return "centred atoms, explicit hydrogens"
