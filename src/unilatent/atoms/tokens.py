"""Systems of atoms to tokens and back: one token an atom, and one for the lattice of those that are periodic.

Channels of a token, in order; what a token does not have is 0:

    classes       one-hot: 0 of the lattice, then the elements of the vocabulary. Of a prediction: scores
    positions     3, Cartesian in Angstrom, about the mean; of a crystal what its other channels imply, to look at
    fractional    3, in units of the lattice vectors               (where there are crystals)
    lattice       6, lengths / N^(1/3) in Angstrom, angles in radians; N atoms   (where there are crystals)

The lattice comes first. It is a token so that it is coded by a latent of its own, where others pool it from the atoms:
a cell with few atoms could not tell its encoder how large it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths.geometry import cell_of, centre, to_cartesian
from ..types import Layout, Tokens
from .systems import HEAVIEST

SURE = 100.0
"""A score that leaves no doubt."""


@dataclass(frozen=True)
class Spans:
    """Of the channels of tokens."""

    classes: Tensor
    positions: Tensor
    fractional: Tensor
    lattice: Tensor


@dataclass(frozen=True)
class Format:
    """elements: of classes 1, 2, ... crystals: whether any system may be periodic."""

    elements: tuple[int, ...]
    crystals: bool

    @property
    def classes(self) -> int:
        return 1 + len(self.elements)

    @property
    def widths(self) -> list[int]:
        return [self.classes, 3, 3, 6] if self.crystals else [self.classes, 3]

    @property
    def extra(self) -> int:
        """Tokens that are no atoms."""
        return 1 if self.crystals else 0

    def split(self, values: Tensor) -> Spans:
        """Channels (B, N, C) by meaning; those of crystals are empty where there are none."""
        parts = values.split(self.widths, dim=-1)
        nothing = values[..., :0]
        return Spans(*parts, *[nothing] * (4 - len(parts)))

    def class_of(self, types: Tensor) -> Tensor:
        """Atomic numbers to classes; 0, and what is not in the vocabulary, to 0."""
        table = torch.zeros(HEAVIEST + 1, dtype=torch.long, device=types.device)
        numbers = torch.tensor(self.elements, device=types.device)
        return table.scatter(0, numbers, torch.arange(1, self.classes, device=types.device))[types]

    def type_of(self, classes: Tensor) -> Tensor:
        """Classes to atomic numbers. No atom is of class 0: it becomes the first element, hydrogen as a rule."""
        numbers = torch.tensor([self.elements[0], *self.elements], device=classes.device)
        return numbers[classes]

    def layout(self, atoms: Tensor, periodic: Tensor | None) -> Layout:
        """atoms (B, N) bool; periodic (B,) bool. Positions are the tokens' places in their row."""
        mask = atoms if not self.crystals or periodic is None else torch.cat([periodic[:, None], atoms], 1)
        places = torch.arange(mask.shape[1], dtype=torch.float32, device=mask.device)
        return Layout(places[None, :, None], mask)

    def pack(
        self, types: Tensor, positions: Tensor | None = None, fractional: Tensor | None = None,
        lattice: Tensor | None = None, periodic: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """types (B, N); positions (B, N, 3) of molecules; fractional (B, N, 3) and lattice (B, 6) of crystals;
        periodic (B,) bool which of them each is, all True of crystals alone and None of molecules alone."""
        atoms = types > 0
        every = torch.arange(self.classes, device=types.device)
        one_hot = (self.class_of(types)[..., None] == every).float()  # (B, N, classes)
        if not self.crystals:
            assert positions is not None
            values = torch.cat([one_hot, positions], -1)
        else:
            assert fractional is not None and lattice is not None and periodic is not None
            inside = _inside(fractional, lattice, atoms, periodic)
            known = inside if positions is None else torch.where(periodic[:, None, None], inside, positions)
            values = torch.cat([one_hot, known, fractional, fractional.new_zeros(*types.shape, 6)], -1)
            first = values.new_zeros(len(values), 1, values.shape[-1])
            first[:, 0, 0] = 1
            first[:, 0, -6:] = scaled(lattice, atoms)
            values = torch.cat([first, values], 1)
        layout = self.layout(atoms, periodic)
        return Tokens(layout.blank(values), layout)

    def unpack(self, tokens: Tokens) -> dict[str, Tensor]:
        """`types`, `positions`, and where there are crystals `fractional`, `lattice`, `periodic`; zeros at padding, and
        of what a sample is not."""
        assert tokens.layout.mask is not None
        values, mask = tokens.layout.blank(tokens.values.float()), tokens.layout.mask
        spans, atoms = self.split(values[:, self.extra :]), mask[:, self.extra :]
        types = torch.where(atoms, self.type_of(spans.classes.argmax(-1)), 0)
        if not self.crystals:
            return {"types": types, "positions": spans.positions}
        periodic = mask[:, 0]
        free, bound = ~periodic[:, None, None], periodic[:, None, None]
        lattice = torch.where(periodic[:, None], natural(values[:, 0, -6:], atoms), 0.0)
        return {
            "types": types, "positions": torch.where(free, spans.positions, 0.0),
            "fractional": torch.where(bound, spans.fractional, 0.0), "lattice": lattice, "periodic": periodic,
        }  # fmt: skip


def scaled(lattice: Tensor, atoms: Tensor) -> Tensor:
    """Lattices (B, 6) in Angstrom and degrees as tokens hold them."""
    wide = lattice.double()
    size = atoms.sum(1, keepdim=True).clamp(min=1).double() ** (1 / 3)
    return torch.cat([wide[:, :3] / size, wide[:, 3:].deg2rad()], -1).float()


def natural(values: Tensor, atoms: Tensor) -> Tensor:
    """The inverse of `scaled`."""
    wide = values.double()
    size = atoms.sum(1, keepdim=True).clamp(min=1).double() ** (1 / 3)
    return torch.cat([wide[:, :3] * size, wide[:, 3:].rad2deg()], -1).float()


def _inside(fractional: Tensor, lattice: Tensor, atoms: Tensor, periodic: Tensor) -> Tensor:
    """Cartesian places (B, N, 3) of crystals about their mean; zeros of the others."""
    cube = lattice.new_tensor([1.0, 1.0, 1.0, 90.0, 90.0, 90.0])
    cell = cell_of(torch.where(periodic[:, None], lattice, cube))
    places = to_cartesian(fractional, cell)
    return places - centre(places, atoms)
