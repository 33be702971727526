"""RDKit's search for bond orders, also in a process of its own (`_atoms.bounded`).

The search tries combinations of valences, of which some molecules have too many: seven nitrate groups take hours. So it
is limited in steps, and in a process of its own it can be stopped at any time, unlike RDKit in this one. This file
imports nothing of the package when it is loaded, so that such a process starts quickly.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

QUICK_STEPS = 10_000
"""Steps of a search in this process: at most about 0.1 s."""
STEPS = 600_000
"""Steps of a search in a process of its own: about 3 s for 40 atoms."""
SECONDS = 6.0
"""Time limit of a search in a process of its own, from when that has imported RDKit."""

GAVE_UP, REJECTED = "gave up", "rejected"
"""Why a search has no result: the limit of steps or time; or RDKit finds charges that do not add up to 0, or a number
of bonds that its tables do not have."""


def atoms_only(numbers: Sequence[int], positions: Any) -> Any:
    """Return an RDKit molecule of atoms at positions (n, 3) float64, without bonds."""
    from rdkit import Chem

    mol = Chem.RWMol()
    for number in numbers:
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    conformer = Chem.Conformer(len(numbers))
    for i, (x, y, z) in enumerate(positions):
        conformer.SetAtomPosition(i, (float(x), float(y), float(z)))
    mol.AddConformer(conformer)
    return mol


def search(mol: Any, steps: int) -> str | None:
    """Find the bonds of a neutral molecule in place (`DetermineBonds`, charge 0); return why there are none."""
    from rdkit.Chem import rdDetermineBonds

    try:
        rdDetermineBonds.DetermineConnectivity(mol)
        rdDetermineBonds.DetermineBondOrders(mol, charge=0, embedChiral=False, maxIterations=steps)
    except (ValueError, RuntimeError) as error:
        return GAVE_UP if "Max Iterations Exceeded" in str(error) else REJECTED
    return None


PlacedAtoms = tuple[Sequence[int], Any]
"""Atomic numbers, and positions (n, 3) in Angstrom."""
Found = tuple[Any, str | None]
"""A molecule with its bonds, not sanitised, and None; or the molecule of atoms, and why it has no bonds."""


def find_soon(numbers: Sequence[int], positions: Any) -> Found:
    """Find the bonds of a neutral molecule in this process; GAVE_UP if that takes more than QUICK_STEPS."""
    mol = atoms_only(numbers, positions)
    return mol, search(mol, QUICK_STEPS)


def find_long(
    molecules: Sequence[PlacedAtoms], at_once: int = 1, done: Callable[[int], object] = lambda more: None
) -> list[Found]:
    """Find the bonds of neutral molecules in processes of their own, `at_once` of them.

    Each search is stopped after STEPS or SECONDS, and all are by an exception here, such as KeyboardInterrupt. done:
    called with how many more are done.
    """
    from .._atoms.bounded import ask_all

    requests = [
        {"numbers": list(map(int, numbers)), "positions": [[float(x) for x in row] for row in positions]}
        for numbers, positions in molecules
    ]
    found: list[Found] = []
    for molecule, answered in zip(molecules, ask_all(__file__, requests, SECONDS, at_once, done), strict=True):
        if answered is None or "fault" in answered:
            found.append((atoms_only(*molecule), GAVE_UP if answered is None else answered["fault"]))
        else:
            found.append((_unpacked(answered["mol"]), None))
    return found


def _unpacked(text: str) -> Any:
    from rdkit import Chem

    packed: Any = base64.b64decode(text)
    return Chem.Mol(packed)


def prepare() -> None:
    """Import what `answer` needs."""
    from rdkit.Chem import rdDetermineBonds as _  # noqa: F401


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Search in a process of its own: numbers and positions of atoms -> the molecule, or why it has no bonds."""
    from rdkit import Chem, rdBase

    mol = atoms_only(request["numbers"], request["positions"])
    with rdBase.BlockLogs():
        fault = search(mol, STEPS)
    if fault is not None:
        return {"fault": fault}
    options = Chem.PropertyPickleOptions
    return {"mol": base64.b64encode(mol.ToBinary(int(options.AllProps) | int(options.CoordsAsDouble))).decode()}
