"""A few systems made by hand, and modalities of atoms without any chemistry to hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilatent.atoms.modality import AtomConfig, AtomModality, CrystalLosses, MoleculeLosses
from unilatent.maths.streams import generator

MOST = 9


class FreeConfig(AtomConfig, MoleculeLosses):
    pass


class BoundConfig(AtomConfig, CrystalLosses):
    pass


class BothConfig(AtomConfig, MoleculeLosses, CrystalLosses):
    pass


class _Bare(AtomModality):
    """What the shared part does not know is not asked for here."""

    def splits(self, data: Any) -> Any: ...
    def spaces(self) -> Any: ...
    def metrics(self) -> Any: ...

    preprocessing = ""  # type: ignore[assignment]

    def errors(self, made: Any, data: Any) -> Any: ...
    def draw_grid(self, rows: Any, path: Any, columns: Any = None, captions: Any = None) -> None: ...
    def write(self, data: Any, folder: Any, start: int = 0) -> Any: ...
    def read(self, path: Any, batch_size: int) -> Any: ...


class Free(_Bare):
    molecules = True


class Bound(_Bare):
    crystals = True


class Both(_Bare):
    molecules = True
    crystals = True


def modality_of(kind: str, **fields: Any) -> AtomModality:
    cls, config = {"free": (Free, FreeConfig), "bound": (Bound, BoundConfig), "both": (Both, BothConfig)}[kind]
    return cls(config(max_atoms=MOST, **fields))


def data_of(kind: str, b: int = 5, name: str = "data") -> dict[str, Tensor]:
    """b systems of 2, 3, ... atoms."""
    g = generator(name)
    sizes = 2 + torch.arange(b) % (MOST - 1)
    atoms = torch.arange(MOST) < sizes[:, None]
    types = torch.where(atoms, torch.randint(1, 10, (b, MOST), generator=g), 0)
    positions = torch.randn(b, MOST, 3, generator=g) * 1.5 * atoms[..., None]
    positions = (positions - positions.sum(1, keepdim=True) / sizes[:, None, None]) * atoms[..., None]
    fractional = torch.rand(b, MOST, 3, generator=g) * atoms[..., None]
    lattice = torch.cat([3 + 4 * torch.rand(b, 3, generator=g), 80 + 30 * torch.rand(b, 3, generator=g)], 1)
    if kind == "free":
        return {"types": types, "positions": positions}
    if kind == "bound":
        return {"types": types, "fractional": fractional, "lattice": lattice}
    periodic = torch.arange(b) % 2 == 1
    return {
        "types": types, "positions": positions * ~periodic[:, None, None],
        "fractional": fractional * periodic[:, None, None], "lattice": lattice * periodic[:, None],
        "periodic": periodic,
    }  # fmt: skip
