"""Names of elements and their order in a file, by atomic number."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

SYMBOLS = (
    "", "H", "He", "Li", "Be", "B", "C", "N", "O", "F", "Ne", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar", "K", "Ca",
    "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr", "Rb", "Sr", "Y",
    "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe", "Cs", "Ba", "La", "Ce",
    "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu", "Hf", "Ta", "W", "Re", "Os", "Ir",
    "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm",
    "Bk", "Cf", "Es",
)  # fmt: skip
"""Place 0 is no element."""
NUMBERS = {symbol: z for z, symbol in enumerate(SYMBOLS) if symbol} | {"D": 1, "T": 1}


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
