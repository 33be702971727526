"""QM9-like molecules without a download: random molecular graphs of C, N, O and F, with geometry by RDKit.

A draw is a random graph of at most nine heavy atoms with exact valences, rejected if it has a group that QM9 lacks. It
then gets hydrogens, coordinates (ETKDGv3) and relaxation (MMFF94s), and is rejected if that does not converge or if
EDM's distance tables or RDKit's perception of bonds find another molecule. A draw depends on the seed and its number
only, so that any number of processes generates the same set. Geometries are those of a force field, not of DFT: the set
resembles QM9 and does not replace it.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...maths.streams import seed_of
from .._atoms.files import ProgressCallback
from .._atoms.reading import systems_cache, write_to_cache
from .._atoms.systems import System, Systems
from . import chemistry
from .chemistry import rdkit

NUM = 20_000
"""Default number of molecules."""
VERSION = 2
"""Version of what is stored of a molecule."""
RULES = 2
"""Version of the rules below; another version generates other molecules."""
DRAWS = 64
"""Draws per chunk: the unit of work of a process, and the most that an interruption loses."""
PATIENCE = 50
"""Consecutive chunks without a new molecule after which generation stops."""

HEAVY = {3: 0.0005, 4: 0.001, 5: 0.002, 6: 0.005, 7: 0.024, 8: 0.136, 9: 0.8315}
"""Number of heavy atoms -> probability, about as in QM9."""
ELEMENTS = {"C": 0.64, "N": 0.14, "O": 0.22, "F": 0.003}
"""Element -> relative frequency."""
FREE = {"C": 4, "N": 3, "O": 2, "F": 1}
"""Element -> valence."""
RINGS = {0: 0.08, 1: 0.24, 2: 0.32, 3: 0.25, 4: 0.11}
"""Number of attempts to close a ring -> probability."""
RING_SIZES = {3: 1.0, 4: 0.8, 5: 1.6, 6: 1.0}
"""Ring size -> relative frequency."""
MULTIPLE = {0: 0.11, 1: 0.23, 2: 0.30, 3: 0.23, 4: 0.13}
"""Number of times that the order of a bond is raised by one -> probability."""
RAISED = {"C": 1.0, "N": 1.6, "O": 3.0, "F": 1.0}
"""Element -> relative frequency of its bonds among those raised; factors of both atoms multiply."""

EXCLUDED = (
    "[O;!$(O=*)]~[O,F]", "[N;!a]~[N;!a]", "[N]-[F]", "[NX3]-[OX2]-[NX3]", "[F]-C-[F]",  # bonds that QM9 hardly has
    "[CX2](=*)=*", "[NX2]=[O]", "[#6]=[#6]-[OX2H]", "[#6]=[#6]-[NX3;H1,H2]", "[NX2]=C-[OX2H]",  # cumulenes, enols, ...
    "[CX4]([OX2H])[OX2H]", "[CX4]([OX2H])[NX3;H1,H2]", "[CX4]([NX3;H2])[NX3;H2]", "[CX4]([F])[OX2H]",  # gem-diols, ...
    "[CX2;R]#*", "[CX4]([OX2])([OX2])[OX2]", "[OX2]-[NX3]-[OX2]", "[CX3H1](=O)[CX3H1]=O",
    "[r3]=[r3]", "[r3;X3](=[!r3])[r3]", "[x3;^2;!a]", "[r4]1=[r4]~[r4]=[r4]1", "[a;r3,r4]",  # strained rings
)  # fmt: skip
"""SMARTS of groups that no molecule of the set has."""
SHORTEST, LONGEST = 0.85, 1.75
"""Limits of the length of a bond in Angstrom."""
CONTACT = 1.30
"""Smallest distance in Angstrom between atoms without a bond."""
MOST_ENERGY = 22.0
"""Largest MMFF94s energy in kcal/mol per atom."""


# ---- graphs ----------------------------------------------------------------------------------------------------------


def graph(draw: random.Random, sizes: dict[int, float] = HEAVY) -> str | None:
    """Return canonical SMILES, without stereochemistry, of a random molecule; None if it is rejected.

    sizes: number of heavy atoms -> relative frequency.
    """
    heavy = _choose(draw, sizes)
    symbols = [_choose(draw, ELEMENTS) for _ in range(heavy)]
    symbols.sort(key=lambda symbol: -FREE[symbol] + draw.random())
    free = [FREE[symbol] for symbol in symbols]
    bonds: dict[tuple[int, int], int] = {}
    for new in range(1, heavy):
        open_ends = [old for old in range(new) if free[old]]
        if not open_ends:
            return None
        old = draw.choices(open_ends, [free[old] for old in open_ends])[0]
        bonds[old, new] = 1
        free[old] -= 1
        free[new] -= 1
    for _ in range(_choose(draw, RINGS)):
        _close_ring(draw, free, bonds)
    for _ in range(_choose(draw, MULTIPLE)):
        candidates = [pair for pair, order in bonds.items() if order < 3 and free[pair[0]] and free[pair[1]]]
        if not candidates:
            break
        weights = [RAISED[symbols[a]] * RAISED[symbols[b]] for a, b in candidates]
        a, b = draw.choices(candidates, weights)[0]
        bonds[a, b] += 1
        free[a] -= 1
        free[b] -= 1
    return _smiles(symbols, bonds)


def _choose(draw: random.Random, weights: dict[Any, float]) -> Any:
    return draw.choices(list(weights), list(weights.values()))[0]


def _close_ring(draw: random.Random, free: list[int], bonds: dict[tuple[int, int], int]) -> None:
    """Add a bond between two atoms with free valences if one closes a ring of a size in RING_SIZES."""
    distances = _distances(len(free), bonds)
    pairs, weights = [], []
    for a in range(len(free)):
        for b in range(a + 1, len(free)):
            size = distances[a][b] + 1
            if free[a] and free[b] and (a, b) not in bonds and size in RING_SIZES:
                pairs.append((a, b))
                weights.append(RING_SIZES[size])
    if pairs:
        a, b = draw.choices(pairs, weights)[0]
        bonds[a, b] = 1
        free[a] -= 1
        free[b] -= 1


def _distances(count: int, bonds: dict[tuple[int, int], int]) -> list[list[int]]:
    """Return the number of bonds on the shortest path between any two atoms of a connected graph."""
    from scipy.sparse.csgraph import shortest_path

    adjacency = np.zeros((count, count))
    adjacency[tuple(np.array(list(bonds)).T)] = 1
    return shortest_path(adjacency, directed=False, unweighted=True).astype(int).tolist()


@cache
def _excluded() -> list[Any]:
    patterns = [rdkit().Chem.MolFromSmarts(smarts) for smarts in EXCLUDED]
    assert all(pattern is not None for pattern in patterns)
    return patterns


def _smiles(symbols: list[str], bonds: dict[tuple[int, int], int]) -> str | None:
    mol = chemistry.from_graph(symbols, ((a, b, order) for (a, b), order in bonds.items()))
    if mol is None or any(mol.HasSubstructMatch(pattern) for pattern in _excluded()):
        return None
    return rdkit().Chem.MolToSmiles(mol, isomericSmiles=False)


# ---- geometry --------------------------------------------------------------------------------------------------------


def geometry(smiles: str) -> System | None:
    """Return the molecule with 3D coordinates, heavy atoms first in the order of its SMILES; None if it is rejected.

    Columns: `logp` (Crippen), `tpsa` (polar surface area, square Angstrom), `energy` (MMFF94s, kcal/mol).
    """
    kit = rdkit()
    parsed = kit.Chem.MolFromSmiles(smiles)
    if parsed is None:
        return None
    mol = kit.Chem.AddHs(parsed)
    settings = kit.Embed.ETKDGv3()
    settings.randomSeed = zlib.crc32(smiles.encode()) & 0x7FFFFFFF
    settings.maxIterations = 20
    if kit.Embed.EmbedMolecule(mol, settings) != 0:
        return None
    properties = kit.Force.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94s")
    field = properties and kit.Force.MMFFGetMoleculeForceField(mol, properties)
    if not field:
        return None
    field.Initialize()
    if field.Minimize(maxIts=1000) != 0 or field.CalcEnergy() > MOST_ENERGY * mol.GetNumAtoms():
        return None
    types = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
    positions = mol.GetConformer().GetPositions()
    positions = (positions - positions.mean(0)).astype(np.float32)
    if not is_sound(smiles, mol, types, positions):
        return None
    columns = {
        "logp": chemistry.logp(mol),
        "tpsa": chemistry.tpsa(mol),
        "energy": field.CalcEnergy(),
    }
    return System(types, positions, None, smiles, columns)


def is_sound(smiles: str, mol: Any, types: np.ndarray, positions: np.ndarray) -> bool:
    """Return whether a geometry is one of its molecule, to the checks of this file."""
    return _usual_distances(mol, positions) and _recognised(smiles, types, positions)


def _usual_distances(mol: Any, positions: np.ndarray) -> bool:
    """Return whether the lengths of bonds and contacts are within the limits above."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonded = rdkit().Chem.GetAdjacencyMatrix(mol).astype(bool)
    apart = ~bonded & ~np.eye(len(positions), dtype=bool)
    bonds, contacts = distances[bonded], distances[apart]
    return bool(bonds.min() >= SHORTEST and bonds.max() <= LONGEST and contacts.min(initial=9.0) >= CONTACT)


def _recognised(smiles: str, types: np.ndarray, positions: np.ndarray) -> bool:
    """Return whether EDM's tables find every atom stable, and RDKit finds the same graph from positions only."""
    batch = torch.from_numpy(types.astype(np.int64))[None], torch.from_numpy(positions)[None]
    if not bool(chemistry.stability(*batch).molecules):
        return False
    mol = chemistry.perceive(types, positions)
    return mol is not None and chemistry.plain_smiles(mol) == smiles


# ---- the set ---------------------------------------------------------------------------------------------------------


def draws(seed: int, chunk: int) -> list[System]:
    """Return the distinct molecules of a chunk of draws."""
    geometries: dict[str, System | None] = {}
    with rdkit().quiet():
        for number in range(chunk * DRAWS, (chunk + 1) * DRAWS):
            smiles = graph(random.Random(seed_of("made", RULES, seed, number)))
            if smiles is not None and smiles not in geometries:
                geometries[smiles] = geometry(smiles)
    return [system for system in geometries.values() if system is not None]


PART = re.compile(r"\d{6}\.npz(\.tmp-\d+)?")
"""Names of files of unfinished sets."""


def make(num: int = NUM, seed: int = 0, workers: int = 1, progress: ProgressCallback | None = None) -> Systems:
    """Generate `num` distinct molecules, named by their SMILES.

    An interrupted call resumes at the next one: finished chunks stay in the cache until the set is complete.
    """
    parts = systems_cache() / f"{cache_name(seed)}.parts"
    systems = compose(num, seed, workers, progress, parts)
    with suppress(OSError):
        for path in parts.iterdir():
            if PART.fullmatch(path.name):
                path.unlink()
        parts.rmdir()
    return systems


def cache_name(seed: int) -> str:
    """Return the name of the set in the cache."""
    return f"qm9-like-{VERSION}-{RULES}-rdkit-{rdkit().version}-{seed}"


def compose(
    num: int, seed: int = 0, workers: int = 1, progress: ProgressCallback | None = None, parts: Path | None = None
) -> Systems:
    """Return the first `num` distinct molecules. ValueError if the draws do not yield that many.

    parts: a folder from which finished chunks are read and to which new ones are written. It serves one seed, version
    and RDKit.
    """
    molecules: dict[str, System] = {}
    fruitless = 0
    for systems in _chunks(seed, workers, parts):
        before = len(molecules)
        for system in systems:
            if len(molecules) < num:
                molecules.setdefault(system.name, system)
        if progress is not None:
            progress("molecules", len(molecules) - before, num)
        if len(molecules) == num:
            break
        fruitless = 0 if len(molecules) > before else fruitless + 1
        if fruitless == PATIENCE:
            raise ValueError(f"num: {num:,} molecules, but the graphs gave only {len(molecules):,}; ask for fewer")
    return Systems.of(list(molecules.values()))


def _chunks(seed: int, workers: int, parts: Path | None) -> Iterator[list[System]]:
    """Yield the chunks in order, without end."""

    def stored(chunk: int) -> list[System] | None:
        if parts is not None:
            with suppress(ValueError):  # missing, damaged, or removed by a process that has finished
                return list(Systems.load(parts / f"{chunk:06d}.npz"))
        return None

    def store(chunk: int, systems: list[System]) -> list[System]:
        if parts is not None:
            write_to_cache(parts, lambda folder: Systems.of(systems).save(folder / f"{chunk:06d}.npz"))
        return systems

    if workers <= 1:
        chunk = 0
        while True:
            known = stored(chunk)
            yield known if known is not None else store(chunk, draws(seed, chunk))
            chunk += 1
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: dict[int, list[System] | Future[list[System]]] = {}
        chunk = submitted = 0
        try:
            while True:
                while submitted < chunk + 2 * workers:
                    known = stored(submitted)
                    ahead[submitted] = known if known is not None else pool.submit(draws, seed, submitted)
                    submitted += 1
                result = ahead.pop(chunk)
                yield store(chunk, result.result()) if isinstance(result, Future) else result
                chunk += 1
        finally:
            pool.shutdown(cancel_futures=True)
