"""Molecules that need no package to make: saturated chains and branches of C, N, O and F in ideal geometry.

Random trees of at most nine heavy atoms, no two of N, O and F bonded, with tetrahedral angles, staggered bonds of
EDM's lengths, and hydrogens. Molecules whose atoms come too near are left out, so all are stable by EDM's tables. They
are no substitute for QM9, which has rings and double bonds: they are for checks on machines without RDKit.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.molecule.chemistry import SINGLE, distance_orders, stability

MOST_HEAVY, MOST_ATOMS = 9, 29
VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
SHARES = {6: 0.74, 7: 0.11, 8: 0.13, 9: 0.02}
"""How often an element is drawn."""
NEAREST = 1.85
"""Smallest distance in Angstrom between atoms with three bonds or more between them."""
CORNERS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)
AT_ONCE = 2048
LENGTHS = np.zeros((10, 10))
"""Of single bonds in Angstrom, by atomic numbers."""
for (one, other), picometres in SINGLE.items():
    if max(one, other) < 10:
        LENGTHS[one, other] = LENGTHS[other, one] = picometres / 100


def make(num: int, seed: int = 0) -> Systems:
    """Return `num` molecules, a function of the seed. Several may be of one formula, with other bonds or turns."""
    found: list[System] = []
    draw = random.Random(seed)
    while len(found) < num:
        trees = [tree(draw) for _ in range(AT_ONCE)]
        types, parents, slots = (np.array(columns) for columns in zip(*trees, strict=True))
        places = geometry(types, parents, slots)
        kept = ~collide(types, places, parents)
        kept &= stability(torch.from_numpy(types), torch.from_numpy(places)).molecules.numpy()
        for row in np.flatnonzero(kept)[: num - len(found)]:
            count = int((types[row] > 0).sum())
            positions = (places[row, :count] - places[row, :count].mean(0)).astype(np.float32)
            found.append(System(types[row, :count].astype(np.uint8), positions, name=f"saturated {len(found)}"))
    return Systems.of(found)


def tree(draw: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Return a molecule as lists of MOST_ATOMS: the elements, heavy atoms first, 0 at padding; the atom that each is
    bonded to; and in which of that atom's directions."""
    while True:
        types, parents = [6], [0]
        bonds = [0]
        further = draw.choices(range(2, MOST_HEAVY), [2**i for i in range(MOST_HEAVY - 2)])[0]  # most are large
        for element in draw.choices(list(SHARES), list(SHARES.values()), k=further):
            free = [i for i, z in enumerate(types) if bonds[i] < VALENCES[z] and 6 in (z, element)]
            if free:
                parent = draw.choice(free)
                bonds[parent] += 1
                types.append(element)
                parents.append(parent)
                bonds.append(1)
        for i, missing in enumerate([VALENCES[z] - count for z, count in zip(types, bonds, strict=True)]):
            types += [1] * missing
            parents += [i] * missing
        if len(types) <= MOST_ATOMS:
            break
    directions = [draw.sample(range(3 if i else 4), 3 if i else 4) for i in range(len(bonds))]
    slots = [0] + [directions[parent].pop() for parent in parents[1:]]
    padding = [0] * (MOST_ATOMS - len(types))
    return types + padding, parents + padding, slots + padding


def geometry(types: np.ndarray, parents: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return positions (B, N, 3) in Angstrom of trees (B, N)."""
    count, most = types.shape
    rows, places, directions = np.arange(count), np.zeros((count, most, 3)), np.zeros((count, most, 4, 3))
    directions[:, 0] = CORNERS
    for i in range(1, most):
        parent = parents[:, i]
        towards = directions[rows, parent, slots[:, i]]
        places[:, i] = places[rows, parent] + towards * LENGTHS[types[:, i], types[rows, parent]][:, None]
        before = np.where(parent[:, None] > 0, places[rows, parents[rows, parent]] - places[rows, parent], 1.0)
        directions[:, i, :3] = staggered(-towards, before)
    return places * (types > 0)[..., None]


def staggered(back: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return directions (B, 3, 3) at tetrahedral angles to `back` (B, 3), staggered about it to `other` (B, 3)."""
    side = other - (other * back).sum(-1, keepdims=True) * back
    flat = np.linalg.norm(side, axis=-1, keepdims=True) < 1e-6
    side = np.where(flat, np.cross(back, np.where(abs(back[:, :1]) < 0.9, [1.0, 0, 0], [0, 1.0, 0])), side)
    side = side / np.linalg.norm(side, axis=-1, keepdims=True).clip(1e-12)
    turns = math.pi + np.arange(3)[:, None] * 2 * math.pi / 3
    around = np.cos(turns) * side[:, None] + np.sin(turns) * np.cross(back, side)[:, None]
    return -back[:, None] / 3 + math.sqrt(8) / 3 * around


def collide(types: np.ndarray, places: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """(B,) whether two atoms that are neither bonded nor bonded to the same atom are nearer than NEAREST."""
    apart = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    bonded = np.zeros(apart.shape, np.float32)
    rows, child = np.nonzero(types[:, 1:])
    bonded[rows, child + 1, parents[rows, child + 1]] = 1
    bonded += bonded.swapaxes(1, 2)
    real = types > 0
    apart[(bonded + bonded @ bonded > 0) | ~(real[:, :, None] & real[:, None])] = np.inf
    apart[:, np.arange(types.shape[1]), np.arange(types.shape[1])] = np.inf
    return apart.min((1, 2)) < NEAREST


def in_one_piece(types: Tensor, positions: Tensor) -> Tensor:
    """Return (B,) bool, whether bonds by EDM's tables connect all atoms of a molecule."""
    real = types.cpu() > 0
    reached = (distance_orders(types, positions) > 0) | torch.eye(types.shape[1], dtype=torch.bool)
    for _ in range(math.ceil(math.log2(max(types.shape[1], 2)))):
        reached = (reached.float() @ reached.float()) > 0
    return (reached[:, 0] | ~real).all(1) & real[:, 0]
