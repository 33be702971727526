"""A step of two processes whose all-reduces take time: gradients summed after backward, and while it goes on.

    python benchmarks/overlap.py            # two processes (gloo) on this machine, about two minutes on two cores

The all-reduces of gradients are delayed as by a link that sends one after the other at a fixed rate, which occupies no
processor. The rate is chosen so that the gradients take 0.25, 0.5 and 1 times as long as a step without delay. Two
models train in turns, one with each kind of step, from the same weights and on the same batches, each step on another
one; times are medians, of the slower process. Losses must be equal, and in the first steps the sums of gradients too.
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
from unilatent.training.step import OptimiserStep

SHARES = (0.25, 0.5, 1.0)
CHECKED = 4
"""Steps whose gradients are compared."""
BUCKET = 2**18
"""Numbers in a bucket: as many buckets for this small model as a large one has with the library's own size."""
SETTINGS = (
    "method.generative_encoder.width=192", "method.generative_encoder.depth=8", "method.decoder.width=192",
    "method.decoder.depth=6", "method.decoder.mlp_width=768", "training.batch_size=32", "training.optimizer.muon=false",
    "training.precision=fp32", "training.schedule.warmup=0",
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


class Sums(GradientSums):
    """Sums of gradients that can be read after a step."""

    keeps = False

    def finish(self) -> None:
        super().finish()
        if self.keeps:
            self.kept = [p.grad.clone() for p in self.parameters if p.grad is not None]


class Training:
    """A UNITE model of the digits in training: each step is on the next batch."""

    def __init__(self, processes: Processes, overlapped: bool, *overrides: str):
        config = preset("digits").override(*SETTINGS, *overrides)
        modality: Modality = find("modalities", config.modality.name)(config.modality)
        splits = modality.splits(config.data)
        self.train, self.config, self.processes = splits.train, config.with_data(splits), processes
        torch.manual_seed(0)
        model = LatentModel.build(self.config.model())
        self.state, self.taken = TrainingState(model, self.config.training), 0
        self.step = OptimiserStep(self.state, self.config, processes, 1000, measure_gradients=False)
        self.step.gradients = self.sums = Sums(model, processes, BUCKET, overlapped=overlapped)

    def next(self) -> tuple[float, float]:
        """Take a step; return its seconds, those of the slower process, and its loss."""
        size, processes = self.config.training.batch_size, self.processes
        positions = range(self.taken * size + processes.rank, (self.taken + 1) * size, processes.world)
        batch = collate([self.train[i % len(self.train)] for i in positions], self.state.model.modality)
        self.taken += 1
        processes.wait()
        begun = time.perf_counter()
        loss = float(self.step([(positions, batch)]).logs["loss/total"])
        return max(processes.gather(time.perf_counter() - begun)), loss


def apart(a: float, b: float) -> float:
    return abs(a - b) / abs(a)


def differences(one: Training, other: Training, steps: int) -> tuple[float, float]:
    """Take steps of both; return by how much their losses differ, at most, and their gradients, in relation to them."""
    losses, gradients = [0.0], [0.0]
    for _ in range(steps):
        one.sums.keeps = other.sums.keeps = True
        losses.append(apart(one.next()[1], other.next()[1]))
        one.sums.keeps = other.sums.keeps = False
        pairs = zip(one.sums.kept, other.sums.kept, strict=True)
        gradients += [float((a - b).norm() / a.norm()) for a, b in pairs if a.any() or b.any()]
    return max(losses), max(gradients)


def measure(processes: Processes, repeats: int) -> None:
    kinds = {"after backward": False, "overlapped": True}
    trained = {name: Training(processes, overlapped) for name, overlapped in kinds.items()}
    after, overlapped = trained.values()
    link = Link()
    loss, gradient = differences(after, overlapped, CHECKED)  # the first step learns the order of the buckets
    link.sent = 0
    alone = statistics.median([after.next()[0] for _ in range(repeats)])
    sent = link.sent // repeats
    for _ in range(repeats):
        overlapped.next()
    if processes.is_main:
        count, buckets = after.state.model.num_trainable, len(overlapped.sums.buckets)
        print(f"{CHECKED} steps: losses differ by {loss:.1e} at most, sums of gradients by {gradient:.1e}")
        print(f"{count:,} parameters in {buckets} buckets, {sent / 2**20:.1f} MiB a step; no delay: {alone:.3f} s")
        print("| all-reduce s | after backward s | overlapped s | overlapped / after | hidden | loss difference |")
        print("| --- | --- | --- | --- | --- | --- |")
    for share in SHARES:
        link.rate = sent / (share * alone)
        found = [(after.next(), overlapped.next()) for _ in range(repeats)]
        before, now = (statistics.median(pair[kind][0] for pair in found) for kind in range(2))
        largest = max(apart(a[1], b[1]) for a, b in found)
        if processes.is_main:
            hidden = (before - now) / (share * alone)
            numbers = f"{share * alone:.3f} | {before:.3f} | {now:.3f} | {now / before:.2f} | {hidden:.0%}"
            print(f"| {numbers} | {largest:.1e} |", flush=True)


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
