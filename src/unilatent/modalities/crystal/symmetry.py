"""Space groups by the names that files give them, their operations, and the atoms that these make of sites."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

GROUPS = range(1, 531)
"""Numbers of spglib's settings, after Hall."""
MONOCLINIC = range(3, 16)
CUBIC_WITH_BAR = (*range(200, 207), *range(221, 231))
"""Groups written without the bar before 1992: F m 3 m for F m -3 m."""
STANDARD = ("", "1", "2", "h", "r", "b", "b1", "c", "c1")
"""spglib's choices with the axes of the International Tables."""
DOUBLE_GLIDES = (39, 41, 64, 67, 68)
"""Groups whose symbol has the letter e since 1992 (C m c e), and a, b or c before (C m c a)."""
METRIC = 0.02
"""Largest relative deviation of a cell from the symmetry of its group."""
SUFFIX = re.compile(r"(?::|\s)\s*(1|2|h|r|s|z|o1|o2|[abc]\d?|-?[abc]{3}|\d[-abc]{3,4})\s*$", re.IGNORECASE)
CHOICES = {"s": "1", "z": "2", "o1": "1", "o2": "2"}
"""Marks of the choice of origin in other programs -> spglib's."""


@dataclass(frozen=True)
class Operations:
    """Operations x -> rotations x + translations: (G, 3, 3) whole numbers and (G, 3) in [0, 1)."""

    rotations: np.ndarray
    translations: np.ndarray

    def __len__(self) -> int:
        return len(self.rotations)


@dataclass(frozen=True)
class Names:
    """What a file calls its space group: a Hall symbol, a Hermann-Mauguin symbol, a number in the International Tables;
    each "" if unknown."""

    hall: str = ""
    symbol: str = ""
    number: str = ""

    @property
    def all(self) -> tuple[str, ...]:
        return self.hall, self.symbol, self.number

    def __str__(self) -> str:
        return self.symbol or (f"number {self.number}" if self.number else self.hall)


@dataclass(frozen=True)
class _Setting:
    number: int
    choice: str
    hall: int


def parsed(words: Sequence[str]) -> Operations:
    """Parse operations such as "-y, x-y, z+1/3"; ValueError names one that is none."""
    rotations, translations = np.zeros((len(words), 3, 3), np.int64), np.zeros((len(words), 3))
    for i, word in enumerate(words):
        parts = re.sub(r"\s", "", word).lower().split(",")
        if len(parts) != 3:
            raise ValueError(f"{word!r} is no symmetry operation")
        for axis, part in enumerate(parts):
            terms = re.findall(r"([-+]?)(?:(\d*\.?\d+)(?:/(\d+))?|([xyz]))", part)
            if not part or "".join("".join((a, b, f"/{c}" if c else "", d)) for a, b, c, d in terms) != part:
                raise ValueError(f"{word!r} is no symmetry operation")
            for sign, value, divisor, letter in terms:
                factor = -1 if sign == "-" else 1
                if letter:
                    rotations[i, axis, "xyz".index(letter)] += factor
                elif int(divisor or 1):
                    translations[i, axis] += factor * float(Fraction(value) / int(divisor or 1))
                else:
                    raise ValueError(f"{word!r} is no symmetry operation")
    if (np.abs(np.round(np.linalg.det(rotations))) != 1).any():
        raise ValueError(f"{words[0]!r} and the operations after it are no symmetry")
    return Operations(rotations, _wrapped(translations))


def named(names: Names, matrix: np.ndarray) -> Operations | None:
    """Return the operations of a space group; None if it has no name.

    matrix: (3, 3) row vectors of the cell, which decides between settings. ValueError if no group is known by these
    names, if they name different ones, if the cell does not fit, or if the choice of origin stays open.
    """
    settings = _settings_of(names)
    if settings is None:
        return None
    fitting = [setting for setting in settings if _fits(_operations(setting.hall), matrix)]
    if not fitting:
        raise ValueError(f"its cell does not have the symmetry of its space group {names}")
    if {setting.choice for setting in fitting} >= {"1", "2"}:
        raise ValueError(
            f"the space group {names} has two choices of origin, and no operations are listed; add them, or the choice "
            "to the symbol (:1 or :2)"
        )
    return _operations(fitting[0].hall)


def check(operations: Operations, names: Names) -> None:
    """ValueError if listed operations are no group, or another one than the names say. Unknown names say nothing."""
    found = _type_of(operations)
    if found is None:
        raise ValueError(f"its {len(operations)} symmetry operations are no space group")
    try:
        settings = _settings_of(names)
    except ValueError:
        return
    if settings and found not in {setting.number for setting in settings}:
        raise ValueError(f"it names the space group {names}, and lists the operations of number {found}")


def orbit(operations: Operations, site: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the atoms (m, 3) of a cell that a site (3,) stands for, fractional in [0, 1).

    tolerance: deviation up to which images of the site are one atom; the site is then moved to the symmetric position,
    which is the mean of its images.
    """
    images = operations.rotations @ site + operations.translations
    near = images - np.round(images - site)
    own = (np.abs(near - site) < tolerance).all(1)
    if own.sum() > 1:
        images = operations.rotations @ near[own].mean(0) + operations.translations
    images = _wrapped(images)
    atoms = images[:0]
    for image in images:
        apart = image - atoms
        if not (np.abs(apart - np.round(apart)) < tolerance).all(1).any():
            atoms = np.concatenate([atoms, image[None]])
    return atoms


# ---- names -----------------------------------------------------------------------------------------------------------


def _settings_of(names: Names) -> list[_Setting] | None:
    """Return the possible settings, the standard one first; None without any name. ValueError if there are none."""
    options = [_halls()[_plain(names.hall)]] if _plain(names.hall) in _halls() else []
    if names.symbol:
        options.append(_by_symbol(names.symbol))
    if names.number and names.number != "0":
        if not re.fullmatch(r"\d{1,3}", names.number, re.ASCII) or not 1 <= int(names.number) <= 230:
            raise ValueError(f"there is no space group number {names.number!r}")
        numbered = [setting for setting in _settings() if setting.number == int(names.number)]
        standard = [setting for setting in numbered if setting.choice in STANDARD]
        options.append(numbered if options else standard)  # a number alone: no setting with other axes
    if not options:
        if names.hall:
            raise ValueError(f"there is no Hall symbol {names.hall!r} in spglib's table; list the symmetry operations")
        return None
    common = [setting for setting in options[0] if all(setting in other for other in options[1:])]
    if not common:
        raise ValueError(f"its names of a space group are not of one group ({', '.join(filter(None, names.all))})")
    return common


def _by_symbol(symbol: str) -> list[_Setting]:
    """Return the settings with a Hermann-Mauguin symbol, in any spelling, with a choice of origin or axes or not."""
    table = _symbols()
    if found := table.get(_plain(symbol)):
        return found
    mark = SUFFIX.search(symbol.strip())
    if mark and (found := table.get(_plain(symbol.strip()[: mark.start()]))):
        choice = CHOICES.get(mark[1].lower(), mark[1].lower())
        if choice == "1" and not any(setting.choice for setting in found):
            return found
        if chosen := [setting for setting in found if setting.choice == choice]:
            return chosen
    raise ValueError(f"there is no space group {symbol!r} in spglib's table; list its symmetry operations")


def _plain(symbol: str) -> str:
    """A symbol without spaces and marks of subscripts: "P 21/c", "P2_1/c" and "P2(1)/c" are the same."""
    return re.sub(r"<[^>]*>|sub|[\s_~(){}$\\^,'\"]", "", symbol.lower()) if symbol else ""


@lru_cache(maxsize=1)
def _settings() -> tuple[_Setting, ...]:
    return tuple(_Setting(kind.number, kind.choice.lower(), hall) for hall, kind in _types())


@lru_cache(maxsize=1)
def _types() -> tuple[tuple[int, Any], ...]:
    with _quiet() as spglib:
        return tuple((hall, spglib.get_spacegroup_type(hall)) for hall in GROUPS)


@lru_cache(maxsize=1)
def _halls() -> dict[str, list[_Setting]]:
    return {_plain(kind.hall_symbol): [setting] for (_, kind), setting in zip(_types(), _settings(), strict=True)}


@lru_cache(maxsize=1)
def _symbols() -> dict[str, list[_Setting]]:
    """Return symbol, without spaces -> settings. Symbols that two groups share are left to the fuller spellings."""
    table: dict[str, list[_Setting]] = {}
    for (_, kind), setting in zip(_types(), _settings(), strict=True):
        for spelling in dict.fromkeys(map(_plain, _spellings(kind))):
            table.setdefault(spelling, []).append(setting)
    return table


def _spellings(kind: Any) -> Iterable[str]:
    """Yield the symbols of a setting: full, short, of other axes, and those in use before 1992."""
    full, short = kind.international_full, kind.international.rpartition("=")[2].strip()
    names = [full, short, kind.international_short]
    if kind.number in MONOCLINIC:  # whose short symbol is that of the standard setting; P 21/n is short for P 1 21/n 1
        names = [full, " ".join(word for word in full.split() if word != "1")]
    for name in names:
        yield name
        if kind.number in CUBIC_WITH_BAR:
            yield name.replace("-3", "3")
        for letter in "abc" if kind.number in DOUBLE_GLIDES else "":
            yield name.replace("e", letter)


# ---- operations ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _operations(hall: int) -> Operations:
    with _quiet() as spglib:
        found = spglib.get_symmetry_from_database(hall)
    return Operations(np.asarray(found["rotations"], np.int64), _wrapped(np.asarray(found["translations"], np.float64)))


def _type_of(operations: Operations) -> int | None:
    """Return the number of the space group that operations form; None if they form none."""
    return _number_of(operations.rotations.tobytes(), np.round(operations.translations, 4).tobytes())


@lru_cache(maxsize=1024)
def _number_of(rotations: bytes, translations: bytes) -> int | None:
    turns = np.frombuffer(rotations, np.int64).reshape(-1, 3, 3)
    steps = _exact(np.frombuffer(translations).reshape(-1, 3))
    if not _is_group(turns, steps):
        return None
    try:
        with _quiet() as spglib:
            kind = spglib.get_spacegroup_type_from_symmetry(turns.astype(np.intc), steps)
    except Exception:  # spglib's errors, in versions that do not return None
        return None
    return None if kind is None else int(kind.number)


def _is_group(rotations: np.ndarray, translations: np.ndarray) -> bool:
    """Whether products of operations are among them, whole translations aside."""
    if np.abs(rotations).max() > 1:
        return False
    products = np.einsum("aij,bjk->abik", rotations, rotations).reshape(-1, 3, 3)
    steps = np.einsum("aij,bj->abi", rotations, translations) + translations[:, None]
    return bool(np.isin(_keys(products, steps.reshape(-1, 3)), _keys(rotations, translations)).all())


def _keys(rotations: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """Return a whole number per operation: its rotation, and its translation to a 96th of the cell."""
    turns = (rotations.reshape(-1, 9) + 4) @ 9 ** np.arange(9)
    steps = np.floor(translations * 96 + 0.25).astype(np.int64) % 96 @ 96 ** np.arange(3)
    return turns * 96**3 + steps


@contextmanager
def _quiet() -> Iterator[Any]:
    """spglib, without its warnings of how errors will be reported."""
    import spglib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield spglib


def _exact(translations: np.ndarray) -> np.ndarray:
    """Round translations to multiples of 1/24, as 0.3333 and 0.1667 mean."""
    nearest = np.round(translations * 24) / 24
    return np.where(np.abs(translations - nearest) < 2e-3, nearest, translations)


def _fits(operations: Operations, matrix: np.ndarray) -> bool:
    """Whether the operations keep lengths and angles of a cell."""
    metric = matrix @ matrix.T
    turned = np.swapaxes(operations.rotations, 1, 2) @ metric @ operations.rotations
    scale = np.sqrt(np.outer(metric.diagonal(), metric.diagonal()))
    return bool((np.abs(turned - metric) / scale < METRIC).all())


def _wrapped(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)
