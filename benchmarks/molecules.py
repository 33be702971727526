"""Speed of generating the QM9-like set and of each evaluation protocol.

python benchmarks/molecules.py                          1,000 generated; 10,000 evaluated, with and without noise
python benchmarks/molecules.py --noise [--made 2000]    instead: results of each protocol with noise, the docs' table
python benchmarks/molecules.py --nitrates 8             instead: so many molecules of 2, 3, ... 7 nitrate groups, whose
                                                        searches for bonds are long
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from unilatent.modalities._atoms.files import CORES
from unilatent.modalities._atoms.systems import Systems
from unilatent.modalities.molecule import chemistry, generator
from unilatent.modalities.molecule.metrics import MoleculeValidity, spaces, with_noise
from unilatent.records import MemoryRows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=int, help="molecules to generate [default: 1,000; 200 with --noise]")
    parser.add_argument("--judged", type=int, default=10_000, help="molecules to evaluate [default: 10,000]")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--nitrates", type=int)
    parser.add_argument("--draws", type=int, default=5, help="draws of noise per molecule [default: 5]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.nitrates:
        nitrates(options.nitrates)
        return
    if options.noise:
        noise(padded(generator.compose(options.made or 200)), options.draws)
        return

    before = time.perf_counter(), time.process_time()
    systems = generator.compose(options.made or 1000)
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    print(f"generated {len(systems):,} in {wall:.1f} s, {cpu:.1f} CPU s: {60 * len(systems) / cpu:,.0f} per CPU minute")

    real = padded(systems)
    kinds = {"real": real, "0.05 A": with_noise(real, 0.05), "1 A": with_noise(real, 1.0)}
    print("CPU seconds for 10,000 molecules, one core")
    for space in spaces():
        if space.name in ("posebusters", "match"):
            continue
        try:
            space.prepare(torch.device("cpu"))
        except ValueError as error:
            print(f"{space.name}: {error}")
            continue
        spent = {}
        for kind, data in kinds.items():
            start, judged = time.process_time(), 0
            while judged < options.judged:
                for rows in torch.arange(len(systems)).split(64):
                    space({name: value[rows] for name, value in data.items()})
                    judged += len(rows)
            spent[kind] = (time.process_time() - start) * 10_000 / judged
        print(f"{space.name:<10}", ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items()))


def nitrates(copies: int) -> None:
    """Print wall-clock seconds to perceive molecules with 2 to 7 nitrate groups, and how many were given up."""
    kit = chemistry.rdkit()
    for groups in range(2, 8):
        mol = kit.Chem.MolFromSmiles("O=[N+]([O-])OC" + "C(O[N+](=O)[O-])" * (groups - 2) + "CO[N+](=O)[O-]")
        mol = kit.Chem.AddHs(mol)
        assert kit.Embed.EmbedMolecule(mol, randomSeed=1) == 0
        kit.Force.MMFFOptimizeMolecule(mol)
        types, places = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]), mol.GetConformer().GetPositions()
        start, more = time.perf_counter(), list[int]()
        found = chemistry.perceptions([(types, places + copy) for copy in range(copies)], more.append)
        given_up = sum(one.judged == chemistry.GAVE_UP for one in found)
        print(f"{copies} of {groups} nitrate groups: {time.perf_counter() - start:.1f} s on {CORES} cores, "
              f"{sum(more)} long searches, {given_up} given up", flush=True)  # fmt: skip


def padded(systems: Systems) -> dict[str, torch.Tensor]:
    types = torch.zeros(len(systems), 29, dtype=torch.int64)
    positions = torch.zeros(len(systems), 29, 3)
    for i in range(len(systems)):
        system = systems[i]
        types[i, : len(system.types)] = torch.from_numpy(system.types.astype("int64"))
        positions[i, : len(system.types)] = torch.from_numpy(system.coordinates)
    return {"types": types, "positions": positions}


COLUMNS = (
    ("openbabel", "valid", "Open Babel valid"), ("openbabel", "valid_connected", "in one piece"),
    ("edm", "atom_stable", "EDM atoms"), ("edm", "mol_stable", "EDM molecules"), ("edm", "valid", "EDM valid"),
    ("rdkit", "valid", "RDKit valid"), ("rdkit", "valid_connected", "in one piece"),
)  # fmt: skip


def noise(real: dict[str, torch.Tensor], draws: int) -> None:
    """Print percentages by each protocol for molecules with Gaussian noise of sigma Angstrom, as a table.

    Each molecule gets `draws` draws of noise. Columns of packages that are not installed are left out.
    """
    views = {}
    for space in spaces():
        if space.name in {name for name, *_ in COLUMNS}:
            try:
                space.prepare(torch.device("cpu"))
                views[space.name] = space
            except ValueError as error:
                print(f"{space.name}: {error}")
    shown = [column for column in COLUMNS if column[0] in views]
    print(f"| sigma | {' | '.join(title for *_, title in shown)} |\n| --- |{' --- |' * len(shown)}")
    for sigma in (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1):
        moved = with_noise({name: value.repeat(draws, *[1] * (value.ndim - 1)) for name, value in real.items()}, sigma)
        rows = {name: MemoryRows(space(moved)) for name, space in views.items()}
        shares = [MoleculeValidity(views[name], "").share(key)(rows[name]) for name, key, _ in shown]
        print(f"| {sigma:g} | {' | '.join(f'{share:.1f}' for share in shares)} |")


if __name__ == "__main__":
    main()
