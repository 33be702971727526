"""Crystals: one token per atom, with its element and fractional coordinates, and one token for the lattice."""

from __future__ import annotations

from typing import Literal

from ...listings import ALONE, Listings
from ...progress import progress_of
from .._atoms import modality as atoms
from ..base import Splits
from . import data as files
from . import metrics, render
from .data import CrystalData


class CrystalConfig(atoms.AtomConfig, atoms.PeriodicLossConfig):
    """Configuration of the crystal modality. Primitive cells of MP20 have 1 to 20 atoms."""

    name: Literal["crystal"] = "crystal"

    @classmethod
    def small(cls) -> CrystalConfig:
        return cls(max_atoms=20, elements="found")


class Crystal(atoms.SingleKindModality):
    """Data: `types` (B, N), `fractional` (B, N, 3) in [0, 1) and `lattice` (B, 6) in Angstrom and degrees."""

    Config = CrystalConfig
    DataConfig = CrystalData
    config: CrystalConfig
    has_periodic = True
    files_module = files
    metrics_module = metrics
    render_module = render
    token_scale = 0.25  # most channels of a token are zeros of its one-hot class

    def splits(self, data: CrystalData, listings: Listings = ALONE) -> Splits:
        with progress_of(transient=True) as progress:
            train, held_out = listings.share(lambda: files.load(data, progress, self.config.max_atoms, listings))
        label = data.label_column or ("spacegroup" if data.spacegroup else None)
        return self.datasets(train, held_out, label, data.property_column)

    @property
    def preprocessing(self) -> str:
        return "niggli cells"
