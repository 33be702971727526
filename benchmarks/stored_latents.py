"""A second stage that encodes in each step against one that reads stored latents: samples a second and FLOP.

    python benchmarks/stored_latents.py [--preset digits-ul] [--steps 20] [--rounds 7]
    python benchmarks/stored_latents.py --preset imagenet512-ul --count-only

Both train in turn, a few steps each per round, with the loader, the step and the optimizers of a run; the median round
is reported. The tokenizer has random weights, which changes neither time nor FLOP. FLOP of forward and backward pass
are counted from the shapes of all matrix products, on tensors without storage.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train_step import count_flop
from unilatent.batches import Plan, loader
from unilatent.devices import resolve_precision
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Dataset
from unilatent.presets import preset
from unilatent.processes import Processes
from unilatent.stored_latents import StoredLatents, encode_views, read_header
from unilatent.training.config import RunConfig
from unilatent.training.state import TrainingState
from unilatent.training.step import MicroBatch, OptimiserStep
from unilatent.types import LATENTS, Batch, Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits-ul")
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count-only", action="store_true", help="count FLOP and measure nothing")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = preset(options.preset).override(*options.overrides)
    encoding, stored = flop(config)
    print(f"{options.preset}: forward and backward pass of a sample, GFLOP\n")
    print("| encoded in each step | from stored latents | saved |\n| --- | --- | --- |")
    print(f"| {encoding / 1e9:,.4g} | {stored / 1e9:,.4g} | {100 * (1 - stored / encoding):.1f} % |")
    if not options.count_only:
        compare(config, options.steps, options.rounds)


def flop(config: RunConfig, n: int = 2) -> tuple[float, float]:
    """FLOP of a sample, encoded in each step and from stored latents."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LatentModel.build(config.example().model())
        layout = model.modality.sample_layout(Streams(("layout",), range(n)))
        tokens = torch.empty(n, layout.num_tokens, model.modality.channels)
        data = model.modality.unpack(Tokens(tokens, layout))
        latents = {LATENTS: torch.empty(n, model.max_latents, model.latent_channels)}
        values = model.conditions.example(n)
        return tuple(count_flop(model, Batch(given, values), n) / n for given in (data, latents))  # type: ignore[return-value]


def compare(config: RunConfig, steps: int, rounds: int) -> None:
    """Train both kinds in turn and print samples a second."""
    training = config.training
    torch.set_num_threads(training.threads or 1)
    processes = Processes(training.device)
    modality = LatentModel.build(config.example().model()).modality
    splits = modality.splits(config.data)
    config = config.example().with_data(splits)
    precision = resolve_precision(training.precision, processes.device)
    config = config.computing_in(precision)
    torch.manual_seed(0)
    model = LatentModel.build(config.model()).to(processes.device)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        encode_views(model.eval(), splits.train, Path(place), views=1, batch_size=64, precision=precision)
        seconds = time.perf_counter() - began
        header = read_header(Path(place), splits.train, modality, precision)
        stored = StoredLatents(Path(place), header, splits.train)
        kinds: dict[str, Dataset] = {"encoded in each step": splits.train, "from stored latents": stored}
        model.train()
        step = OptimiserStep(TrainingState(model, config.training), config, processes, 1.0, measure_gradients=False)
        batches = {name: micro_batches(data, model, config, steps * (rounds + 1)) for name, data in kinds.items()}
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds + 1):
            for name, coming in batches.items():
                started = time.perf_counter()
                for _ in range(steps):
                    step([next(coming)])
                rates[name].append(steps * training.batch_size / (time.perf_counter() - started))
        for coming in batches.values():
            coming.close()
    first, second = (statistics.median(numbers[1:]) for numbers in rates.values())  # the first round warms up
    ratios = sorted(b / a for a, b in zip(*(numbers[1:] for numbers in rates.values()), strict=True))
    print(f"\nwhole steps of {training.batch_size}, {precision}, {processes.device}, median of {rounds} rounds\n")
    print("| | samples/s |\n| --- | --- |")
    print(f"| encoded in each step | {first:,.0f} |\n| from stored latents | {second:,.0f} |")
    print(f"\nratio of a round: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    print(f"encoding {len(splits.train):,} samples once: {seconds:.1f} s, {len(splits.train) / seconds:,.0f} samples/s")


def micro_batches(
    data: Dataset, model: LatentModel, config: RunConfig, steps: int
) -> Generator[MicroBatch, None, None]:
    """Positions and batches of a run's first steps, as the trainer reads them."""
    plan = Plan(range(steps), config.training.batch_size)
    for positions, (batch, _) in zip(plan, loader(data, model.modality, plan, config.seed), strict=True):
        yield positions, batch


if __name__ == "__main__":
    main()
