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
from contextlib import suppress
from pathlib import Path
from typing import Any

QUICK_STEPS = 10_000
"""Steps of a search in this process: at most about 0.1 s."""
STEPS = 600_000
"""Steps of a search in a process of its own: about 3 s for 40 atoms."""
SECONDS = 6.0
"""Time limit of such a process, from when it has imported RDKit."""
START_SECONDS = 120
"""Time limit of its imports."""

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
    request = {
        "path": sys.path,
        "numbers": list(map(int, numbers)),
        "positions": [[float(x) for x in row] for row in positions],
    }
    # -I: nothing is imported from the user's folder first; a session of its own: Ctrl-C in a terminal ends only this
    # process. No buffers, so that `communicate` gets all that follows the first line.
    command = [sys.executable, "-I", str(Path(__file__).resolve())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            unsent = memoryview(f"{json.dumps(request)}\n".encode())
            with suppress(BrokenPipeError):  # the child has ended; its stderr says why
                while unsent:
                    unsent = unsent[process.stdin.write(unsent) :]
            process.stdout.readline()
            answer, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return mol, GAVE_UP
        finally:
            process.kill()
            process.wait()
    if hasattr(signal, "SIGALRM") and process.returncode == -signal.SIGALRM:
        return mol, GAVE_UP
    if process.returncode or not answer:
        last = " ".join(errors.decode("utf-8", "replace").split())[-300:]
        raise RuntimeError(f"the search for bond orders ended with exit code {process.returncode} ({last})")
    found = json.loads(answer)
    if "fault" in found:
        return mol, found["fault"]
    from rdkit import Chem

    packed: Any = base64.b64decode(found["mol"])
    return Chem.Mol(packed), None


def main() -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(START_SECONDS)  # ends this process even if nobody is left to stop it
    request = json.loads(sys.stdin.readline())
    sys.path += [folder for folder in request["path"] if folder and folder not in sys.path]
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDetermineBonds as _  # noqa: F401

    print("ready", flush=True)
    if hasattr(signal, "alarm"):
        signal.alarm(int(2 * SECONDS))
    numbers, positions = request["numbers"], request["positions"]
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
