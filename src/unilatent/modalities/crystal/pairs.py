"""pymatgen's comparison of two crystals, also in a process of its own (`_atoms.bounded`).

Its time grows steeply with the number of atoms: at 20 it takes at most seconds, at 100 half a minute, at 200 minutes.
This file imports nothing of the package, so that such a process starts quickly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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


TYPE_SITES, TYPE_ANGLES, TYPE_LENGTHS = 0.3, 5.0, 0.2
"""Tolerances of a structure type, pymatgen's defaults. With those above, most cells of two atoms are of one type."""


def same_type(one: Any, other: Any) -> bool:
    """Return whether two reduced structures are of one type: equal after an exchange of elements and a scaling."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    if len(one) != len(other):
        return False
    matching = StructureMatcher(stol=TYPE_SITES, angle_tol=TYPE_ANGLES, ltol=TYPE_LENGTHS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # The places alone rule out most pairs. To try all exchanges of k elements takes k! times as long.
            if not matching.fit(_of_one_element(one), _of_one_element(other), skip_structure_reduction=True):
                return False
            return bool(matching.fit_anonymous(one, other, skip_structure_reduction=True))
        except Exception:
            return False


def _of_one_element(one: Any) -> Any:
    return structure([1] * len(one), one.frac_coords, one.lattice.matrix)


def new_types(known: Sequence[Any], structures: Sequence[Any]) -> list[Any]:
    """Return the structures, reduced, that are of no known type (reduced) nor of that of an earlier one."""
    found: list[Any] = []
    for one in map(reduced, structures):
        if one is not None and not any(same_type(one, other) for other in (*known, *found)):
            found.append(one)
    return found


def of_known_type(known: Sequence[Any], structures: Sequence[Any]) -> list[bool]:
    """Return which structures are of a known type (reduced)."""
    made = map(reduced, structures)
    return [one is not None and any(same_type(one, other) for other in known) for one in made]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "distance": distance, "reduced": reduced, "fits": fits, "new_types": new_types, "of_known_type": of_known_type,
}  # fmt: skip


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
    """Do an operation in a process of its own: its name and its structures, or lists of them -> the result."""
    result: Any = OPERATIONS[request["operation"]](*map(_read, request["structures"]))
    if request["operation"] == "reduced" and result is not None:
        result = plain(result)
    if request["operation"] == "new_types":
        result = [plain(one) for one in result]
    return {"result": result}


def _read(plainly: Any) -> Any:
    return [structure(**one) for one in plainly] if isinstance(plainly, list) else structure(**plainly)
