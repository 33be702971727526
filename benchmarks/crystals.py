"""What crystals cost: making them, judging them, holding them against each other, reading files.

python benchmarks/crystals.py                        5,000 made, 10,000 judged, 200 matched
python benchmarks/crystals.py --csv all.csv          and the time to parse a file of CIFs
python benchmarks/crystals.py --noise [--of 1000]    what noise does to each measure instead: the tables of the docs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unilatent.atoms.systems import Systems
from unilatent.modalities.crystal import data, generator, matching, metrics, validity


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
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--of", type=int, default=100, help="crystals of the tables of noise")
    options = parser.parse_args()
    if options.noise:
        noise(options.of)
        return
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
    valid, known = np.ones(len(drawn[0]), bool), matching.Known(types, fractional, lattice)
    with Clock() as clock:
        for row in range(len(some[0])):
            matching.reduced(*(array[row] for array in drawn))
    print(f"{len(some[0]):,} reduced: {clock}")
    for kind, made in (("of the same", some), ("of random elements", drawn)):
        with Clock() as clock:
            shares = metrics.novelty(made, valid[: len(made[0])], known)
        print(f"{len(made[0]):,} {kind} held against {len(types):,} and each other ({shares['unique']:.1f} % distinct, "
              f"{shares['novel']:.1f} % novel): {clock}")  # fmt: skip
    if options.csv:
        with Clock() as clock:
            train, held_out = data.load(data.CrystalData(path=str(options.csv), max_atoms=256))
        print(f"{len(train) + len(held_out):,} parsed or from the cache: {clock}")


def noise(count: int) -> None:
    """Made crystals and what is left of each measure once they are spoilt."""
    real = padded(generator.make(count))
    print("| | `struct_valid` | `comp_valid` | `valid` |\n| --- | --- | --- | --- |")
    for name, shares in metrics.controls(real).items():
        print(f"| {name} | {shares['struct_valid']:.1f} | {shares['comp_valid']:.1f} | {shares['valid']:.1f} |")
    valid = validity.judge(*real).valid
    print(f"\noriginals that are valid: {100 * valid.mean():.1f} %\n")
    print("| lengths / coordinates | `match_rate_any` | `match_rate` |\n| --- | --- | --- |")
    for lengths, places in ((0.02, 0.01), (0.05, 0.05), (0.1, 0.1), (0.3, 0.3)):
        rates = metrics.match_rates(metrics.with_noise(real, lengths, places), real, valid)
        print(f"| {lengths:g} / {places:g} | {rates['match_rate_any']:.1f} | {rates['match_rate']:.1f} |")


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
