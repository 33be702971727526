"""What chemistry says of atoms in space: bonds by distance tables, by RDKit, by Open Babel; canonical SMILES.

Molecules come as a batch: types (B, N) atomic numbers with 0 for padding, positions (B, N, 3) in Angstrom. RDKit, Open
Babel, PoseBusters and pymatgen are imported when they are first used, and nowhere else in the package.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
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
"""Length of a single bond in picometres, as EDM (Hoogeboom et al. 2022) judges QM9; sulphur is not in QM9."""
DOUBLE = {(C, C): 134, (C, N): 129, (C, O): 120, (N, N): 125, (N, O): 121, (O, O): 121, (C, S): 160}
TRIPLE = {(C, C): 120, (C, N): 116, (C, O): 113, (N, N): 110}
MARGINS = (10, 5, 3)
"""Picometres that a single, double and triple bond may be longer."""
VALENCES = {H: (1,), C: (4,), N: (3,), O: (2,), F: (1,), S: (2, 4, 6)}
"""Sums of bond orders with which an atom is stable."""


@cache
def rdkit() -> Any:
    """RDKit's modules; ValueError says which extra brings them."""
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
    """Atomic numbers (n,) and positions (n, 3) float64 of every molecule of a batch, without its padding.

    ValueError on positions that are no numbers.
    """
    kinds, places = types.detach().cpu().numpy(), positions.detach().cpu().double().numpy()
    for kind, place in zip(kinds, places, strict=True):
        real = kind > 0
        if not np.isfinite(place[real]).all():
            raise ValueError("positions: NaN or infinity; the model that made them diverged")
        yield kind[real].astype(np.int64), place[real]


# ---- B: bonds by distance (EDM) --------------------------------------------------------------------------------------


@cache
def _limits() -> Tensor:
    """(3, 100, 100) picometres below which two atoms have at least a single, double, triple bond; 0: never."""
    limits = torch.zeros(3, 100, 100)
    for order, lengths in enumerate((SINGLE, DOUBLE, TRIPLE)):
        for (a, b), length in lengths.items():
            limits[order, a, b] = limits[order, b, a] = length + MARGINS[order]
    return limits


@cache
def _allowed() -> Tensor:
    """(100, 64) whether an element is stable with that sum of bond orders."""
    allowed = torch.zeros(100, 64, dtype=torch.bool)
    for number, sums in VALENCES.items():
        allowed[number, list(sums)] = True
    return allowed


def distance_orders(types: Tensor, positions: Tensor) -> Tensor:
    """Bond orders 0 to 3 (B, N, N) by EDM's distance tables."""
    types, positions = types.cpu().long(), positions.detach().cpu().float()
    distance = 100 * (positions[:, :, None] - positions[:, None, :]).square().sum(-1).sqrt()  # (B, N, N) pm
    limits = _limits()[:, types[:, :, None], types[:, None, :]]  # (3, B, N, N)
    below = distance < limits  # a pair that cannot be single cannot be double
    orders = below[0].long() + (below[0] & below[1]).long() + (below[0] & below[1] & below[2]).long()
    orders.diagonal(dim1=1, dim2=2).zero_()
    return orders


@dataclass(frozen=True)
class Stability:
    """By EDM's tables. orders (B, N, N); stable (B, N) atoms whose bond orders sum to a valence of theirs, padding
    counts as stable; molecules (B,) all of whose atoms are."""

    orders: Tensor
    stable: Tensor
    molecules: Tensor


def stability(types: Tensor, positions: Tensor) -> Stability:
    """EDM's atom and molecule stability."""
    types = types.cpu().long()
    orders = distance_orders(types, positions)
    stable = _allowed()[types, orders.sum(-1).clamp(max=63)] | (types == 0)  # (B, N)
    return Stability(orders, stable, stable.all(1) & (types > 0).any(1))


def largest_fragment(mol: Any) -> Any:
    """The fragment with the most atoms, the first of several."""
    pieces = rdkit().Chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    return mol if len(pieces) < 2 else max(pieces, key=lambda piece: piece.GetNumAtoms())


def graph_smiles(types: np.ndarray, orders: np.ndarray) -> str | None:
    """Canonical SMILES of the largest fragment of a graph of n atoms and bond orders (n, n); None if it breaks a rule
    of valence, has an element without a table, or no atoms."""
    if not len(types) or not VALENCES.keys() >= set(types.tolist()):
        return None
    Chem = rdkit().Chem
    bonds = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for number in types.tolist():
        mol.AddAtom(Chem.Atom(number))
    for a, b in np.argwhere(np.triu(orders) > 0).tolist():
        mol.AddBond(a, b, bonds[orders[a, b]])
    if Chem.SanitizeMol(mol, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return None
    return Chem.MolToSmiles(largest_fragment(mol))


# ---- C: bonds by RDKit -----------------------------------------------------------------------------------------------


def atoms_only(types: np.ndarray, positions: np.ndarray) -> Any:
    """An RDKit molecule of atoms at places, without bonds."""
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
    """The neutral molecule that RDKit sees in atoms at places (`DetermineBonds`, charge 0), sanitised, in however many
    fragments; None where it sees none."""
    if not len(types):
        return None
    kit = rdkit()
    mol = atoms_only(types, positions)
    try:
        kit.Bonds.DetermineConnectivity(mol)
        kit.Bonds.DetermineBondOrders(mol, charge=0, embedChiral=False)
        if kit.Chem.SanitizeMol(mol, catchErrors=True) != kit.Chem.SanitizeFlags.SANITIZE_NONE:
            return None
    except (ValueError, RuntimeError):
        return None
    return mol


def fragments(mol: Any) -> int:
    """Pieces that no bond joins."""
    return len(rdkit().Chem.GetMolFrags(mol))


def rings(mol: Any) -> int:
    """Of the smallest set that spans all."""
    return len(rdkit().Chem.GetSSSR(mol))


def plain_smiles(mol: Any) -> str:
    """Canonical SMILES without stereochemistry and without explicit hydrogens."""
    Chem = rdkit().Chem
    return Chem.MolToSmiles(Chem.RemoveHs(mol, sanitize=False), isomericSmiles=False)


def key(smiles: str | None) -> int:
    """SMILES as a number of 63 bits that two different ones hardly share; 0 of None."""
    if smiles is None:
        return 0
    return int.from_bytes(hashlib.blake2b(smiles.encode(), digest_size=8).digest(), "little") >> 1 | 1


# ---- A: bonds by Open Babel ------------------------------------------------------------------------------------------


@cache
def openbabel() -> Any:
    """Open Babel, silenced; ValueError says which extra brings it."""
    try:
        from openbabel import openbabel as babel
    except ImportError:
        raise ValueError(f"Open Babel's view of molecules needs the package openbabel: {EVALUATION_EXTRA}") from None
    babel.obErrorLog.SetOutputLevel(0)
    return babel


def babel_perceive(types: np.ndarray, positions: np.ndarray) -> Any | None:
    """What ADiT and UNITE call valid: Open Babel joins the atoms and finds bond orders, RDKit reads its PDB text and
    sanitises it. In however many fragments; None where RDKit refuses. The same as through files, without any."""
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
    """Canonical SMILES, with stereochemistry, of the fragment with the most atoms."""
    Chem = rdkit().Chem
    try:
        return Chem.MolToSmiles(largest_fragment(mol), isomericSmiles=True)
    except (ValueError, RuntimeError):
        return None


@cache
def matcher() -> Any:
    """pymatgen's MoleculeMatcher, which compares InChIs by Open Babel; ValueError says which extra brings it."""
    openbabel()
    try:
        from pymatgen.analysis.molecule_matcher import MoleculeMatcher
        from pymatgen.core import Molecule
    except ImportError:
        raise ValueError(f"the match rate needs the package pymatgen: {EXTRA}") from None
    return SimpleNamespace(matcher=MoleculeMatcher(), Molecule=Molecule)


def match(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """RMSD in Angstrom between two molecules (types, positions) whose InChIs are equal; infinite where they are not."""
    kit = matcher()
    try:
        pair = [kit.Molecule(t.tolist(), p) for t, p in (a, b)]
        return float(kit.matcher.get_rmsd(*pair))
    except Exception:  # whatever pymatgen or Open Babel raise on garbage is no match
        return float("inf")


# ---- D: PoseBusters --------------------------------------------------------------------------------------------------


@cache
def posebusters(energy: bool) -> Any:
    """PoseBusters with the checks of its "mol" list, with or without the energy of the molecule beside that of other
    conformations; ValueError says which extra brings it. Version 0.6.5 lists that check twice: it runs once here."""
    try:
        import posebusters as package
        import yaml
    except ImportError:
        raise ValueError(f"PoseBusters' checks need the package posebusters: {EVALUATION_EXTRA}") from None
    logging.getLogger("posebusters").setLevel(logging.CRITICAL)  # a molecule that fails is counted, not told of
    config = yaml.safe_load((Path(package.__file__).parent / "config" / "mol.yml").read_text(encoding="utf-8"))
    ratios = [module for module in config["modules"] if module["function"] == "energy_ratio"]
    others = [module for module in config["modules"] if module["function"] != "energy_ratio"]
    return package.PoseBusters({**config, "modules": others + (ratios[-1:] if energy else [])})


def bust(molecules: list[Any], energy: bool) -> list[bool]:
    """Whether each molecule passes every check; None among them passes none."""
    seen = [mol for mol in molecules if mol is not None]
    if not seen:
        return [False] * len(molecules)
    with rdkit().quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passed = iter(posebusters(energy).bust(seen, None, None).fillna(False).astype(bool).all(axis=1).tolist())
    return [mol is not None and next(passed) for mol in molecules]
