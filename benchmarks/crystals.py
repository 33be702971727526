"""What crystals cost: making them, judging them, holding them against each other, reading files.

python benchmarks/crystals.py                        5,000 made, 10,000 judged, 200 matched
python benchmarks/crystals.py --csv all.csv          and the time to parse a file of CIFs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unilatent.atoms.systems import Systems
from unilatent.modalities.crystal import data, generator, metrics, validity


class Clock:
    """Seconds by the wall and by this process: the second is robust to other work."""

    def __enter__(self) -> Clock:
        self.before = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self.before[0]
        self.cpu = time.process_time() - self.before[1]

    def __str__(self) -> str:
        return f"{self.wall:.2f} | {self.cpu:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=int, default=5000)
    parser.add_argument("--judged", type=int, default=10_000)
    parser.add_argument("--matched", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    generator.make(20)  # imports and tables
    print("seconds, wall | this process")
    with Clock() as clock:
        systems = generator.make(options.made)
    print(f"{options.made:,} made by one process: {clock}")
    with tempfile.TemporaryDirectory() as folder:
        systems.save(Path(folder) / "c.npz")
        print(f"in a file of {(Path(folder) / 'c.npz').stat().st_size / 1e6:.2f} MB")
    types, fractional, lattice = padded(systems)
    rows = np.resize(np.arange(len(types)), options.judged)
    drawn = metrics.random_elements(types[rows]), fractional[rows], lattice[rows]
    validity.judge(types[:10], fractional[:10], lattice[:10])
    with Clock() as clock:
        validity.shapes(*drawn)
    print(f"{options.judged:,} structures judged: {clock}")
    with Clock() as clock:
        validity.judge(*drawn)
    distinct = len({validity.composition(row) for row in drawn[0]})
    print(f"and with {distinct:,} distinct compositions: {clock}")
    some = tuple(array[: options.matched] for array in (types, fractional, lattice))
    moved = some[0], (some[1] + np.random.default_rng(0).normal(0, 0.02, some[1].shape)) % 1, some[2]
    with Clock() as clock:
        rate = np.isfinite(metrics.match(moved, some)).mean()
    print(f"{len(some[0]):,} matched ({100 * rate:.1f} %): {clock}")
    if options.csv:
        with Clock() as clock:
            train, held_out = data.load(data.CrystalData(path=str(options.csv), max_atoms=256))
        print(f"{len(train) + len(held_out):,} parsed or from the cache: {clock}")


def padded(systems: Systems) -> metrics.Arrays:
    size = int(systems.sizes.max())
    types, fractional = np.zeros((len(systems), size), np.int64), np.zeros((len(systems), size, 3))
    for i, start in enumerate(systems.starts[:-1]):
        count = systems.sizes[i]
        types[i, :count] = systems.types[start : start + count]
        fractional[i, :count] = systems.coordinates[start : start + count]
    return types, fractional, np.asarray(systems.lattice, np.float64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
