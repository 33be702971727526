"""PoseBusters' checks of a molecule, in a process of its own (`_atoms.bounded`): the search for conformations, with
which its energy is compared, can take very long. This file imports nothing of the package."""

from __future__ import annotations

import base64
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any


@cache
def checks(energy: bool) -> Any:
    """Return PoseBusters with the checks of its "mol" configuration.

    energy: include the check that compares the molecule's energy with that of other conformations. Version 0.6.5 lists
    this check twice; it runs once here.
    """
    import posebusters as package
    import yaml

    logging.getLogger("posebusters").setLevel(logging.CRITICAL)  # failures are counted, not logged
    config = yaml.safe_load((Path(package.__file__).parent / "config" / "mol.yml").read_text(encoding="utf-8"))
    energy_checks = [module for module in config["modules"] if module["function"] == "energy_ratio"]
    other_checks = [module for module in config["modules"] if module["function"] != "energy_ratio"]
    modules = other_checks + (energy_checks[-1:] if energy else [])
    return package.PoseBusters({**config, "modules": modules, "max_workers": 0})  # no further processes


def passes(mol: Any, energy: bool) -> bool:
    """Return whether an RDKit molecule passes every check."""
    from rdkit import rdBase

    with rdBase.BlockLogs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = checks(energy).bust([mol], None, None)
        return bool(table.fillna(False).astype(bool).all(axis=None))


def prepare() -> None:
    """Import what `answer` needs."""
    checks(False)


def answer(request: dict[str, Any]) -> dict[str, bool]:
    """Check a molecule in a process of its own."""
    from rdkit import Chem

    packed: Any = base64.b64decode(request["mol"])
    return {"passes": passes(Chem.Mol(packed), request["energy"])}
