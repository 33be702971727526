"""A set that a laptop can learn: conformers of molecules of at most four heavy atoms, without a download.

The molecules are those that the graphs of `generator` give for these sizes, about a hundred. Each has conformers by
ETKDGv3 that are not relaxed, so that bonds, angles and torsions vary as the method samples them; small rigid molecules
hardly do. A conformer is rejected if EDM's distance tables or RDKit's perception of bonds find another molecule in it.
Conformer k of a molecule depends on the seed, the molecule and k only.
"""

from __future__ import annotations

import random

import numpy as np

from ...maths.streams import seed_of
from .._atoms.files import ProgressCallback
from .._atoms.systems import System, Systems
from . import chemistry, generator
from .chemistry import rdkit

NAME = "small-molecules"
"""The value of `data.path` that requests the set."""
VERSION = 1
HEAVY = {1: 1.0, 2: 2.0, 3: 5.0, 4: 15.0}
"""Number of heavy atoms -> relative frequency of draws."""
DRAWS = 6000
"""Draws of graphs. The last new molecule is found before the 4,000th."""
PATIENCE = 4
"""Conformers in a row that may be rejected, of every molecule, before the set is given up."""


def cache_name(seed: int) -> str:
    """Return the name of the set in the cache."""
    return f"{NAME}-{VERSION}-{generator.RULES}-rdkit-{rdkit().version}-{seed}"


def molecules() -> list[str]:
    """Return SMILES of the molecules, in alphabetical order."""
    found: dict[str, bool] = {}
    with rdkit().quiet():
        for number in range(DRAWS):
            smiles = generator.graph(random.Random(seed_of(NAME, number)), HEAVY)
            if smiles is not None and smiles not in found:
                found[smiles] = generator.geometry(smiles) is not None
    return sorted(smiles for smiles, exists in found.items() if exists)


def make(num: int, seed: int = 0, progress: ProgressCallback | None = None) -> Systems:
    """Return `num` conformers, of all molecules in turn, named by SMILES and number."""
    names, number, fruitless = molecules(), 0, 0
    systems: list[System] = []
    with rdkit().quiet():
        while len(systems) < num:
            found = [one for smiles in names if (one := conformer(smiles, number, seed)) is not None]
            fruitless = 0 if found else fruitless + 1
            if fruitless == PATIENCE:
                raise ValueError(f"num: {num:,} conformers, but RDKit made only {len(systems):,}; ask for fewer")
            kept = found[: num - len(systems)]
            systems += kept
            number += 1
            if progress is not None:
                progress("molecules", len(kept), num)
    return Systems.of(systems)


def conformer(smiles: str, number: int, seed: int = 0) -> System | None:
    """Return a conformer, heavy atoms first in the order of the SMILES; None if it is rejected. Columns: as of
    `generator.geometry`, but for the energy."""
    kit = rdkit()
    mol = kit.Chem.AddHs(kit.Chem.MolFromSmiles(smiles))
    settings = kit.Embed.ETKDGv3()
    settings.randomSeed = seed_of(NAME, seed, smiles, number) & 0x7FFFFFFF
    settings.maxIterations = 20
    if kit.Embed.EmbedMolecule(mol, settings) != 0:
        return None
    types = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
    positions = mol.GetConformer().GetPositions()
    positions = (positions - positions.mean(0)).astype(np.float32)
    if not generator.is_sound(smiles, mol, types, positions):
        return None
    return System(
        types, positions, None, f"{smiles}:{number}", {"logp": chemistry.logp(mol), "tpsa": chemistry.tpsa(mol)}
    )
