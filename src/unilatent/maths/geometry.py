"""Rotations, superposition and periodic cells for batches of atoms. Results have the input's dtype, float32 or float64.

A cell is a matrix (..., 3, 3) of row vectors, so that Cartesian = fractional @ cell, in pymatgen's convention: c along
z, a in the xz plane. Its parameters (..., 6) are a, b, c in Angstrom and alpha, beta, gamma in degrees.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotation_of(quaternions: Tensor) -> Tensor:
    """Return rotation matrices (..., 3, 3) of quaternions (..., 4) of any non-zero norm.

    Quaternions of four N(0, 1) numbers give uniformly distributed rotations.
    """
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    )
    return torch.stack(rows, dim=-2)


def centre(positions: Tensor, mask: Tensor) -> Tensor:
    """Return the means (B, 1, 3) of the positions (B, N, 3) where mask (B, N) is True; 0 if it is True nowhere."""
    real = mask[..., None].to(positions.dtype)
    return (positions * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


def superpose(moving: Tensor, fixed: Tensor, mask: Tensor) -> Tensor:
    """Rotate and translate `moving` (B, N, 3) onto `fixed` with the least squared distance (Kabsch 1976).

    Atom i of one corresponds to atom i of the other. mask: (B, N), the atoms that are fitted; the others move with
    them. Rotations are proper: no reflections.
    """
    here, there = centre(moving, mask), centre(fixed, mask)
    a, b = (moving - here) * mask[..., None], (fixed - there) * mask[..., None]
    u, _, vh = torch.linalg.svd(a.mT @ b)  # (B, 3, 3)
    handed = torch.det(u) * torch.det(vh)
    flip = torch.ones_like(u[..., 0])
    flip[..., 2] = handed.sign()
    return (moving - here) @ (u * flip[:, None, :]) @ vh + there


def in_principal_axes(positions: Tensor, mask: Tensor) -> Tensor:
    """Rotate positions (B, N, 3), about their means, so that x, y, z are the axes of the largest, middle and smallest
    spread of the atoms in mask (B, N). Atoms outside mask move with them.

    The sums of the cubes of x and of y are made positive; the rotation is proper, so that mirror images stay apart.
    Where spreads or cubes are equal, as in symmetric molecules, rounding decides.
    """
    wide = (positions - centre(positions, mask)).double()
    real = wide * mask[..., None]
    _, axes = torch.linalg.eigh(real.mT @ real)  # ascending
    axes = axes.flip(-1)  # (B, 3, 3), a column an axis
    sign = torch.where((real @ axes).pow(3).sum(1) < 0, -1.0, 1.0).double()  # (B, 3)
    proper = torch.linalg.det(axes) * sign[:, 0] * sign[:, 1]
    sign = torch.cat([sign[:, :2], proper.sign()[:, None]], -1)
    return (wide @ (axes * sign[:, None])).to(positions.dtype)


COLLINEAR = 0.1
"""Distance from an axis up to which an atom does not determine a plane with it, in the units of positions."""


def in_first_axes(positions: Tensor, mask: Tensor) -> Tensor:
    """Move and turn positions (B, N, 3) so that their first atoms determine the coordinates.

    Atom 0 is at 0, atom 1 on the x axis, and the first atom more than COLLINEAR away from that axis in the half of the
    xy plane where y > 0. The rotation is proper, so that mirror images stay apart. mask (B, N): the atoms that count,
    atom 0 and others; atoms outside it move with them. Of one atom, or atoms on one line, the axes that they do not
    determine are arbitrary.
    """
    wide = (positions - positions[:, :1]).double()
    real = mask[..., None]
    second = torch.where(real, wide, 0.0)[:, 1:2] if wide.shape[1] > 1 else torch.zeros_like(wide)
    x = F.normalize(torch.where(second == 0, wide.new_tensor([1e-9, 0.0, 0.0]), second), dim=-1)  # (B, 1, 3)
    across = torch.where(real, wide - (wide * x).sum(-1, keepdim=True) * x, 0.0)  # (B, N, 3)
    first = (across.norm(dim=-1) > COLLINEAR).int().argmax(1)  # (B,)
    y = across.gather(1, first[:, None, None].expand(-1, 1, 3))
    spare = torch.zeros_like(x).scatter(-1, x.abs().argmin(-1, keepdim=True), 1.0)
    y = torch.where(y.norm(dim=-1, keepdim=True) > COLLINEAR, y, spare)
    y = F.normalize(y - (y * x).sum(-1, keepdim=True) * x, dim=-1)
    axes = torch.cat([x, y, torch.linalg.cross(x, y)], 1)  # (B, 3, 3), a row an axis
    return (wide @ axes.mT).to(positions.dtype)


def rmsd(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return the root mean squared distance (B,) of the atoms (B, N, 3) in mask (B, N), without superposition."""
    real = mask.to(a.dtype)
    return (((a - b).square().sum(-1) * real).sum(1) / real.sum(1).clamp(min=1)).sqrt()


def cell_of(parameters: Tensor) -> Tensor:
    """Return the cells (..., 3, 3) of parameters (..., 6)."""
    a, b, c = parameters[..., :3].unbind(-1)
    cosines, sines = parameters[..., 3:].deg2rad().cos(), parameters[..., 3:].deg2rad().sin()
    (cos_a, cos_b, cos_g), (sin_a, sin_b, _) = cosines.unbind(-1), sines.unbind(-1)
    cos_star = ((cos_a * cos_b - cos_g) / (sin_a * sin_b)).clamp(-1, 1)  # of the reciprocal gamma
    sin_star, zero = (1 - cos_star.square()).sqrt(), torch.zeros_like(a)
    rows = (
        torch.stack([a * sin_b, zero, a * cos_b], -1),
        torch.stack([-b * sin_a * cos_star, b * sin_a * sin_star, b * cos_a], -1),
        torch.stack([zero, zero, c], -1),
    )
    return torch.stack(rows, dim=-2)


def parameters_of(cell: Tensor) -> Tensor:
    """Return the parameters (..., 6) of cells (..., 3, 3) in any orientation."""
    lengths = cell.norm(dim=-1)
    a, b, c = (cell / lengths[..., None]).unbind(-2)
    cosines = torch.stack([(b * c).sum(-1), (a * c).sum(-1), (a * b).sum(-1)], -1).clamp(-1, 1)
    return torch.cat([lengths, cosines.acos().rad2deg()], -1)


def to_cartesian(fractional: Tensor, cell: Tensor) -> Tensor:
    """Convert fractional coordinates (B, N, 3) in cells (B, 3, 3) to Angstrom."""
    return fractional @ cell


def to_fractional(cartesian: Tensor, cell: Tensor) -> Tensor:
    """Invert `to_cartesian`; the result is not wrapped into the cell."""
    return torch.linalg.solve(cell.mT, cartesian.mT).mT


def wrap(fractional: Tensor) -> Tensor:
    """Return the periodic images of fractional coordinates in [0, 1)."""
    inside = fractional - fractional.floor()
    return torch.where(inside < 1, inside, 0.0)  # a tiny negative number rounds up to 1


def nearest_image(difference: Tensor) -> Tensor:
    """Return fractional differences to the nearest periodic image, in [-1/2, 1/2].

    In skewed cells another image may be nearer in Angstrom; the approximation is good enough for a loss.
    """
    return difference - difference.round()
