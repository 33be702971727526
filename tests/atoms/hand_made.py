"""A few synthetic systems, and minimal modalities of free systems, periodic ones, and both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilatent.maths.streams import generator
from unilatent.modalities._atoms.modality import AtomConfig, AtomModality, FreeLossConfig, PeriodicLossConfig

MOST = 9


class FreeConfig(AtomConfig, FreeLossConfig):
    pass


class BoundConfig(AtomConfig, PeriodicLossConfig):
    pass


class BothConfig(AtomConfig, FreeLossConfig, PeriodicLossConfig):
    pass


class _Bare(AtomModality):
    """Stubs of the abstract methods that the shared code does not implement."""

    def scenes(self, data: Any, moving: bool = False) -> Any: ...
    def splits(self, data: Any) -> Any: ...
    def spaces(self) -> Any: ...
    def metrics(self) -> Any: ...

    preprocessing = ""  # type: ignore[assignment]

    def errors(self, made: Any, data: Any) -> Any: ...
    def draw_grid(self, rows: Any, path: Any, columns: Any = None, captions: Any = None) -> None: ...
    def write(self, data: Any, folder: Any, start: int = 0) -> Any: ...
    def read(self, path: Any, batch_size: int) -> Any: ...


class Free(_Bare):
    has_free = True


class Bound(_Bare):
    has_periodic = True


class Both(_Bare):
    has_free = True
    has_periodic = True


def modality_of(kind: str, **fields: Any) -> AtomModality:
    cls, config = {"free": (Free, FreeConfig), "bound": (Bound, BoundConfig), "both": (Both, BothConfig)}[kind]
    return cls(config(max_atoms=MOST, **fields))


def data_of(kind: str, b: int = 5, name: str = "data") -> dict[str, Tensor]:
    """A batch of b systems with 2, 3, ... atoms."""
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
