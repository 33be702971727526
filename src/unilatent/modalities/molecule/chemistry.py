"""Bonds and validity of atoms in space: by distance tables, RDKit, Open Babel and PoseBusters; canonical SMILES.

Batches have types (B, N), atomic numbers with 0 at padding, and positions (B, N, 3) in Angstrom. RDKit, Open Babel,
PoseBusters and pymatgen's molecule matcher are imported at first use, and only here, in `bond_orders` and in
`pose_checks`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._atoms.bounded import ask_all
from .._atoms.files import CORES

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
        from rdkit.Chem import Draw, rdDepictor, rdDistGeom, rdForceFieldHelpers, rdMolDescriptors
    except ImportError:
        raise ValueError(f"molecules need the package rdkit: {EXTRA}") from None
    return SimpleNamespace(
        Chem=Chem, Draw=Draw, Depictor=rdDepictor, Embed=rdDistGeom, Force=rdForceFieldHelpers,
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


JUDGED, GAVE_UP, CHARGES, BONDS = 0, 1, 2, 3
"""Whether RDKit's protocol judges a molecule: it does; its search for bond orders was given up; the molecule is sound,
but RDKit's charges do not add up to 0 (dinitrobenzenes); it is sound, but an element has more bonds than RDKit's tables
allow (SF6, PF5)."""


@dataclass(frozen=True)
class Perception:
    """mol: the neutral molecule that RDKit determines from positions, sanitised; it may have several fragments. None if
    there is none: then the molecule is invalid if `judged` is JUDGED, else it was not judged."""

    mol: Any | None
    judged: int = JUDGED


def perceive(types: np.ndarray, positions: np.ndarray) -> Any | None:
    """Return the molecule of `perception`, or None."""
    return perception(types, positions).mol


def perception(types: np.ndarray, positions: np.ndarray) -> Perception:
    """Return the perception of one molecule, as `perceptions`."""
    return perceptions([(types, positions)])[0]


def perceptions(
    molecules: Sequence[tuple[np.ndarray, np.ndarray]], done: Callable[[int], object] = lambda more: None
) -> list[Perception]:
    """Determine the bonds of molecules (`DetermineBonds`, charge 0): atoms (n,) at positions (n, 3).

    Each search has a limit of steps and time. Long ones are shared among as many processes as there are cores, and are
    remembered: drawing and measuring ask for the same molecules. done: called with how many more of these are done.
    """
    from . import bond_orders

    if any(len(types) for types, _ in molecules):
        rdkit()
    verdicts: dict[int, Perception] = {}
    long: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for place, (types, positions) in enumerate(molecules):
        key = tuple(types.tolist()), np.ascontiguousarray(positions, np.float64).tobytes()
        if key in _long or key in long:
            long.setdefault(key, []).append(place)
            continue
        mol, fault = bond_orders.find_soon(key[0], positions) if len(types) else (None, None)
        if fault == bond_orders.GAVE_UP:
            long[key] = [place]
        else:
            verdicts[place] = _verdict(mol, fault)
    new = [key for key in long if key not in _long]
    results = {key: _long[key] for key in long if key in _long}
    if new:
        atoms = [(numbers, np.frombuffer(places).reshape(-1, 3)) for numbers, places in new]
        results |= zip(new, bond_orders.find_long(atoms, CORES, done), strict=True)
    for key in new[-REMEMBERED:]:
        if len(_long) >= REMEMBERED:
            _long.pop(next(iter(_long)))
        _long[key] = results[key]
    for key, places in long.items():
        verdicts |= {place: _verdict(rdkit().Chem.RWMol(results[key][0]), results[key][1]) for place in places}
    return [verdicts[place] for place in range(len(molecules))]


def _verdict(mol: Any | None, fault: str | None) -> Perception:
    """The perception of a molecule in which a search found bonds, or a fault; None: without atoms."""
    from . import bond_orders

    if mol is None or (fault is None and _sanitised(mol)):
        return Perception(mol)
    return Perception(None, GAVE_UP if fault == bond_orders.GAVE_UP else _sound(mol))


REMEMBERED = 1024
"""Long searches that are remembered."""
_long: dict[tuple[tuple[int, ...], bytes], tuple[Any, str | None]] = {}


def atoms_only(types: np.ndarray, positions: np.ndarray) -> Any:
    """Return an RDKit molecule of atoms (n,) at positions (n, 3), without bonds."""
    rdkit()
    from .bond_orders import atoms_only

    return atoms_only(types.tolist(), positions)


SUMS = {
    1: (1,), 3: (1,), 4: (2,), 5: (3,), 6: (4,), 7: (3, 5), 8: (2,), 9: (1,), 11: (1,), 12: (2,), 13: (3,), 14: (4,),
    15: (3, 5), 16: (2, 4, 6), 17: (1, 3, 5, 7), 31: (3,), 32: (4,), 33: (3, 5), 34: (2, 4, 6), 35: (1, 3, 5, 7),
    36: (2,), 50: (4,), 51: (3, 5), 52: (2, 4, 6), 53: (1, 3, 5, 7), 54: (2, 4, 6, 8),
}  # fmt: skip
"""Sums of bond orders of uncharged atoms, as formulas without charges have them: N 5 in a nitro group, S 6 in SF6."""
HALOGENS = {9, 17, 35, 53}
SOUND_STEPS = 20_000


def _sound(mol: Any) -> int:
    """Return why RDKit rejects a sound molecule: BONDS or CHARGES; JUDGED if it is not sound.

    It is sound if its atoms' connections, as RDKit determined them, have bond orders with sums in SUMS. All atoms must
    be connected, and no hydrogen may be at an atom with more than its least sum. Contacts between halogens of one atom
    (SF6) are no bonds.
    """
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    if fragments(mol) > 1 or any(number not in SUMS for number in numbers):
        return JUDGED
    near = [{other.GetIdx() for other in atom.GetNeighbors()} for atom in mol.GetAtoms()]
    pairs = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]
    bonds = [(a, b) for a, b in pairs if not ({numbers[a], numbers[b]} <= HALOGENS and near[a] & near[b])]
    around: list[list[int]] = [[] for _ in numbers]
    for a, b in bonds:
        around[a].append(b)
        around[b].append(a)
    allowed = [
        [total - len(near) for total in SUMS[z] if total >= len(near) and _may_have(z, total, near, numbers)]
        for z, near in zip(numbers, around, strict=True)
    ]
    if not all(allowed) or not _assignable(allowed, bonds):
        return JUDGED
    return BONDS if any(z != N and len(near) > SUMS[z][0] for z, near in zip(numbers, around, strict=True)) else CHARGES


def _may_have(z: int, total: int, near: list[int], numbers: list[int]) -> bool:
    if total == SUMS[z][0]:
        return True
    if z == N:  # a nitro group, an oxide, an azide: not NH5
        return len(near) <= 4 and any(numbers[i] in (N, O) for i in near)
    return all(numbers[i] != H for i in near)


def _assignable(allowed: list[list[int]], bonds: list[tuple[int, int]]) -> bool:
    """Whether each bond can be raised by 0, 1 or 2 so that the raises at each atom add up to one of its sums.

    A depth-first search in the order of bonds; False after SOUND_STEPS.
    """
    last = {atom: i for i, bond in enumerate(bonds) for atom in bond}
    raised, steps = [0] * len(allowed), 0

    def place(i: int) -> bool:
        nonlocal steps
        steps += 1
        if i == len(bonds):
            return True
        for raise_by in (0, 1, 2):
            if steps > SOUND_STEPS:
                return False
            for atom in bonds[i]:
                raised[atom] += raise_by
            fits = all(
                raised[atom] in allowed[atom] if last[atom] == i else raised[atom] <= allowed[atom][-1]
                for atom in bonds[i]
            )
            if fits and place(i + 1):
                return True
            for atom in bonds[i]:
                raised[atom] -= raise_by
        return False

    alone = all(0 in sums for atom, sums in enumerate(allowed) if atom not in last)
    return alone and place(0)


def fragments(mol: Any) -> int:
    """Return the number of fragments."""
    return len(rdkit().Chem.GetMolFrags(mol))


def rings(mol: Any) -> int:
    """Return the number of rings in the smallest set of smallest rings."""
    return len(rdkit().Chem.GetSSSR(mol))


def heavy_atoms(mol: Any) -> int:
    """Return the number of atoms that are no hydrogen."""
    return int(mol.GetNumHeavyAtoms())


def logp(mol: Any) -> float:
    """Return the decimal logarithm of the partition coefficient between octanol and water, by Crippen's method."""
    return float(rdkit().Descriptors.CalcCrippenDescriptors(mol)[0])


def tpsa(mol: Any) -> float:
    """Return the topological polar surface area in square Angstrom (Ertl et al. 2000)."""
    return float(rdkit().Descriptors.CalcTPSA(mol))


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


BUST_SECONDS = 60.0
"""Time limit of PoseBusters' checks of one molecule."""


@cache
def posebusters() -> None:
    """ValueError names the extra to install, if PoseBusters is missing."""
    try:
        import posebusters  # noqa: F401
        import yaml  # noqa: F401
    except ImportError:
        raise ValueError(f"PoseBusters' checks need the package posebusters: {EVALUATION_EXTRA}") from None


def bust(
    molecules: Sequence[Any], energy: bool, done: Callable[[int], object] = lambda more: None
) -> list[bool | None]:  # fmt: skip
    """Return for each molecule whether it passes every check, None if that took longer than BUST_SECONDS.

    False for None. The molecules are shared among as many processes as there are cores. done: called with how many more
    are checked.
    """
    from . import pose_checks

    posebusters()
    options = rdkit().Chem.PropertyPickleOptions
    properties = int(options.AllProps) | int(options.CoordsAsDouble)
    perceived = [mol for mol in molecules if mol is not None]
    requests = [{"mol": base64.b64encode(mol.ToBinary(properties)).decode(), "energy": energy} for mol in perceived]
    found = iter(ask_all(pose_checks.__file__, requests, BUST_SECONDS, CORES, done))
    answers = [{"passes": False} if mol is None else next(found) for mol in molecules]
    return [None if answer is None else answer["passes"] for answer in answers]
