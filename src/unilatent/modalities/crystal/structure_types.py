"""Structure types: crystals that are equal after an exchange of their elements and a scaling (rocksalt, perovskite).

pymatgen's StructureMatcher compares them without regard to elements, in processes of their own that can be stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .._atoms.bounded import ask_all
from .._atoms.files import CORES
from . import pairs
from .baselines import Arrays
from .lattices import cell_matrix, elongated
from .matching import FEW_ATOMS
from .validity import composition, structure_checks

SECONDS = 10.0
"""Time limit of a request."""
AT_ONCE = 25
"""Crystals of a request."""
AGAIN_SECONDS, AGAIN = 3.0, 20
"""Time limit of a single crystal of a request that took too long, and most crystals that are asked for once more."""
THIN = 20_000.0
"""Longest side of a cell, cubed, by its volume, above which it is of no known type: its reduction would take seconds,
and the cells of real structure types are far from it (a: 3, b: 3, c: 50 Angstrom: 280)."""
FEW = 50
"""So many crystals are compared sooner than processes start."""

Formula = tuple[int, ...]
"""Numbers of atoms of the elements, in ascending order, without the elements' names and a common factor: NaCl is
(1, 1)."""
Done = Callable[[int], object]
"""Called with how many more crystals are compared."""
PlainCrystal = dict[str, Any]
"""Arguments of `pairs.structure` as plain data."""


def formula_of(types: Iterable[int]) -> Formula:
    """Return the formula of a crystal; types of 0 are padding."""
    return tuple(sorted(count for _, count in composition(types)))


class KnownTypes:
    """The structure types of a set of crystals. undecided: how many of its crystals took too long and are left out."""

    def __init__(self, crystals: Arrays, done: Done = lambda more: None):
        self.types: dict[Formula, list[PlainCrystal]] = defaultdict(list)
        late: list[tuple[Formula, PlainCrystal]] = []
        of_formula: dict[Formula, list[PlainCrystal]] = defaultdict(list)
        for formula, one in _plain(crystals):
            if one is None:
                done(1)
            else:
                of_formula[formula].append(one)
        while of_formula:  # in each round, the next crystals of every formula are compared with its types so far
            parts = {formula: waiting[:AT_ONCE] for formula, waiting in of_formula.items()}
            of_formula = {f: waiting[AT_ONCE:] for f, waiting in of_formula.items() if len(waiting) > AT_ONCE}
            requests = [("new_types", self.types[formula], part) for formula, part in parts.items()]
            for (formula, part), new in zip(parts.items(), _ask(requests, done), strict=True):
                if new is None:
                    late += [(formula, one) for one in part]
                else:
                    self.types[formula] += new
        again = late[:AGAIN]
        requests = [("new_types", self.types[formula], [one]) for formula, one in again]
        for (formula, _), new in zip(again, _ask(requests, lambda more: done(0), AGAIN_SECONDS), strict=True):
            late = late if new is None else late[1:]
            self.types[formula] += new or []  # two that were asked for at once may be of one type
        self.undecided = len(late)

    def __len__(self) -> int:
        return sum(map(len, self.types.values()))

    def among(self, crystals: Arrays, done: Done = lambda more: None) -> np.ndarray:
        """Return for each crystal (S,) 1 if it is of one of these types, 0 if not, NaN if that took too long."""
        found = np.zeros(len(crystals[0]))
        of_formula: dict[Formula, list[tuple[int, PlainCrystal]]] = defaultdict(list)
        for row, (formula, one) in enumerate(_plain(crystals)):
            if one is None or not self.types.get(formula):
                done(1)
            else:
                of_formula[formula].append((row, one))
        parts = [
            (formula, waiting[start : start + AT_ONCE])
            for formula, waiting in of_formula.items()
            for start in range(0, len(waiting), AT_ONCE)
        ]
        self._look_up(parts, found, done)
        late = [(f, [pair]) for f, part in parts if len(part) > 1 for pair in part if np.isnan(found[pair[0]])]
        self._look_up(late[:AGAIN], found, lambda more: done(0), AGAIN_SECONDS)
        return found

    def _look_up(
        self, parts: Sequence[tuple[Formula, list[tuple[int, PlainCrystal]]]], found: np.ndarray, done: Done,
        seconds: float = SECONDS,
    ) -> None:  # fmt: skip
        requests = [("of_known_type", self.types[f], [one for _, one in part]) for f, part in parts]
        for (_, part), known in zip(parts, _ask(requests, done, seconds), strict=True):
            for place, (row, _) in enumerate(part):
                found[row] = np.nan if known is None else known[place]


def _ask(
    requests: Sequence[tuple[str, list[PlainCrystal], list[PlainCrystal]]], done: Done, seconds: float = SECONDS
) -> list[Any]:
    """Return the results of operations of `pairs` with two lists of crystals; None where one takes too long.

    A few small crystals are compared in this process.
    """
    asked = [{"operation": name, "structures": [types, crystals]} for name, types, crystals in requests]
    atoms = [len(one["types"]) for _, _, crystals in requests for one in crystals]
    if len(atoms) <= FEW and max(atoms, default=0) <= FEW_ATOMS:
        found = []
        for request, (_, _, crystals) in zip(asked, requests, strict=True):
            found.append(pairs.answer(request)["result"])
            done(len(crystals))
        return found
    sizes = iter(len(crystals) for _, _, crystals in requests)
    answers = ask_all(pairs.__file__, asked, seconds, CORES, lambda more: done(next(sizes)))
    return [None if answer is None else answer["result"] for answer in answers]


def _plain(crystals: Arrays) -> list[tuple[Formula, PlainCrystal | None]]:
    """Return the formula of each crystal, and what describes it; None if its cell cannot be built or is too thin."""
    described: list[tuple[Formula, PlainCrystal | None]] = []
    for types, fractional, lattice, built in zip(*crystals, structure_checks(*crystals)[0], strict=True):
        atoms, matrix = types > 0, cell_matrix(np.asarray(lattice, np.float64))
        one: PlainCrystal | None = None
        if built and not elongated(matrix, THIN):
            places = np.asarray(fractional, np.float64)[atoms]
            one = {"types": types[atoms].tolist(), "fractional": places.tolist(), "matrix": matrix.tolist()}
        described.append((formula_of(types), one))
    return described
