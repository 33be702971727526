"""pymatgen's comparison of two crystals, also in a process of its own (`_atoms.bounded`).

Its time grows steeply with the number of atoms: at 20 it takes at most seconds, at 100 half a minute, at 200 minutes.
This file imports nothing of the package, so that such a process starts quickly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

SITES, ANGLES, LENGTHS = 0.5, 10.0, 0.3
"""Tolerances: site distances relative to the cube root of the volume per atom, angles in degrees, relative lengths."""


def structure(types: Any, fractional: Any, matrix: Any) -> Any:
    """Return a pymatgen Structure of atomic numbers (n,), places (n, 3) and row vectors (3, 3)."""
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice(matrix), types, np.asarray(fractional, np.float64))


def matcher() -> Any:
    """Return a pymatgen StructureMatcher with the tolerances above."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(stol=SITES, angle_tol=ANGLES, ltol=LENGTHS)


def distance(made: Any, truth: Any) -> float | None:
    """Return the root mean square displacement in cube roots of the volume per atom; None without a match."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = matcher().get_rms_dist(made, truth)
        except Exception:  # cells that pymatgen cannot reduce: no match, as in the literature
            return None
    return None if result is None else float(result[0])


def reduced(one: Any) -> Any | None:
    """Return the primitive, Niggli reduced structure; None if pymatgen fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return one.get_reduced_structure("niggli").get_primitive_structure()
        except Exception:  # the cell is no lattice
            return None


def fits(one: Any, other: Any) -> bool:
    """Return whether two reduced structures are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(matcher().fit(one, other, skip_structure_reduction=True))
        except Exception:
            return False


OPERATIONS: dict[str, Callable[..., Any]] = {"distance": distance, "reduced": reduced, "fits": fits}


def plain(one: Any) -> dict[str, Any]:
    """Return a structure as plain data."""
    return {
        "types": [site.specie.Z for site in one], "fractional": one.frac_coords.tolist(),
        "matrix": one.lattice.matrix.tolist(),
    }  # fmt: skip


def prepare() -> None:
    """Import what `answer` needs."""
    matcher()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do an operation in a process of its own: its name and its structures -> the result."""
    result: Any = OPERATIONS[request["operation"]](*(structure(**one) for one in request["structures"]))
    reduces = request["operation"] == "reduced" and result is not None
    return {"result": plain(result) if reduces else result}
