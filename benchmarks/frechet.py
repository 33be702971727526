"""Speed of the Frechet distance: streaming moments of features, and the distance from moments.

python benchmarks/frechet.py                        50,000 features of 2,048 channels in chunks of 500
"""

from __future__ import annotations

import argparse
import time

import torch

from unilatent.maths.frechet import RunningMoments, frechet_distance


class Clock:
    """Accumulates wall-clock and CPU seconds of a `with` block; CPU time is robust to other load on the machine."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Clock:
        self.before = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - self.before[0]
        self.cpu += time.process_time() - self.before[1]

    def __str__(self) -> str:
        return f"{self.wall:.1f} | {self.cpu:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--part", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    stream = torch.Generator(options.device).manual_seed(0)

    def features(count: int) -> torch.Tensor:
        """Non-negative features with a decaying spectrum, like Inception's."""
        return torch.randn(count, options.channels, generator=stream, device=options.device).mul(scales).relu()

    scales = torch.arange(1, options.channels + 1, device=options.device).pow(-0.5)
    running, streaming = RunningMoments(), Clock()
    for start in range(0, options.samples, options.part):
        chunk = features(min(options.part, options.samples - start))
        with streaming:
            running.add(chunk)
    low_rank = RunningMoments()
    low_rank.add(features(options.channels // 2))
    full_rank = RunningMoments()
    full_rank.add(features(2 * options.channels))
    print(f"{options.device}, {torch.get_num_threads()} threads, N {options.samples:,}, D {options.channels:,}\n")
    print("| step | s | CPU s |\n| --- | --- | --- |")
    print(f"| moments of {options.samples:,} features in chunks of {options.part} | {streaming} |")
    for label, other in (("full rank", full_rank), (f"rank {options.channels // 2 - 1:,}", low_rank)):
        with Clock() as clock:
            frechet_distance(running.moments(), other.moments())
        print(f"| Frechet distance from moments, second set of {label} | {clock} |")


if __name__ == "__main__":
    main()
