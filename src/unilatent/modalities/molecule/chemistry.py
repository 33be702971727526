"""Bonds and validity of atoms in space: by distance tables, RDKit, Open Babel and PoseBusters; canonical SMILES.

Batches have types (B, N), atomic numbers with 0 at padding, and positions (B, N, 3) in Angstrom. RDKit, Open Babel,
PoseBusters and pymatgen's molecule matcher are imported at first use, and only here.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXTRA = "pip install 'unilatent[atoms]'"
EVALUATION_EXTRA = "pip install 'unilatent[atoms-eval]'"

H, C, N, O, F, S = 1, 6, 7, 8, 9, 16  # noqa: E741
SINGLE = {
    (H, H): 74, (H, C): 109, (H, N): 101, (H, O): 96, (H, F): 92, (C, C): 154, (C, N): 147, (C, O): 143, (C, F): 135,
    (N, N): 145, (N, O): 140, (N, F): 136, (O, O): 148, (O, F): 142, (F, F): 142,
    (H, S): 134, (C, S): 182, (N, S): 168, (O, S): 151, (S, S): 204,
}  # fmt: skip
"""Lengths of single bonds in picometres by which EDM (Hoogeboom et al. 2022) evaluates QM9, and those of sulphur."""
DOUBLE = {(C, C): 134, (C, N): 129, (C, O): 120, (N, N): 125, (N, O): 121, (O, O): 121, (C, S): 160}
TRIPLE = {(C, C): 120, (C, N): 116, (C, O): 113, (N, N): 110}
MARGINS = (10, 5, 3)
"""Picometres by which a single, double and triple bond may exceed these lengths."""
VALENCES = {H: (1,), C: (4,), N: (3,), O: (2,), F: (1,), S: (2, 4, 6)}
"""Sums of bond orders at which an atom is stable."""


@cache
def rdkit() -> Any:
    """Return RDKit's modules; ValueError names the extra to install."""
    try:
        from rdkit import Chem, RDLogger, rdBase
        from rdkit.Chem import Draw, rdDepictor, rdDetermineBonds, rdDistGeom, rdForceFieldHelpers, rdMolDescriptors
    except ImportError:
        raise ValueError(f"molecules need the package rdkit: {EXTRA}") from None
    return SimpleNamespace(
        Chem=Chem, Draw=Draw, Depictor=rdDepictor, Bonds=rdDetermineBonds, Embed=rdDistGeom, Force=rdForceFieldHelpers,
        Descriptors=rdMolDescriptors,
        quiet=rdBase.BlockLogs, version=rdBase.rdkitVersion, RDLogger=RDLogger,
    )  # fmt: skip


def each(types: Tensor, positions: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield atomic numbers (n,) int64 and positions (n, 3) float64 of each molecule of a batch, without padding.

    ValueError if a position is NaN or infinite.
    """
    batch = zip(types.detach().cpu().numpy(), positions.detach().cpu().double().numpy(), strict=True)
    for numbers, coordinates in batch:
        real = numbers > 0
        if not np.isfinite(coordinates[real]).all():
            raise ValueError("positions: NaN or infinity; the model that made them diverged")
        yield numbers[real].astype(np.int64), coordinates[real]


# ---- B: bonds by distance (EDM) --------------------------------------------------------------------------------------


@cache
def _limits() -> Tensor:
    """(3, 100, 100) picometres below which two elements have at least a single, double, triple bond; 0: never."""
    limits = torch.zeros(3, 100, 100)
    for order, lengths in enumerate((SINGLE, DOUBLE, TRIPLE)):
        for (a, b), length in lengths.items():
            limits[order, a, b] = limits[order, b, a] = length + MARGINS[order]
    return limits


@cache
def _allowed() -> Tensor:
    """(100, 64) bool, whether an element is stable with a sum of bond orders."""
    allowed = torch.zeros(100, 64, dtype=torch.bool)
    for number, sums in VALENCES.items():
        allowed[number, list(sums)] = True
    return allowed


def distance_orders(types: Tensor, positions: Tensor) -> Tensor:
    """Return bond orders (B, N, N), 0 to 3, by EDM's distance tables."""
    types, positions = types.cpu().long(), positions.detach().cpu().float()
    distance = 100 * (positions[:, :, None] - positions[:, None, :]).square().sum(-1).sqrt()  # (B, N, N) pm
    limits = _limits()[:, types[:, :, None], types[:, None, :]]  # (3, B, N, N)
    below = distance < limits  # a pair that cannot be single cannot be double
    orders = below[0].long() + (below[0] & below[1]).long() + (below[0] & below[1] & below[2]).long()
    orders.diagonal(dim1=1, dim2=2).zero_()
    return orders


@dataclass(frozen=True)
class Stability:
    """Stability by EDM's tables.

    orders: (B, N, N) bond orders. stable: (B, N) bool, whether an atom's bond orders sum to an allowed valence; True at
    padding. molecules: (B,) bool, whether all atoms of a molecule are stable.
    """

    orders: Tensor
    stable: Tensor
    molecules: Tensor


def stability(types: Tensor, positions: Tensor) -> Stability:
    """Return EDM's atom and molecule stability."""
    types = types.cpu().long()
    orders = distance_orders(types, positions)
    stable = _allowed()[types, orders.sum(-1).clamp(max=63)] | (types == 0)  # (B, N)
    return Stability(orders, stable, stable.all(1) & (types > 0).any(1))


def largest_fragment(mol: Any) -> Any:
    """Return the fragment with the most atoms, the first one if several have as many."""
    parts = rdkit().Chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    return mol if len(parts) < 2 else max(parts, key=lambda part: part.GetNumAtoms())


def from_graph(atoms: Iterable[int | str], bonds: Iterable[tuple[int, int, int]]) -> Any | None:
    """Return a sanitised RDKit molecule, or None if it violates valence rules.

    atoms: atomic numbers or symbols. bonds: (atom index, atom index, order 1 to 3).
    """
    Chem = rdkit().Chem
    bond_types = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for atom in atoms:
        mol.AddAtom(Chem.Atom(atom))
    for a, b, order in bonds:
        mol.AddBond(a, b, bond_types[order])
    return mol if _sanitised(mol) else None


def _sanitised(mol: Any) -> bool:
    """Sanitise a molecule in place; return whether that succeeded."""
    Chem = rdkit().Chem
    return Chem.SanitizeMol(mol, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE


def graph_smiles(types: np.ndarray, orders: np.ndarray) -> str | None:
    """Return canonical SMILES of the largest fragment of n atoms with bond orders (n, n).

    None if there are no atoms, an element has no table, or a valence rule is violated.
    """
    if not len(types) or not VALENCES.keys() >= set(types.tolist()):
        return None
    bonds = ((a, b, int(orders[a, b])) for a, b in np.argwhere(np.triu(orders) > 0).tolist())
    mol = from_graph(types.tolist(), bonds)
    return None if mol is None else rdkit().Chem.MolToSmiles(largest_fragment(mol))


# ---- C: bonds by RDKit -----------------------------------------------------------------------------------------------


def atoms_only(types: np.ndarray, positions: np.ndarray) -> Any:
    """Return an RDKit molecule of atoms (n,) at positions (n, 3), without bonds."""
    Chem = rdkit().Chem
    mol = Chem.RWMol()
    for number in types.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    conformer = Chem.Conformer(len(types))
    conformer.SetPositions(np.ascontiguousarray(positions, np.float64))
    mol.AddConformer(conformer)
    return mol


def perceive(types: np.ndarray, positions: np.ndarray) -> Any | None:
    """Return the neutral molecule whose bonds RDKit determines from positions (`DetermineBonds`, charge 0), sanitised.

    It may have several fragments. None if RDKit finds no such molecule.
    """
    if not len(types):
        return None
    kit = rdkit()
    mol = atoms_only(types, positions)
    try:
        kit.Bonds.DetermineConnectivity(mol)
        kit.Bonds.DetermineBondOrders(mol, charge=0, embedChiral=False)
        return mol if _sanitised(mol) else None
    except (ValueError, RuntimeError):
        return None


def fragments(mol: Any) -> int:
    """Return the number of fragments."""
    return len(rdkit().Chem.GetMolFrags(mol))


def rings(mol: Any) -> int:
    """Return the number of rings in the smallest set of smallest rings."""
    return len(rdkit().Chem.GetSSSR(mol))


def plain_smiles(mol: Any) -> str:
    """Return canonical SMILES without stereochemistry and without explicit hydrogens."""
    Chem = rdkit().Chem
    return Chem.MolToSmiles(Chem.RemoveHs(mol, sanitize=False), isomericSmiles=False)


def key(smiles: str | None) -> int:
    """Return a 63-bit hash of SMILES, never 0; 0 for None."""
    if smiles is None:
        return 0
    return int.from_bytes(hashlib.blake2b(smiles.encode(), digest_size=8).digest(), "little") >> 1 | 1


# ---- A: bonds by Open Babel ------------------------------------------------------------------------------------------


@cache
def openbabel() -> Any:
    """Return Open Babel with its log silenced; ValueError names the extra to install."""
    try:
        from openbabel import openbabel as babel
    except ImportError:
        raise ValueError(f"Open Babel's metrics need the package openbabel: {EVALUATION_EXTRA}") from None
    babel.obErrorLog.SetOutputLevel(0)
    return babel


def babel_perceive(types: np.ndarray, positions: np.ndarray) -> Any | None:
    """Return the molecule by the protocol of ADiT and UNITE, or None if RDKit rejects it.

    Open Babel perceives bonds and their orders; RDKit reads its PDB text and sanitises it. The molecule may have
    several fragments. The result equals that of going through files.
    """
    babel, Chem = openbabel(), rdkit().Chem
    mol = babel.OBMol()
    mol.BeginModify()
    for number, (x, y, z) in zip(types.tolist(), positions.tolist(), strict=True):
        atom = mol.NewAtom()
        atom.SetAtomicNum(number)
        atom.SetVector(x, y, z)
    mol.EndModify()
    mol.ConnectTheDots()
    mol.PerceiveBondOrders()
    conversion = babel.OBConversion()
    conversion.SetOutFormat("pdb")
    return Chem.MolFromPDBBlock(conversion.WriteString(mol), removeHs=False)


def fragment_smiles(mol: Any) -> str | None:
    """Return canonical SMILES, with stereochemistry, of the fragment with the most atoms; None if RDKit fails."""
    Chem = rdkit().Chem
    try:
        return Chem.MolToSmiles(largest_fragment(mol), isomericSmiles=True)
    except (ValueError, RuntimeError):
        return None


@cache
def matcher() -> Any:
    """Return pymatgen's MoleculeMatcher, which compares InChIs by Open Babel; ValueError names the extra to install."""
    openbabel()
    try:
        from pymatgen.analysis.molecule_matcher import MoleculeMatcher
        from pymatgen.core import Molecule
    except ImportError:
        raise ValueError(f"the match rate needs the package pymatgen: {EXTRA}") from None
    return SimpleNamespace(matcher=MoleculeMatcher(), Molecule=Molecule)


def match(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the RMSD in Angstrom between two molecules (types, positions) of equal InChI; infinity if these differ."""
    kit = matcher()
    try:
        pair = [kit.Molecule(t.tolist(), p) for t, p in (a, b)]
        return float(kit.matcher.get_rmsd(*pair))
    except Exception:  # pymatgen and Open Babel raise various errors on invalid input: no match
        return float("inf")


# ---- D: PoseBusters --------------------------------------------------------------------------------------------------


@cache
def posebusters(energy: bool) -> Any:
    """Return PoseBusters with the checks of its "mol" configuration; ValueError names the extra to install.

    energy: include the check that compares the molecule's energy with that of other conformations. Version 0.6.5 lists
    this check twice; it runs once here.
    """
    try:
        import posebusters as package
        import yaml
    except ImportError:
        raise ValueError(f"PoseBusters' checks need the package posebusters: {EVALUATION_EXTRA}") from None
    logging.getLogger("posebusters").setLevel(logging.CRITICAL)  # failures are counted, not logged
    config = yaml.safe_load((Path(package.__file__).parent / "config" / "mol.yml").read_text(encoding="utf-8"))
    energy_checks = [module for module in config["modules"] if module["function"] == "energy_ratio"]
    other_checks = [module for module in config["modules"] if module["function"] != "energy_ratio"]
    return package.PoseBusters({**config, "modules": other_checks + (energy_checks[-1:] if energy else [])})


def bust(molecules: list[Any], energy: bool) -> list[bool]:
    """Return for each molecule whether it passes every check; False for None."""
    perceived = [mol for mol in molecules if mol is not None]
    if not perceived:
        return [False] * len(molecules)
    with rdkit().quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passed = iter(posebusters(energy).bust(perceived, None, None).fillna(False).astype(bool).all(axis=1).tolist())
    return [mol is not None and next(passed) for mol in molecules]
