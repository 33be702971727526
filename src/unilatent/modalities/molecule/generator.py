"""QM9-like molecules without a download: random graphs of C, N, O, F that chemistry allows, with geometry by RDKit.

A draw is a number: a random valence-exact graph of at most nine heavy atoms, refused where it holds a group that QM9
does not; then hydrogens, coordinates (ETKDGv3) and relaxation (MMFF94s), refused where the force field, the distance
tables of EDM or RDKit's perception of bonds see another molecule. It is a function of the seed and its number alone:
one process or many make the same set. The geometry is a force field's and not DFT's: the set is QM9-like, never QM9.
"""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...atoms.files import Progress
from ...atoms.reading import keep, shelf
from ...atoms.systems import System, Systems
from ...maths.streams import seed_of
from . import chemistry
from .chemistry import rdkit

NUM = 20_000
"""Molecules of the set that is made where nobody says how many."""
VERSION = 2
"""Of what is kept of a molecule."""
RULES = 2
"""Version of the rules below: another one makes other molecules."""
DRAWS = 64
"""Draws of a piece: what a process makes at a time, and what an interruption loses."""
PATIENCE = 50
"""Pieces in a row that bring nothing new before there are no more."""

HEAVY = {3: 0.0005, 4: 0.001, 5: 0.002, 6: 0.005, 7: 0.024, 8: 0.136, 9: 0.8315}
"""Heavy atoms of a molecule, about as often as in QM9."""
ELEMENTS = {"C": 0.64, "N": 0.14, "O": 0.22, "F": 0.003}
FREE = {"C": 4, "N": 3, "O": 2, "F": 1}
RINGS = {0: 0.08, 1: 0.24, 2: 0.32, 3: 0.25, 4: 0.11}
"""Rings that are tried to be closed."""
RING_SIZES = {3: 1.0, 4: 0.8, 5: 1.6, 6: 1.0}
MULTIPLE = {0: 0.11, 1: 0.23, 2: 0.30, 3: 0.23, 4: 0.13}
"""Times that some bond's order is raised by one."""
RAISED = {"C": 1.0, "N": 1.6, "O": 3.0, "F": 1.0}
"""How often that is a bond to such an atom."""

EXCLUDED = (
    "[O;!$(O=*)]~[O,F]", "[N;!a]~[N;!a]", "[N]-[F]", "[NX3]-[OX2]-[NX3]", "[F]-C-[F]",  # bonds that QM9 hardly has
    "[CX2](=*)=*", "[NX2]=[O]", "[#6]=[#6]-[OX2H]", "[#6]=[#6]-[NX3;H1,H2]", "[NX2]=C-[OX2H]",  # cumulenes, enols, ...
    "[CX4]([OX2H])[OX2H]", "[CX4]([OX2H])[NX3;H1,H2]", "[CX4]([NX3;H2])[NX3;H2]", "[CX4]([F])[OX2H]",  # gem-diols, ...
    "[CX2;R]#*", "[CX4]([OX2])([OX2])[OX2]", "[OX2]-[NX3]-[OX2]", "[CX3H1](=O)[CX3H1]=O",
    "[r3]=[r3]", "[r3;X3](=[!r3])[r3]", "[x3;^2;!a]", "[r4]1=[r4]~[r4]=[r4]1", "[a;r3,r4]",  # strained rings
)  # fmt: skip
"""SMARTS of groups that a draw is refused for."""
SHORTEST, LONGEST = 0.85, 1.75
"""Angstrom of a bond."""
CONTACT = 1.30
"""Angstrom between atoms that are not bonded."""
MOST_ENERGY = 22.0
"""kcal/mol an atom."""


# ---- graphs ----------------------------------------------------------------------------------------------------------


def graph(draw: random.Random) -> str | None:
    """Canonical SMILES, without stereochemistry, of a random molecule; None where it is refused."""
    heavy = _choose(draw, HEAVY)
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
    """One more bond between two atoms with free valences, where it closes a ring of a usual size."""
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
    """Bonds between any two atoms."""
    neighbours: list[list[int]] = [[] for _ in range(count)]
    for a, b in bonds:
        neighbours[a].append(b)
        neighbours[b].append(a)
    found = []
    for start in range(count):
        reached = {start: 0}
        edge = [start]
        while edge:
            following = []
            for at in edge:
                for other in neighbours[at]:
                    if other not in reached:
                        reached[other] = reached[at] + 1
                        following.append(other)
            edge = following
        found.append([reached[other] for other in range(count)])
    return found


@cache
def _excluded() -> list[Any]:
    patterns = [rdkit().Chem.MolFromSmarts(smarts) for smarts in EXCLUDED]
    assert all(pattern is not None for pattern in patterns)
    return patterns


def _smiles(symbols: list[str], bonds: dict[tuple[int, int], int]) -> str | None:
    Chem = rdkit().Chem
    kinds = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for symbol in symbols:
        mol.AddAtom(Chem.Atom(symbol))
    for (a, b), order in bonds.items():
        mol.AddBond(a, b, kinds[order])
    if Chem.SanitizeMol(mol, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return None
    if any(mol.HasSubstructMatch(pattern) for pattern in _excluded()):
        return None
    return Chem.MolToSmiles(mol, isomericSmiles=False)


# ---- geometry --------------------------------------------------------------------------------------------------------


def geometry(smiles: str) -> System | None:
    """The molecule in space, heavy atoms first in the order of its SMILES, with Crippen's logP, its polar surface
    (TPSA, square Angstrom) and MMFF94s energy (kcal/mol) as columns; None where it is refused."""
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
    if not _sound(mol, positions) or not _seen_again(smiles, types, positions):
        return None
    columns = {
        "logp": kit.Descriptors.CalcCrippenDescriptors(mol)[0],
        "tpsa": kit.Descriptors.CalcTPSA(mol),
        "energy": field.CalcEnergy(),
    }
    return System(types, positions, None, smiles, columns)


def _sound(mol: Any, positions: np.ndarray) -> bool:
    """Whether bonds and contacts have usual lengths."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonded = rdkit().Chem.GetAdjacencyMatrix(mol).astype(bool)
    apart = ~bonded & ~np.eye(len(positions), dtype=bool)
    bonds, contacts = distances[bonded], distances[apart]
    return bool(bonds.min() >= SHORTEST and bonds.max() <= LONGEST and contacts.min(initial=9.0) >= CONTACT)


def _seen_again(smiles: str, types: np.ndarray, positions: np.ndarray) -> bool:
    """Whether EDM's tables find every atom stable, and RDKit finds the same graph in the atoms alone."""
    batch = torch.from_numpy(types.astype(np.int64))[None], torch.from_numpy(positions)[None]
    if not bool(chemistry.stability(*batch).molecules):
        return False
    mol = chemistry.perceive(types, positions)
    return mol is not None and chemistry.plain_smiles(mol) == smiles


# ---- the set ---------------------------------------------------------------------------------------------------------


def draws(seed: int, piece: int) -> list[System]:
    """What a piece's draws give, each molecule once."""
    found: dict[str, System | None] = {}
    with rdkit().quiet():
        for number in range(piece * DRAWS, (piece + 1) * DRAWS):
            smiles = graph(random.Random(seed_of("made", RULES, seed, number)))
            if smiles is not None and smiles not in found:
                found[smiles] = geometry(smiles)
    return [system for system in found.values() if system is not None]


def make(num: int = NUM, seed: int = 0, workers: int = 1, progress: Progress | None = None) -> Systems:
    """`num` distinct molecules, named by their SMILES. An interrupted call goes on where it was: finished pieces are
    kept in the cache until all are there."""
    parts = shelf() / f"{name_of(seed)}.parts"
    systems = compose(num, seed, workers, progress, parts)
    shutil.rmtree(parts, ignore_errors=True)
    return systems


def name_of(seed: int) -> str:
    """Of the set in the cache."""
    return f"qm9-like-{VERSION}-{RULES}-rdkit-{rdkit().version}-{seed}"


def compose(
    num: int, seed: int = 0, workers: int = 1, progress: Progress | None = None, parts: Path | None = None
) -> Systems:
    """The first `num` distinct molecules of the pieces. parts: a folder that finished pieces are kept in and taken
    from; another seed, version or RDKit needs another one. ValueError when the graphs do not have that many."""
    found: dict[str, System] = {}
    fruitless = 0
    for systems in _pieces(seed, workers, parts):
        before = len(found)
        for system in systems:
            if len(found) < num:
                found.setdefault(system.name, system)
        if progress is not None:
            progress("molecules", len(found) - before, num)
        if len(found) == num:
            break
        fruitless = 0 if len(found) > before else fruitless + 1
        if fruitless == PATIENCE:
            raise ValueError(f"num: {num:,} molecules, but the graphs gave only {len(found):,}; ask for fewer")
    return Systems.of(list(found.values()))


def _pieces(seed: int, workers: int, parts: Path | None) -> Iterator[list[System]]:
    """Pieces in order, without end."""

    def stored(piece: int) -> list[System] | None:
        if parts is not None:
            with suppress(ValueError):  # not there, damaged, or taken away by a process that has finished
                return list(Systems.load(parts / f"{piece:06d}.npz"))
        return None

    def store(piece: int, made: list[System]) -> list[System]:
        if parts is not None:
            keep(parts, lambda folder: Systems.of(made).save(folder / f"{piece:06d}.npz"))
        return made

    if workers <= 1:
        piece = 0
        while True:
            known = stored(piece)
            yield known if known is not None else store(piece, draws(seed, piece))
            piece += 1
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: dict[int, list[System] | Future[list[System]]] = {}
        piece = asked = 0
        try:
            while True:
                while asked < piece + 2 * workers:
                    known = stored(asked)
                    ahead[asked] = known if known is not None else pool.submit(draws, seed, asked)
                    asked += 1
                found = ahead.pop(piece)
                yield store(piece, found.result()) if isinstance(found, Future) else found
                piece += 1
        finally:
            pool.shutdown(cancel_futures=True)
