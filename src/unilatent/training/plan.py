"""What a run would need on GPUs that need not be here: memory, FLOP, communication and time, from counts.

One micro-batch runs on fake tensors, with the formulas of a GPU, on any machine. Memory is what it would hold, FLOP are
those of its matrix products. Times are these counts divided by rates, which are assumptions and are part of the result.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..nets.gpu_formulas import gpu_formulas
from ..nets.layers import Repeated, muon_parameters
from ..sharding import shards_of
from ..types import LATENTS, Batch, Layout, Tokens
from .config import RunConfig
from .flop import StepCounter
from .memory import Memory, Shapes, fitting, measure, micro_batch
from .optimizer import Optimizers
from .setup import check_latents, check_processes

CPU = torch.device("cpu")
LAUNCH = 5e-6
"""Seconds in which a processor launches a kernel of eager code: an assumption."""
DRAWN = 64
"""Samples whose layouts are drawn, so that the largest of sets of different sizes is nearly the largest possible."""


@dataclass(frozen=True)
class GPU:
    """A card, as its data sheet describes it (dense matrix products).

    memory: bytes, of which 10^9 are a GB. bf16, fp32: FLOP/s of matrix products. bandwidth: bytes/s of its memory.
    link: bytes/s that it can send to the other cards of its machine.
    """

    title: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float


GPUS = {
    "a100": GPU("A100 SXM, 80 GB", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),
    "a100-40": GPU("A100 SXM, 40 GB", 40e9, 312e12, 19.5e12, 1.56e12, 300e9),
    "h100": GPU("H100 SXM, 80 GB", 80e9, 989e12, 67e12, 3.35e12, 450e9),
    "h200": GPU("H200 SXM, 141 GB", 141e9, 989e12, 67e12, 4.8e12, 450e9),
    "b200": GPU("B200 SXM, 180 GB", 180e9, 2250e12, 75e12, 7.7e12, 900e9),
    "l40s": GPU("L40S, 48 GB", 48e9, 362e12, 91.6e12, 864e9, 32e9),
    "rtx4090": GPU("RTX 4090, 24 GB", 24e9, 165e12, 82.6e12, 1.01e12, 32e9),
}
"""Cards by name. Sources: NVIDIA's data sheets; 16 lanes of PCIe 4.0 where there is no NVLink."""


@dataclass(frozen=True)
class Machines:
    """What a run is planned for, and the rates that are assumed.

    share: of the peak of matrix products that forward and backward pass reach, all else in them included.
    gpus_per_node: cards of one machine. network: bytes/s that a machine can send to others.
    """

    card: str = "h100"
    gpus: int = 8
    share: float = 0.3
    gpus_per_node: int = 8
    network: float = 400e9 / 8

    def __post_init__(self) -> None:
        if self.card.lower() in GPUS:
            object.__setattr__(self, "card", self.card.lower())
        if self.card not in GPUS:
            words = re.findall(r"[a-z]+\d+[a-z]*", self.card.lower())  # of a longer name, such as H100-SXM
            close = [word for word in words if word in GPUS] or difflib.get_close_matches(self.card, GPUS, 1, 0.7)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"--gpu: {self.card!r} is unknown; {hint}use one of {', '.join(GPUS)}")
        for name, value in (("gpus", self.gpus), ("gpus-per-node", self.gpus_per_node), ("network", self.network)):
            if not value > 0:
                raise ConfigError(f"--{name}: {value:g} cannot be used; give a number above 0")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share: {self.share:g} is no share of the peak; give a number above 0, at most 1")

    @property
    def gpu(self) -> GPU:
        return GPUS[self.card]

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def per_node(self) -> int:
        """Cards of a machine that take part."""
        return min(self.gpus, self.gpus_per_node)

    @contextmanager
    def local(self) -> Iterator[None]:
        """Give code that asks how many processes a machine has (`sharding.shards_of`) this answer, inside the block."""
        before = os.environ.get("LOCAL_WORLD_SIZE")
        os.environ["LOCAL_WORLD_SIZE"] = str(self.per_node)
        try:
            yield
        finally:
            if before is None:
                del os.environ["LOCAL_WORLD_SIZE"]
            else:
                os.environ["LOCAL_WORLD_SIZE"] = before

    @property
    def rate(self) -> float:
        """Bytes/s that a card sends in a ring of all cards, of which one in a machine sends to the next machine."""
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.network)

    def rate_of(self, purpose: str) -> float:
        """Bytes/s that a card sends for a purpose of `RunPlan.sent`."""
        between = min(self.gpu.link, self.network / self.per_node)  # all cards of a machine share its network
        return {WITHIN: self.gpu.link, BETWEEN: between}.get(purpose, self.rate)


@dataclass(frozen=True)
class RunPlan:
    """The counts of one step of a run on some machines, and what follows from them. Of one GPU, unless it says so."""

    preset: str
    machines: Machines
    precision: str
    parameters: int
    """Trainable ones."""
    batch: int
    """Samples of a step, of all GPUs."""
    micro_batches: int
    """Forward and backward passes of a step, at most."""
    memory: Memory
    flop_per_sample: float
    """Forward and backward pass, with what is computed twice."""
    flop_recomputed: float
    """Of these, what activation checkpointing computes a second time."""
    launches: int
    """Kernels of the forward and backward pass of a micro-batch, about."""
    flop_update: int
    """Matrix products of the optimizers."""
    sent: dict[str, float]
    """Bytes that are sent in a step, by purpose."""
    samples: int | None
    """Samples of the training set; None if unknown."""
    epochs: float | None
    steps: int | None
    """Length of the run: what its configuration gives."""
    latents: str | None = None
    """Where the stored latents are that steps read in place of data; None: they read data."""

    @property
    def flop(self) -> float:
        """Of a step, in all GPUs."""
        return self.flop_per_sample * self.batch

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by what takes them; one after the other, none hidden behind another."""
        m, needed = self.machines, self.memory
        moved = 2 * needed.weights + 4 * needed.gradients + 2 * needed.optimizer + 2 * needed.average
        return {
            "forward and backward pass": max(self.products, self.launching),
            "update of the weights": self.flop_update / (m.gpu.bf16 * m.share) + moved / m.gpu.bandwidth,
            "communication": sum(size / m.rate_of(purpose) for purpose, size in self.sent.items()),
        }

    @property
    def products(self) -> float:
        """Seconds that the matrix products of the forward and backward passes take, all else in them included."""
        m = self.machines
        peak = m.gpu.bf16 if self.precision == "bf16" else m.gpu.fp32
        return self.flop_per_sample * -(-self.batch // m.gpus) / (peak * m.share)

    @property
    def launching(self) -> float:
        """Seconds that the processor needs to launch the kernels of the forward and backward passes."""
        return LAUNCH * self.launches * self.micro_batches

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes most of a step."""
        longest = max(self.seconds, key=self.seconds.__getitem__)
        if longest != "forward and backward pass":
            return longest
        return "matrix products" if self.products >= self.launching else "launches of kernels"

    @property
    def steps_per_epoch(self) -> float | None:
        return None if self.samples is None else self.samples / self.batch

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None where it depends on an unknown number of samples."""
        if self.steps is not None or self.samples is None:
            return self.steps
        return max(1, round((self.epochs or 0) * self.samples / self.batch))

    def plain(self) -> dict[str, Any]:
        """Return plain data for JSON: bytes, FLOP and seconds."""
        m, run = self.machines, self.num_steps
        epoch = self.steps_per_epoch
        return {
            "preset": self.preset, "parameters": self.parameters, "precision": self.precision,
            "batch_size": self.batch, "micro_batch_size": self.memory.micro_batch, "micro_batches": self.micro_batches,
            "memory": {
                "weights": self.memory.weights, "gradients": self.memory.gradients, "optimizer": self.memory.optimizer,
                "average": self.memory.average, "activations": self.memory.activations, "total": self.memory.total,
                "of": m.gpu.memory, "fits": self.memory.fits, "fitting_micro_batch_size": self.memory.fitting,
            },
            "flop": {
                "per_sample": self.flop_per_sample, "recomputed_per_sample": self.flop_recomputed, "step": self.flop,
                "update": self.flop_update,
            },
            "launches": self.launches,
            "sent": self.sent,
            "seconds": {
                **self.seconds, "step": self.step_seconds,
                "epoch": None if epoch is None else epoch * self.step_seconds,
                "run": None if run is None else run * self.step_seconds,
            },
            "steps": run, "samples": self.samples, "epochs": self.epochs, "latents": self.latents,
            "gpu_hours": None if run is None else run * self.step_seconds * m.gpus / 3600,
            "bound": self.bound,
            "assumed": {
                "gpu": m.card, "gpus": m.gpus, "gpus_per_node": m.gpus_per_node, "share_of_peak": m.share,
                "peak_bf16": m.gpu.bf16, "peak_fp32": m.gpu.fp32, "memory_bandwidth": m.gpu.bandwidth,
                "link": m.gpu.link, "network": m.network, "rate": m.rate, "launch_seconds": LAUNCH,
            },
        }  # fmt: skip


def stages_of(config: RunConfig) -> list[RunConfig]:
    """Return the stages of a run that are still to be trained, in order."""
    return [stage for stage in (config.first, config) if stage is not None]


def plan(config: RunConfig, machines: Machines, samples: int | None = None) -> RunPlan:
    """Count one step of a run (one stage) on these machines.

    With `training.latents`, a step on latents of the shapes that `encode` stores; the folder is not looked at. Nothing
    is encoded then, but the frozen tokenizer is in memory, as in a run, which draws and evaluates with it.

    samples: of the training set. ConfigError if the batch cannot be divided over the GPUs, or the method cannot be
    trained on stored latents.
    """
    with machines.local():
        return _plan(on_gpu(config), machines, samples)


def _plan(config: RunConfig, machines: Machines, samples: int | None) -> RunPlan:
    t, world = config.training, machines.gpus
    check_processes(t, world)
    check_latents(config)
    shapes, micro = Shapes.of(example(config)), micro_batch(t, world)
    most = -(-t.batch_size // world)  # samples of one process
    passes = -(-most // micro)
    seen, counter = _Seen(config, machines), StepCounter()
    with gpu_formulas():
        memory = measure(config, shapes, CPU, micro, world, counter, seen)
        memory = replace(memory, free=int(machines.gpu.memory))
        if memory.activations is None:
            raise ConfigError(f"preset {config.preset}: a step of it reads values, so it cannot be counted from shapes")
        twice = 0.0
        if t.activation_checkpointing:
            once = StepCounter()
            measure(_changed(config, activation_checkpointing=False), shapes, CPU, 1, world, once)
            twice = counter.flop / micro - once.flop
        if not memory.fits:
            one = replace(measure(config, shapes, CPU, 1, world), free=memory.free)
            memory = replace(memory, fitting=fitting(memory, one))
    return RunPlan(
        preset=config.preset, machines=machines, precision=t.precision, parameters=seen.parameters, batch=t.batch_size,
        micro_batches=passes, memory=memory, flop_per_sample=counter.flop / micro, flop_recomputed=twice,
        launches=counter.launches, flop_update=seen.update_flop, sent=seen.sent(passes), samples=samples,
        epochs=t.epochs, steps=t.steps, latents=t.latents,
    )  # fmt: skip


def on_gpu(config: RunConfig) -> RunConfig:
    """Return the run as a GPU with bf16 instructions takes it, with placeholders for what is read from data."""
    config = config.resolved().example()
    config = config.computing_in("fp32" if config.training.precision == "fp32" else "bf16")
    optimizer = config.training.optimizer
    if optimizer.muon_precision == "auto":
        optimizer = optimizer.model_copy(update={"muon_precision": "bf16"})
    return _changed(config, optimizer=optimizer)


def _changed(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def example(config: RunConfig) -> Batch:
    """Return made-up samples of the run's modality, as its data sets would give them; or their latents, as those that
    are stored (`training.latents`)."""
    with torch.device("meta"):
        model = LatentModel.build(config.model())
    layout = model.modality.sample_layout(Streams(("plan",), range(DRAWN)))
    values = torch.zeros(DRAWN, layout.num_tokens, model.modality.channels)
    data = model.modality.finish(model.modality.unpack(Tokens(values, layout)))
    if config.training.latents is not None:
        data = _latents(model, model.latent_layout(model.modality.pack(data).layout))
    return Batch(data, model.conditions.example(DRAWN))


def _latents(model: LatentModel, layout: Layout) -> dict[str, Tensor]:
    """Return latents of this layout in the form in which they are stored (`stored_latents`)."""
    data = {LATENTS: torch.zeros(DRAWN, layout.num_tokens, model.latent_channels)}
    if layout.mask is not None:
        data["mask"] = layout.mask
    if len(layout.positions) > 1:
        data["positions"] = layout.positions
    return data


WITHIN, BETWEEN = "exchanges within machines", "exchanges between machines"
"""What goes over the cards' own links, however many machines there are; and what all cards of a machine send to others
at once. What has another name goes round a ring of all cards."""


class _Seen:
    """What is learned of a model whose step is being counted, for one process, of a card."""

    def __init__(self, config: RunConfig, machines: Machines):
        self.config, self.machines, self.world = config, machines, machines.gpus

    def __call__(self, model: LatentModel) -> None:
        """Look at a model of fake tensors, and count how often its blocks are called from now on."""
        self.parameters = model.num_trainable
        self.update_flop = Optimizers(model, self.config.training.optimizer).flop(self.world)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.matrices = list(muon_parameters(model)) if self.config.training.optimizer.muon else []
        self.calls: dict[nn.Module, int] = {}
        for module in model.modules():
            if isinstance(module, Repeated):
                self.calls[module] = 0
                module.register_forward_pre_hook(self._called)

    def _called(self, block: nn.Module, inputs: Any) -> None:
        self.calls[block] += 1

    def sent(self, micro_batches: int) -> dict[str, float]:
        """Bytes that one process sends in a step, by purpose.

        Sums of gradients are in float32, once a step (`sharding.BlockSums`). Sharded blocks are gathered for each call
        and again for its backward pass, in the precision that they compute in. Of Muon's matrices, in bfloat16, an
        owner collects the sharded ones and distributes rows of the results (`sharding.Owners`).
        """
        t, world = self.config.training, self.world
        sharded = {p for block in self.calls for p in block.parameters()} if t.shard and world > 1 else set()
        shards = shards_of(t.shard, world)  # processes that hold one copy
        copies = world // shards
        sent = dict.fromkeys(
            ("sums of gradients", "gathers of sharded weights", WITHIN, BETWEEN, "updates of Muon"), 0.0
        )
        sent["sums of gradients"] = 2 * _others(world) * 4 * _count(p for p in self.trained if p not in sharded)
        sent["updates of Muon"] = 2 * _others(world) * _count(p for p in self.matrices if p not in sharded)
        if sharded:
            gathered = micro_batches * _others(shards) * self._gathered(4 if t.precision == "fp32" else 2)
            blocks = 4 * _count(p for p in self.trained if p in sharded)
            if t.shard == "hybrid":
                sent[WITHIN] += gathered + _others(shards) * blocks
                sent[BETWEEN] += 2 * _others(copies) * blocks / shards
            else:
                sent["gathers of sharded weights"] += gathered
                sent["sums of gradients"] += _others(shards) * blocks
            rows = 2 * _count(p for p in self.matrices if p in sharded) / world / shards  # for one process, of an owner
            near = self.machines.per_node
            sent[WITHIN] += 2 * (near - 1) * rows
            sent[BETWEEN] += (world - near) * (rows if t.shard == "hybrid" else 2 * rows)
        return {purpose: size for purpose, size in sent.items() if size}

    def _gathered(self, width: int) -> float:
        """Bytes of the blocks that are gathered for a micro-batch, with so many for a number."""
        passes = 2 if self.config.training.activation_checkpointing else 1  # what is recomputed is called twice
        size = 0.0
        for block, calls in self.calls.items():
            is_trained = any(p.requires_grad for p in block.parameters())
            size += width * _count(block.parameters()) * (2 * calls / passes if is_trained else calls)
        return size


def _others(processes: int) -> float:
    """The share of a ring's data that a process sends on in one round."""
    return (processes - 1) / processes


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
