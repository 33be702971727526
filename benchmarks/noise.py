"""Cost of random numbers: `maths.streams` against torch's own generator, side by side.

    OMP_NUM_THREADS=1 python benchmarks/noise.py                     # on a CPU
    python benchmarks/noise.py --device cuda

Cases are the draws of one training step. "One generator a sample" seeds a torch generator for each sample and fills its
row: what independence from the batch costs without a counter-based generator. Each time is the least of several rounds,
in which the three alternate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from unilatent.maths.streams import Streams, generator

CASES = {
    "digits: 64 x 4 x 4 x 16": (64, 4, 4, 16),
    "molecules: 512 x 29 x 5 x 16": (512, 29, 5, 16),
    "imagenet256-unite-b: 64 x 256 x 5 x 32": (64, 256, 5, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; ms, in brackets ns a number\n")
    print("| case | streams | one generator a sample | normal_ of the whole batch | streams / normal_ |")
    print("| --- | --- | --- | --- | --- |")
    for label, shape in CASES.items():
        count, rest = shape[0], shape[1:]
        whole = torch.Generator(device).manual_seed(0)

        def streams(count: int = count, rest: tuple[int, ...] = rest) -> torch.Tensor:
            return Streams(("train", 0), range(count), device).normal(*rest)

        def generators(count: int = count, rest: tuple[int, ...] = rest) -> torch.Tensor:
            out = torch.empty(count, *rest, device=device)
            for i, row in enumerate(out):
                row.normal_(generator=generator("train", 0, i, device=device))
            return out

        def batch(shape: tuple[int, ...] = shape, whole: torch.Generator = whole) -> torch.Tensor:
            return torch.empty(shape, device=device).normal_(generator=whole)

        times = fastest([streams, generators, batch], device, options.rounds)
        numbers = torch.Size(shape).numel()
        cells = [f"{1e3 * seconds:.2f} ({1e9 * seconds / numbers:.1f})" for seconds in times]
        print(f"| {label} | {' | '.join(cells)} | {times[0] / times[2]:.1f} |", flush=True)


def fastest(works: list[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """The least seconds of each piece of work, which alternate."""
    best = [float("inf")] * len(works)
    for _ in range(rounds + 1):
        for i, work in enumerate(works):
            wait(device)
            begun = time.perf_counter()
            work()
            wait(device)
            best[i] = min(best[i], time.perf_counter() - begun)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
