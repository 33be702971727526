"""A step of two processes whose all-reduces take time: gradients summed after backward, and while it goes on.

    python benchmarks/overlap.py            # two processes (gloo) on this machine, about two minutes on two cores

The all-reduces of gradients are delayed as by a link that sends one after the other at a fixed rate, which occupies no
processor. The rate is chosen so that the gradients take 0.25, 0.5 and 1 times as long as a step without delay. Steps of
both kinds alternate on the same weights; times are medians, of the slower process. The losses of both must be equal.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unilatent.batches import collate
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Modality
from unilatent.presets import preset
from unilatent.processes import Processes
from unilatent.registry import find
from unilatent.training.gradients import GradientSums
from unilatent.training.state import TrainingState
from unilatent.training.step import MicroBatch, OptimiserStep

SHARES = (0.25, 0.5, 1.0)
BUCKET = 2**18
"""Numbers in a bucket: as many buckets for this small model as a large one has with the library's own size."""
SETTINGS = (
    "method.generative_encoder.width=192", "method.generative_encoder.depth=8", "method.decoder.width=192",
    "method.decoder.depth=6", "method.decoder.mlp_width=768", "training.batch_size=32", "training.optimizer.muon=false",
    "training.precision=fp32", "training.optimizer.learning_rate=1e-30",
)  # fmt: skip


class Link:
    """Replaces `dist.all_reduce`; asynchronous ones are over when a link of `rate` bytes a second has sent them."""

    def __init__(self) -> None:
        self.plain, self.rate, self.free, self.sent = dist.all_reduce, 0.0, 0.0, 0
        dist.all_reduce = self

    def __call__(self, tensor: Tensor, *arguments: Any, async_op: bool = False, **named: Any) -> Any:
        work = self.plain(tensor, *arguments, async_op=async_op, **named)
        if not async_op:
            return work
        self.sent += tensor.nbytes
        self.free = max(self.free, time.perf_counter()) + (tensor.nbytes / self.rate if self.rate else 0)
        return Transfer(work, self.free)


class Transfer:
    """A work handle that is over at a time of `time.perf_counter`."""

    def __init__(self, work: dist.Work, until: float):
        self.work, self.until = work, until

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.until - time.perf_counter()))


def make_step(processes: Processes) -> tuple[OptimiserStep, list[MicroBatch]]:
    """A step of a UNITE model of the digits, and this process's samples."""
    config = preset("digits").override(*SETTINGS)
    modality: Modality = find("modalities", config.modality.name)(config.modality)
    splits = modality.splits(config.data)
    train, config = splits.train, config.with_data(splits)
    torch.manual_seed(0)
    model = LatentModel.build(config.model())
    positions = range(processes.rank, config.training.batch_size, processes.world)
    batch = collate([train[i] for i in positions], model.modality)
    step = OptimiserStep(TrainingState(model, config.training), config, processes, 1000, measure_gradients=False)
    return step, [(positions, batch)]


def measure(processes: Processes, repeats: int) -> None:
    step, micro = make_step(processes)
    link = Link()
    kinds = {"after backward": False, "overlapped": True}
    sums = {name: GradientSums(step.state.model, processes, BUCKET, overlapped=how) for name, how in kinds.items()}

    def run(name: str) -> tuple[float, float]:
        step.gradients = sums[name]
        processes.wait()
        begun = time.perf_counter()
        loss = float(step(micro).logs["loss/total"])
        return max(processes.gather(time.perf_counter() - begun)), loss

    for name in kinds:  # the first step learns the order of the buckets
        run(name)
    link.sent = 0
    alone = statistics.median(run("after backward")[0] for _ in range(repeats))
    sent = link.sent // repeats
    if processes.is_main:
        count, buckets = step.state.model.num_trainable, len(sums["overlapped"].buckets)
        print(f"{count:,} parameters in {buckets} buckets, {sent / 2**20:.1f} MiB a step; no delay: {alone:.3f} s")
        print("| all-reduce s | after backward s | overlapped s | overlapped / after | hidden | loss difference |")
        print("| --- | --- | --- | --- | --- | --- |")
    for share in SHARES:
        link.rate = sent / (share * alone)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name in kinds:
                found[name].append(run(name))
        before, after = (statistics.median(seconds for seconds, _ in found[name]) for name in kinds)
        losses = [[loss for _, loss in found[name]] for name in kinds]
        apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        if processes.is_main:
            hidden = (before - after) / (share * alone)
            numbers = f"{share * alone:.3f} | {before:.3f} | {after:.3f} | {after / before:.2f} | {hidden:.0%}"
            print(f"| {numbers} | {apart:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    child = os.fork()
    rank = "0" if child else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1")
    processes = Processes("cpu", 300)
    measure(processes, repeats)
    processes.leave()
    if child:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
