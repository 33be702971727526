"""Energy and forces of crystals by CHGNet (Deng et al. 2023), a universal potential that comes with its weights.

In a process of its own (`_atoms.bounded`): a dense cell has so many neighbours that it takes very long. This file
imports nothing of the package.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np

WEIGHTS = "0.3.0"
"""Version of the weights, trained on relaxations of the Materials Project (PBE with +U)."""


@cache
def potential() -> Any:
    """Return CHGNet on the CPU."""
    import torch
    from chgnet.model import CHGNet

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CHGNet.load(model_name=WEIGHTS, use_device="cpu", verbose=False)


def prepare() -> None:
    """Import what `answer` needs."""
    potential()


def answer(request: dict[str, Any]) -> list[float] | str:
    """Return the energy per atom in eV, less that of CHGNet's linear model of the composition, and the root mean square
    force on an atom in eV per Angstrom; or why there are none.

    request: `types` (n,), `fractional` (n, 3), `matrix` (3, 3) row vectors in Angstrom.
    """
    from pymatgen.core import Lattice, Structure

    model = potential()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            crystal = Structure(Lattice(request["matrix"]), request["types"], request["fractional"])
            graph = model.graph_converter(crystal)
            found = model.predict_graph(graph, task="ef")
            elements = float(model.composition_model([graph])[0])
        except Exception as error:  # no neighbours at all, or pymatgen finds no lattice
            return str(error)
    forces = np.asarray(found["f"], np.float64)
    return [float(found["e"]) - elements, float(np.sqrt(np.square(forces).sum(-1).mean()))]
