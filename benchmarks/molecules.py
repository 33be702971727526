"""Molecules: how fast the QM9-like set is made, and how fast each protocol judges.

python benchmarks/molecules.py                      1,000 made; 10,000 judged, as they are and with noise
"""

from __future__ import annotations

import argparse
import time

import torch

from unilatent.modalities.molecule import generator
from unilatent.modalities.molecule.metrics import spaces, with_noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=int, default=1000)
    parser.add_argument("--judged", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)

    before = time.perf_counter(), time.process_time()
    systems = generator.compose(options.made)
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    print(f"made {len(systems):,} in {wall:.1f} s, {cpu:.1f} CPU s: {60 * len(systems) / cpu:,.0f} a CPU minute")

    types = torch.zeros(len(systems), 29, dtype=torch.int64)
    positions = torch.zeros(len(systems), 29, 3)
    for i in range(len(systems)):
        system = systems[i]
        types[i, : len(system.types)] = torch.from_numpy(system.types.astype("int64"))
        positions[i, : len(system.types)] = torch.from_numpy(system.coordinates)
    real = {"types": types, "positions": positions}
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


if __name__ == "__main__":
    main()
