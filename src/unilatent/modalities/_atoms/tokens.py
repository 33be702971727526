"""Systems of atoms to tokens and back: one token per atom, and one for the lattice of a periodic system.

Channels of a token, in order; a channel that does not apply to a token is 0:

    classes       one-hot: index 0 for the lattice, then the elements of the vocabulary; class scores in a prediction
    positions     3, Cartesian in Angstrom about the mean, or as `modality.frame` says; for a periodic system derived
                  from the other channels, as an input for the encoder only
    fractional    3, in units of the lattice vectors                                     (formats with periodic systems)
    lattice       6, lengths / N^(1/3) in Angstrom and angles in radians, for N atoms    (formats with periodic systems)

The lattice token is the first one. It gives the lattice a latent of its own. Without it the lattice would have to be
inferred from the tokens of the atoms, which in a cell with few atoms does not determine how large the cell is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.geometry import cell_of, centre, to_cartesian
from ...nets.layers import exact_products
from ...types import Layout, Tokens, move
from .systems import HEAVIEST

SURE = 100.0
"""Score of a class that is certain."""


@dataclass(frozen=True)
class TokenChannels:
    """The channels of tokens (B, N, C), split by meaning. Channels that the format lacks have width 0."""

    classes: Tensor
    positions: Tensor
    fractional: Tensor
    lattice: Tensor


@dataclass(frozen=True)
class TokenFormat:
    """The layout of a token's channels.

    elements: atomic numbers of classes 1, 2, ... has_periodic: whether any system may be periodic, which adds the
    fractional and lattice channels and the lattice token.
    """

    elements: tuple[int, ...]
    has_periodic: bool

    @property
    def classes(self) -> int:
        """The number of classes, including class 0 (the lattice)."""
        return 1 + len(self.elements)

    @property
    def widths(self) -> list[int]:
        """The number of channels of each group, in order."""
        return [self.classes, 3, 3, 6] if self.has_periodic else [self.classes, 3]

    @property
    def lattice_tokens(self) -> int:
        """The number of tokens before those of the atoms: 0 or 1."""
        return 1 if self.has_periodic else 0

    def split(self, values: Tensor) -> TokenChannels:
        """Split values (B, N, C) into the groups of channels."""
        parts = values.split(self.widths, dim=-1)
        empty = values[..., :0]
        return TokenChannels(*parts, *[empty] * (4 - len(parts)))

    def class_of(self, types: Tensor) -> Tensor:
        """Map atomic numbers to classes. 0 and elements outside the vocabulary map to class 0."""
        table = torch.zeros(HEAVIEST + 1, dtype=torch.long, device=types.device)
        numbers = move(torch.tensor(self.elements), types.device)
        return table.scatter(0, numbers, torch.arange(1, self.classes, device=types.device))[types]

    def type_of(self, classes: Tensor) -> Tensor:
        """Map classes to atomic numbers. Class 0 is no atom: it maps to the first element, usually hydrogen."""
        numbers = move(torch.tensor([self.elements[0], *self.elements]), classes.device)
        return numbers[classes]

    def layout(self, atoms: Tensor, periodic: Tensor | None) -> Layout:
        """Return the layout of systems with real atoms (B, N) bool, of which `periodic` (B,) bool have a lattice token.

        A token's position is its index in the sequence.
        """
        mask = atoms if not self.has_periodic or periodic is None else torch.cat([periodic[:, None], atoms], 1)
        indices = torch.arange(mask.shape[1], dtype=torch.float32, device=mask.device)
        return Layout(indices[None, :, None], mask)

    def pack(
        self, types: Tensor, positions: Tensor | None = None, fractional: Tensor | None = None,
        lattice: Tensor | None = None, periodic: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """Return the tokens (B, N, C) of a batch, or (B, 1 + N, C) with lattice tokens.

        types: (B, N) atomic numbers, 0 at padding. positions: (B, N, 3) in Angstrom, needed for free systems.
        fractional (B, N, 3), lattice (B, 6) and periodic (B,) bool are needed if the format has periodic systems;
        `periodic` is True for each sample that is periodic.
        """
        atoms = types > 0
        class_indices = torch.arange(self.classes, device=types.device)
        one_hot = (self.class_of(types)[..., None] == class_indices).float()  # (B, N, classes)
        if not self.has_periodic:
            assert positions is not None
            values = torch.cat([one_hot, positions], -1)
        else:
            assert fractional is not None and lattice is not None and periodic is not None
            cartesian = _cartesian(fractional, lattice, atoms, periodic)
            if positions is not None:
                cartesian = torch.where(periodic[:, None, None], cartesian, positions)
            values = torch.cat([one_hot, cartesian, fractional, fractional.new_zeros(*types.shape, 6)], -1)
            first = values.new_zeros(len(values), 1, values.shape[-1])
            first[:, 0, 0] = 1
            first[:, 0, -6:] = scaled_lattice(lattice, atoms)
            values = torch.cat([first, values], 1)
        layout = self.layout(atoms, periodic)
        return Tokens(layout.blank(values), layout)

    def unpack(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return `types`, `positions` and, if the format has periodic systems, `fractional`, `lattice`, `periodic`.

        Values are 0 at padding and where they do not apply to a sample.
        """
        assert tokens.layout.mask is not None
        values, mask = tokens.layout.blank(tokens.values.float()), tokens.layout.mask
        channels, atoms = self.split(values[:, self.lattice_tokens :]), mask[:, self.lattice_tokens :]
        types = torch.where(atoms, self.type_of(channels.classes.argmax(-1)), 0)
        if not self.has_periodic:
            return {"types": types, "positions": channels.positions}
        periodic = mask[:, 0]
        is_periodic = periodic[:, None, None]
        lattice = torch.where(periodic[:, None], unscaled_lattice(values[:, 0, -6:], atoms), 0.0)
        return {
            "types": types, "positions": torch.where(~is_periodic, channels.positions, 0.0),
            "fractional": torch.where(is_periodic, channels.fractional, 0.0), "lattice": lattice, "periodic": periodic,
        }  # fmt: skip


def scaled_lattice(lattice: Tensor, atoms: Tensor) -> Tensor:
    """Convert lattices (B, 6) in Angstrom and degrees to the units of tokens: Angstrom / N^(1/3) and radians.

    atoms: (B, N) bool, the real atoms.
    """
    wide = lattice.double()
    size = atoms.sum(1, keepdim=True).clamp(min=1).double() ** (1 / 3)
    return torch.cat([wide[:, :3] / size, wide[:, 3:].deg2rad()], -1).float()


def unscaled_lattice(values: Tensor, atoms: Tensor) -> Tensor:
    """Invert `scaled_lattice`."""
    wide = values.double()
    size = atoms.sum(1, keepdim=True).clamp(min=1).double() ** (1 / 3)
    return torch.cat([wide[:, :3] * size, wide[:, 3:].rad2deg()], -1).float()


def _cartesian(fractional: Tensor, lattice: Tensor, atoms: Tensor, periodic: Tensor) -> Tensor:
    """Cartesian positions (B, N, 3) of periodic systems about their mean; 0 for free systems, whose fractions are 0."""
    cube = lattice.new_tensor([1.0, 1.0, 1.0, 90.0, 90.0, 90.0])
    cell = cell_of(torch.where(periodic[:, None], lattice, cube))
    with exact_products(fractional):
        positions = to_cartesian(fractional, cell)
    return positions - centre(positions, atoms)
