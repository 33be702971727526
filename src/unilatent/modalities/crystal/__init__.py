"""Crystals: a token an atom, with its element and its place in the cell, and a token for the lattice."""

from __future__ import annotations

from typing import Literal

from ...atoms import modality as atoms
from ...progress import progress_of
from ..base import Splits
from . import data as files
from . import metrics, render
from .data import CrystalData


class CrystalConfig(atoms.AtomConfig, atoms.CrystalLosses):
    """Of crystals; MP20's have 1 to 20 atoms in their primitive cells."""

    name: Literal["crystal"] = "crystal"

    @classmethod
    def small(cls) -> CrystalConfig:
        return cls(max_atoms=20, elements="found")


class Crystal(atoms.OneKind):
    """Data: `types` (B, N), `fractional` (B, N, 3) in [0, 1) and `lattice` (B, 6) in Angstrom and degrees."""

    Config = CrystalConfig
    DataConfig = CrystalData
    config: CrystalConfig
    crystals = True
    reading = files
    judging = metrics
    drawing = render
    token_scale = 0.25  # most of a token are the zeros of its class

    def splits(self, data: CrystalData) -> Splits:
        with progress_of(transient=True) as progress:
            train, held_out = files.load(data, progress, self.config.max_atoms)
        label = data.label_column or ("spacegroup" if data.spacegroup else None)
        return self.datasets(train, held_out, label, data.property_column)

    @property
    def preprocessing(self) -> str:
        return "niggli cells"
