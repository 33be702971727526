"""The order of elements by electronegativity, and formulas."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from .._atoms.elements import SYMBOLS


@lru_cache(maxsize=1)
def _ranks() -> np.ndarray:
    """(100,) rank of each element by electronegativity, then symbol; elements without a value come last."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noble gases without a value
        elements = sorted(Element.from_Z(z) for z in range(1, len(SYMBOLS)))
    ranks = np.zeros(len(SYMBOLS), np.int64)
    ranks[[element.Z for element in elements]] = np.arange(len(elements))
    return ranks


def in_order(types: np.ndarray) -> np.ndarray:
    """Return indices that sort atoms by electronegativity, stably: the order in which pymatgen writes them."""
    return np.argsort(_ranks()[types], kind="stable")


def formula(types: Iterable[int]) -> str:
    """Return the formula with elements in order of their first atom: "NaCl", "SrTiO3"."""
    counts = Counter(int(z) for z in types)
    return "".join(f"{SYMBOLS[z]}{count if count > 1 else ''}" for z, count in counts.items())
