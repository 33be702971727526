"""The order of elements in a file, and formulas."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from ...atoms.elements import SYMBOLS


@lru_cache(maxsize=1)
def _ranks() -> np.ndarray:
    """(100,) each element's place when all are sorted by electronegativity, then symbol; unknown ones last."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of noble gases, which have none
        elements = sorted(Element.from_Z(z) for z in range(1, len(SYMBOLS)))
    ranks = np.zeros(len(SYMBOLS), np.int64)
    ranks[[element.Z for element in elements]] = np.arange(len(elements))
    return ranks


def in_order(types: np.ndarray) -> np.ndarray:
    """Indices that sort atoms by electronegativity, equal ones as they are: what pymatgen writes."""
    return np.argsort(_ranks()[types], kind="stable")


def formula(types: Iterable[int]) -> str:
    """In the order of first atoms: "NaCl", "SrTiO3"."""
    counts = Counter(int(z) for z in types)
    return "".join(f"{SYMBOLS[z]}{count if count > 1 else ''}" for z, count in counts.items())
