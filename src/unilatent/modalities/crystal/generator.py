"""Crystals without a download: textbook prototypes filled with elements that could form them.

A crystal is built from one of 36 structure types and elements whose charges balance, or metals. The cell is scaled so
that the closest contact equals the sum of two radii, times N(1, 0.02); axial ratio and free coordinates are perturbed
slightly; the primitive cell is Niggli reduced. The crystals are plausible but not relaxed: no energy is computed.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import gcd

import numpy as np

from .._atoms.files import ProgressCallback
from .._atoms.systems import System, Systems
from .elements import in_order
from .lattices import cell_matrix, distances_of, niggli, require, wrap

NUM = 5000
"""Default number of crystals."""
VERSION = 1
"""Version of the rules below; raised when the same seed gives other crystals."""
MAX_ATOMS, SMALL_ATOMS = 20, 5
"""The most atoms of a primitive cell, and of one of the set of small cells."""
NEAREST = 1.2
"""Smallest distance between two atoms in Angstrom."""
SHORTEST = 2.2
"""Smallest distance from an atom to its own image in Angstrom."""
TOLERANCE_FACTOR = (0.74, 1.12)
"""Limits of Goldschmidt's tolerance factor of perovskites."""
SCALE_DEVIATION = 0.02
"""Relative standard deviation of the scale of a cell and of its axial ratio."""
COORDINATE_DEVIATION = 0.004
"""Standard deviation of a free fractional coordinate in the conventional cell."""
CHUNK = 64
"""Candidates per process and round."""
LEFT_OUT = (2, 10, 18, 36, 54, 1, 43, 61)
"""Elements that are not used: noble gases, hydrogen, and two without stable isotopes."""
ELEMENTS = tuple(z for z in (*range(1, 84), 90, 92) if z not in LEFT_OUT)
"""77 elements: up to bismuth, thorium and uranium."""
ANIONS = {
    1: {9: 1.19, 17: 1.67, 35: 1.82, 53: 2.06}, 2: {8: 1.26, 16: 1.70, 34: 1.84, 52: 2.07},
    3: {7: 1.32, 15: 1.60, 33: 1.70, 51: 1.88}, 4: {6: 1.35},
}  # fmt: skip
"""Negative charge -> atomic number -> radius in Angstrom. Shannon's crystal radii; for carbon, phosphorus, arsenic and
antimony the length of a bond in a zincblende compound less the radius of its cation."""
NEVER_CATIONS = {6, 7, 8, 9, 16, 17, 34, 35, 53}
NOT_METALS = {5, 6, 7, 8, 9, 14, 15, 16, 17, 32, 33, 34, 35, 52, 53}
LATE = (13, 14, 31, 32, 33, 49, 50, 51, 82, 83)
"""Elements of the p block for site C of Heusler and ThCr2Si2 compounds."""


@dataclass(frozen=True)
class Site:
    """A Wyckoff position.

    role: its letter in the formula. at: fractional coordinates in the conventional cell. free: directions in which it
    may move.
    """

    role: str
    at: tuple[float, float, float]
    free: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Prototype:
    """A structure type.

    group: number of the space group (first origin choice, hexagonal axes). ratio: c / a. roles: "ionic", in which X is
    the anion; else the group of elements for each letter: "metal", "late" or "tetrahedral".
    """

    name: str
    group: int
    sites: tuple[Site, ...]
    ratio: float = 1.0
    roles: str | dict[str, str] = "ionic"

    @property
    def ionic(self) -> bool:
        return self.roles == "ionic"

    @property
    def letters(self) -> list[str]:
        return sorted({site.role for site in self.sites})

    @cached_property
    def basis(self) -> np.ndarray:
        """(3, 3) row vectors of a primitive cell, in units of the conventional cell."""
        rotations, translations = _operations(self.group)
        centring = translations[(rotations == np.eye(3)).all((1, 2))]  # (n, 3)
        steps = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
        vectors = (centring[:, None] + steps).reshape(-1, 3)
        vectors = np.unique(vectors.round(9), axis=0)
        lengths = np.linalg.norm(vectors, axis=1)
        vectors = vectors[np.argsort(lengths, kind="stable")][1:]  # without zero
        for triple in itertools.combinations(vectors[:24], 3):
            if abs(np.linalg.det(triple) * len(centring) - 1) < 1e-6:
                return np.array(triple)
        raise AssertionError(f"{self.name}: no primitive cell")

    @cached_property
    def orbits(self) -> list[np.ndarray]:
        """For each site, indices of the symmetry operations that generate its atoms in a primitive cell, each once."""
        rotations, translations = _operations(self.group)
        inverse, orbits = np.linalg.inv(self.basis), []
        for site in self.sites:
            images = (rotations @ np.array(site.at) + translations) @ inverse
            distinct: list[int] = []
            for i, image in enumerate(images):
                apart = images[distinct] - image
                if not (abs(apart - apart.round()) < 1e-4).all(1).any():
                    distinct.append(i)
            orbits.append(np.array(distinct))
        return orbits

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of atoms of each role in a primitive cell."""
        counts: Counter[str] = Counter()
        for site, orbit in zip(self.sites, self.orbits, strict=True):
            counts[site.role] += len(orbit)
        return dict(counts)

    def build(self, jitter: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return a primitive cell (3, 3) with a = 1, and the fractional coordinates (n, 3) and roles of its atoms."""
        rotations, translations = _operations(self.group)
        ratio = self.ratio if self.ratio == 1 else self.ratio * jitter.normal(1, SCALE_DEVIATION)
        hexagonal = 143 <= self.group <= 194
        cell = self.basis @ cell_matrix(np.array([1, 1, ratio, 90, 90, 120 if hexagonal else 90]))
        coordinates, roles = [], []
        for site, orbit in zip(self.sites, self.orbits, strict=True):
            moved = np.array(site.at)
            for direction in site.free:
                moved = moved + jitter.normal(0, COORDINATE_DEVIATION) * np.array(direction)
            coordinates.append((rotations[orbit] @ moved + translations[orbit]) @ np.linalg.inv(self.basis))
            roles += [site.role] * len(orbit)
        return cell, wrap(np.concatenate(coordinates)), roles


X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
"""Directions of free coordinates."""
H, Q, T, F = 1 / 2, 1 / 4, 1 / 3, 5 / 8
"""Special coordinates."""
METALS_AB = {"A": "metal", "B": "metal"}

PROTOTYPES = (
    Prototype("rocksalt", 225, (Site("A", (0, 0, 0)), Site("X", (H, H, H)))),
    Prototype("CsCl", 221, (Site("A", (0, 0, 0)), Site("X", (H, H, H)))),
    Prototype("zincblende", 216, (Site("A", (0, 0, 0)), Site("X", (Q, Q, Q)))),
    Prototype("wurtzite", 186, (Site("A", (T, 2 * T, 0)), Site("X", (T, 2 * T, 0.375), (Z,))), 1.633),
    Prototype("NiAs", 194, (Site("A", (0, 0, 0)), Site("X", (T, 2 * T, Q))), 1.5),
    Prototype("fluorite", 225, (Site("A", (0, 0, 0)), Site("X", (Q, Q, Q)))),
    Prototype("antifluorite", 225, (Site("A", (Q, Q, Q)), Site("X", (0, 0, 0)))),
    Prototype("rutile", 136, (Site("A", (0, 0, 0)), Site("X", (0.305, 0.305, 0), ((1, 1, 0),))), 0.65),
    Prototype("CdI2", 164, (Site("A", (0, 0, 0)), Site("X", (T, 2 * T, 0.25), (Z,))), 1.6),
    Prototype("corundum", 167, (Site("A", (0, 0, 0.352), (Z,)), Site("X", (0.306, 0, 0.25), (X,))), 2.73),
    Prototype(
        "ilmenite", 148,
        (Site("A", (0, 0, 0.355), (Z,)), Site("B", (0, 0, 0.145), (Z,)), Site("X", (0.317, 0.023, 0.245), (X, Y, Z))),
        2.77,
    ),
    Prototype("perovskite", 221, (Site("A", (H, H, H)), Site("B", (0, 0, 0)), Site("X", (H, 0, 0)))),
    Prototype(
        "double perovskite", 225,
        (Site("A", (Q, Q, Q)), Site("B", (0, 0, 0)), Site("C", (H, H, H)), Site("X", (0.25, 0, 0), (X,))),
    ),
    Prototype("spinel", 227, (Site("A", (0, 0, 0)), Site("B", (F, F, F)), Site("X", (0.387,) * 3, ((1, 1, 1),)))),
    Prototype("NaFeO2", 166, (Site("A", (0, 0, H)), Site("B", (0, 0, 0)), Site("X", (0, 0, 0.26), (Z,))), 5.0),
    Prototype("delafossite", 166, (Site("A", (0, 0, 0)), Site("B", (0, 0, H)), Site("X", (0, 0, 0.11), (Z,))), 5.6),
    Prototype("chalcopyrite", 122, (Site("A", (0, 0, 0)), Site("B", (0, 0, H)), Site("X", (Q, Q, 1 / 8), (X,))), 2.0),
    Prototype(
        "K2NiF4", 139,
        (Site("A", (0, 0, 0.355), (Z,)), Site("B", (0, 0, 0)), Site("X", (0, H, 0)), Site("X", (0, 0, 0.155), (Z,))),
        3.2,
    ),
    Prototype("ReO3", 221, (Site("A", (0, 0, 0)), Site("X", (H, 0, 0)))),
    Prototype("cuprite", 224, (Site("A", (Q, Q, Q)), Site("X", (0, 0, 0)))),
    Prototype("pyrite-like", 205, (Site("A", (0, 0, 0)), Site("X", (0.37,) * 3, ((1, 1, 1),)))),
    Prototype("A1", 225, (Site("A", (0, 0, 0)),), roles={"A": "metal"}),
    Prototype("A2", 229, (Site("A", (0, 0, 0)),), roles={"A": "metal"}),
    Prototype("A3", 194, (Site("A", (T, 2 * T, Q)),), 1.61, {"A": "metal"}),
    Prototype("A4", 227, (Site("A", (0, 0, 0)),), roles={"A": "tetrahedral"}),
    Prototype("B2", 221, (Site("A", (0, 0, 0)), Site("B", (H, H, H))), roles=METALS_AB),
    Prototype("L1_0", 123, (Site("A", (0, 0, 0)), Site("B", (H, H, H))), 1.37, METALS_AB),
    Prototype("L1_2", 221, (Site("A", (0, 0, 0)), Site("B", (0, H, H))), roles=METALS_AB),
    Prototype("D0_3", 225, (Site("A", (0, 0, 0)), Site("B", (H, H, H)), Site("B", (Q, Q, Q))), roles=METALS_AB),
    Prototype("A15", 223, (Site("A", (0, 0, 0)), Site("B", (Q, 0, H))), roles=METALS_AB),
    Prototype("C15", 227, (Site("A", (0, 0, 0)), Site("B", (F, F, F))), roles=METALS_AB),
    Prototype("AlB2", 191, (Site("A", (0, 0, 0)), Site("B", (T, 2 * T, H))), 1.08, METALS_AB),
    Prototype(
        "half Heusler", 216, (Site("A", (Q, Q, Q)), Site("B", (0, 0, 0)), Site("C", (H, H, H))),
        roles={"A": "metal", "B": "metal", "C": "late"},
    ),
    Prototype(
        "full Heusler", 225, (Site("A", (Q, Q, Q)), Site("B", (0, 0, 0)), Site("C", (H, H, H))),
        roles={"A": "metal", "B": "metal", "C": "late"},
    ),
    Prototype(
        "inverse Heusler", 216,
        (Site("A", (0, 0, 0)), Site("A", (Q, Q, Q)), Site("B", (H, H, H)), Site("C", (3 * Q, 3 * Q, 3 * Q))),
        roles={"A": "metal", "B": "metal", "C": "late"},
    ),
    Prototype(
        "ThCr2Si2", 139, (Site("A", (0, 0, 0)), Site("B", (0, H, Q)), Site("C", (0, 0, 0.37), (Z,))), 2.5,
        {"A": "metal", "B": "metal", "C": "late"},
    ),
)  # fmt: skip


@cache
def _operations(group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rotations (n, 3, 3) and translations (n, 3) of a space group in a fixed order.

    pymatgen returns a set, and recomputes it in every call.
    """
    from pymatgen.symmetry.groups import SpaceGroup

    affine = [operation.affine_matrix for operation in SpaceGroup.from_int_number(group).symmetry_ops]
    matrices = np.array(sorted((matrix.round(9) + 0.0).tolist() for matrix in affine))
    return matrices[:, :3, :3], matrices[:, :3, 3]


# ---- elements on sites ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filling:
    """A prototype (index in PROTOTYPES) with the atomic number of each role, and the charge of each if it is ionic."""

    prototype: int
    elements: dict[str, int]
    charges: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """A key that is equal for the same formula in the same prototype."""
        counts: Counter[int] = Counter()
        for role, count in PROTOTYPES[self.prototype].counts.items():
            counts[self.elements[role]] += count
        least = gcd(*counts.values())
        return self.prototype, tuple(sorted((z, count // least) for z, count in counts.items()))


@cache
def _cations() -> dict[int, dict[int, float]]:
    """Return charge -> atomic number -> crystal radius in Angstrom."""
    from pymatgen.core import Element

    radii: dict[int, dict[int, float]] = {}
    for z in (z for z in ELEMENTS if z not in NEVER_CATIONS):
        element = Element.from_Z(z)
        for charge in element.common_oxidation_states:
            radius = element.ionic_radii.get(charge) or element.average_cationic_radius
            if 0 < charge <= 6 and radius:
                radii.setdefault(int(charge), {})[z] = float(radius)
    return radii


@cache
def _metallic_radius(z: int) -> float:
    from pymatgen.core import Element

    element = Element.from_Z(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metalloids without a value
        radius = float(element.metallic_radius or np.nan)
    return radius if np.isfinite(radius) else float(element.atomic_radius or np.nan)


@cache
def _elements(kind: str) -> tuple[int, ...]:
    members = {"late": LATE, "tetrahedral": (6, 14, 32, 50)}.get(kind) or [z for z in ELEMENTS if z not in NOT_METALS]
    return tuple(z for z in members if np.isfinite(_metallic_radius(z)))


@cache
def _balances(prototype: int) -> list[dict[str, int]]:
    """Return the assignments of charges to roles that sum to zero. In pyrite a pair of anions shares the charge."""
    counts = PROTOTYPES[prototype].counts
    cations = [role for role in counts if role != "X"]
    paired = PROTOTYPES[prototype].name == "pyrite-like"
    balances = []
    for anion in (2,) if paired else ANIONS:
        for charges in itertools.product(sorted(_cations()), repeat=len(cations)):
            total = sum(charge * counts[role] for charge, role in zip(charges, cations, strict=True))
            if total * (2 if paired else 1) == anion * counts["X"]:
                balances.append({**dict(zip(cations, charges, strict=True)), "X": anion})
    assert balances, PROTOTYPES[prototype].name
    return balances


def draw(seed: int, index: int) -> Filling:
    """Return candidate `index`: a uniformly drawn prototype with different, uniformly drawn elements for its roles."""
    rng = np.random.default_rng([seed, index, 0])
    number = int(rng.integers(len(PROTOTYPES)))
    prototype = PROTOTYPES[number]
    while True:
        charges: dict[str, int] = {}
        if isinstance(prototype.roles, str):
            balances = _balances(number)
            charges = balances[int(rng.integers(len(balances)))]
            choices = {r: list(ANIONS[q] if r == "X" else _cations()[q]) for r, q in charges.items()}
        else:
            choices = {role: list(_elements(kind)) for role, kind in prototype.roles.items()}
        elements = {role: options[int(rng.integers(len(options)))] for role, options in choices.items()}
        if len(set(elements.values())) == len(elements):
            return Filling(number, elements, charges)


# ---- geometry ------------------------------------------------------------------------------------------------------


def build(seed: int, index: int) -> System | None:
    """Return the crystal of candidate `index`; None if its atoms do not fit together."""
    from pymatgen.core import Element

    filling, rng = draw(seed, index), np.random.default_rng([seed, index, 1])
    prototype = PROTOTYPES[filling.prototype]
    if prototype.ionic:
        radii = {
            role: ANIONS[charge][filling.elements[role]] if role == "X" else _cations()[charge][filling.elements[role]]
            for role, charge in filling.charges.items()
        }
        if "perovskite" in prototype.name and not _tolerated(radii):
            return None
    else:
        radii = {role: _metallic_radius(z) for role, z in filling.elements.items()}
    cell, coordinates, roles = prototype.build(rng)
    distances = distances_of(cell, coordinates)
    touching = [
        (radii[a] + radii[b]) / distances[i, j]
        for i, a in enumerate(roles)
        for j, b in enumerate(roles[: i + 1])
        if not prototype.ionic or (a == "X") != (b == "X")
    ]
    cell = cell * max(touching) * rng.normal(1, SCALE_DEVIATION)
    lattice, coordinates = niggli(cell, coordinates)
    matrix = cell_matrix(lattice)
    distances = distances_of(matrix, coordinates)
    image_distance = distances.diagonal().min()
    if len(coordinates) > MAX_ATOMS or distances.min() < NEAREST or image_distance < SHORTEST:
        return None
    types = np.array([filling.elements[role] for role in roles])
    order = in_order(types)
    least = gcd(*prototype.counts.values())
    amounts = {role: count // least for role, count in prototype.counts.items()}
    formula = "".join(
        f"{Element.from_Z(filling.elements[role]).symbol}{amounts[role] if amounts[role] > 1 else ''}"
        for role in prototype.letters
    )
    columns = {
        "prototype": float(filling.prototype), "spacegroup": float(prototype.group),
        "volume": float(abs(np.linalg.det(matrix)) / len(types)),
    }  # fmt: skip
    return System(types[order], coordinates[order], lattice, f"{prototype.name} {formula}", columns)


def _tolerated(radii: dict[str, float]) -> bool:
    b = np.mean([radii[role] for role in radii if role in "BC"])
    factor = (radii["A"] + radii["X"]) / (np.sqrt(2) * (b + radii["X"]))
    return bool(TOLERANCE_FACTOR[0] <= factor <= TOLERANCE_FACTOR[1])


# ---- the set -------------------------------------------------------------------------------------------------------


def make(
    num: int = NUM, seed: int = 0, workers: int = 1, progress: ProgressCallback | None = None, most: int = MAX_ATOMS
) -> Systems:  # fmt: skip
    """Generate `num` crystals of at most `most` atoms, none with the same formula and prototype as another.

    The set is the same for any number of workers; it depends on the radii and oxidation states in the installed
    pymatgen. Columns: `prototype`, index in PROTOTYPES; `spacegroup`; `volume` per atom in cubic Angstrom. ValueError
    if the prototypes do not yield that many.
    """
    require()
    crystals: list[System] = []
    with _mapping(workers) as mapping:
        fresh = _fresh(seed, 60 * num + 10_000)
        while len(crystals) < num:
            wanted = max(CHUNK * workers, (num - len(crystals)) // 2)
            chunk = list(itertools.islice(fresh, min(wanted, 16 * CHUNK * workers)))
            if not chunk:
                raise ValueError(
                    f"num: {num:,} crystals, but the prototypes gave only {len(crystals):,}; ask for fewer"
                )
            before = len(crystals)
            built = (system for system in mapping(seed, chunk) if system is not None)
            crystals = [*crystals, *(system for system in built if len(system.types) <= most)][:num]
            if progress is not None:
                progress("crystals", len(crystals) - before, num)
    return Systems.of(crystals)


def _fresh(seed: int, candidates: int) -> Iterator[int]:
    """Yield the candidates whose formula and prototype did not occur before."""
    seen = set()
    for index in range(candidates):
        key = draw(seed, index).key
        if key not in seen:
            seen.add(key)
            yield index


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[[int, Sequence[int]], list[System | None]]]:
    """Return a function that applies `build` to candidates, in order, on several processes."""
    if workers <= 1:
        yield lambda seed, chunk: [build(seed, index) for index in chunk]
        return
    with ProcessPoolExecutor(workers) as pool:
        yield lambda seed, chunk: list(pool.map(build, itertools.repeat(seed), chunk, chunksize=CHUNK // 4))
