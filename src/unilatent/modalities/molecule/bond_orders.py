"""RDKit's search for bond orders, also as a program: `python bond_orders.py` reads atoms from stdin and writes what it
finds to stdout.

The search tries combinations of valences, of which some molecules have too many: seven nitrate groups take hours. So it
is limited in steps, and as a program of its own it can be stopped at any time, unlike RDKit in this process. This file
imports nothing of the package, so that the program starts quickly.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUICK_STEPS = 10_000
"""Steps of a search in this process: at most about 0.1 s."""
STEPS = 600_000
"""Steps of a search in a process of its own: about 3 s for 40 atoms."""
SECONDS = 6.0
"""Time limit of such a process."""

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


def find(numbers: Sequence[int], positions: Any) -> tuple[Any, str | None]:
    """Return the molecule with its bonds, not sanitised, and None; or the molecule of atoms, and why it has no bonds.

    A search that is not over soon goes on in a process of its own, which is stopped after SECONDS or by an exception
    here, such as KeyboardInterrupt.
    """
    mol = atoms_only(numbers, positions)
    fault = search(mol, QUICK_STEPS)
    if fault != GAVE_UP:
        return mol, fault
    request = json.dumps([list(map(int, numbers)), [[float(x) for x in row] for row in positions]])
    # -I: nothing is imported from the user's folder. A session of its own: Ctrl-C in a terminal ends only this process.
    command = [sys.executable, "-I", str(Path(__file__).resolve())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            answer, _ = process.communicate(request, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return mol, GAVE_UP
        finally:
            process.kill()
            process.wait()
    if process.returncode or not answer:
        return mol, GAVE_UP
    found = json.loads(answer)
    if "fault" in found:
        return mol, found["fault"]
    from rdkit import Chem

    packed: Any = base64.b64decode(found["mol"])
    return Chem.Mol(packed), None


def main() -> None:
    from rdkit import Chem, rdBase

    if hasattr(signal, "alarm"):
        signal.alarm(int(2 * SECONDS))  # ends this process even if nobody is left to stop it
    numbers, positions = json.load(sys.stdin)
    mol = atoms_only(numbers, positions)
    with rdBase.BlockLogs():
        fault = search(mol, STEPS)
    if fault is None:
        options = Chem.PropertyPickleOptions
        packed = mol.ToBinary(int(options.AllProps) | int(options.CoordsAsDouble))
        json.dump({"mol": base64.b64encode(packed).decode()}, sys.stdout)
    else:
        json.dump({"fault": fault}, sys.stdout)


if __name__ == "__main__":
    main()
