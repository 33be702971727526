"""How much memory a training step needs, measured before anything of that size is allocated.

A step runs on fake tensors, which have shape, type and device but no storage. Every storage that a real step would
allocate is counted for as long as it would be held. Only the memory inside kernels is an assumption.
"""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..devices import resolve_precision
from ..maths.streams import Numbers, Streams
from ..methods.base import LatentModel
from ..nets.layers import Repeated
from ..processes import BUCKET
from ..registry import find
from ..sharding import shards_of
from ..types import Batch
from .config import RunConfig, TrainingConfig
from .optimizer import Optimizers
from .parts import differentiate

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""Errors that running out of memory can raise; not every RuntimeError is one (`is_out_of_memory`)."""
USABLE = 0.9
"""Share of the free memory that a step may use: kernels need some themselves, and allocators leave gaps."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """Bytes of all EMA weights."""
    activations: int | None
    """Bytes that a micro-batch needs in addition; None if a step cannot run on fake tensors (it reads values)."""
    micro_batch: int
    """Samples."""
    free: int | None = None
    """Bytes that are free on the device; None if unknown."""
    fitting: int | None = None
    """The largest power of two of samples that fits, where `micro_batch` does not; 0 if not even one does."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + (self.activations or 0)

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= USABLE * self.free

    def warning(self) -> str:
        """Return what to do if the step does not fit, "" if it does."""
        if self.fits or self.free is None:
            return ""
        way = (
            f"the largest training.micro_batch_size that fits is {self.fitting} (the optimisation stays the same)"
            if self.fitting
            else "not even one sample at a time fits: choose a smaller model"
        )
        return f"a step needs about {in_bytes(self.total)}, but {in_bytes(self.free)} are free; {way}"

    def __str__(self) -> str:
        parts = [
            f"{in_bytes(self.weights + self.gradients)} weights and gradients",
            f"{in_bytes(self.optimizer)} optimizer",
            f"{in_bytes(self.average)} EMA weights",
        ]
        if self.activations is not None:
            parts.append(f"{in_bytes(self.activations)} activations of micro-batches of {self.micro_batch}")
        word = "at least" if self.activations is None else "about"
        free = "" if self.free is None else f"; {in_bytes(self.free)} free"
        return f"{word} {in_bytes(self.total)}: {', '.join(parts)}{free}"


def estimate(config: RunConfig, example: Batch, device: torch.device, processes: int = 1) -> Memory:
    """Measure a step with the run's micro-batch, and find the largest one that fits if it does not.

    example: a few of the run's samples. Networks of the losses are loaded first (`Modality.prepare`), since nothing
    that outlives the step may consist of fake tensors.
    """
    device = torch.empty(0, device=device).device  # cuda is cuda:0
    find("modalities", config.modality.name)(config.modality).prepare(device)
    free = free_memory(device)
    config = config.resolved().computing_in(resolve_precision(config.training.precision, device))
    text, shapes = json.dumps(config.plain()), Shapes.of(example)

    def measured(micro: int) -> Memory:
        return replace(_measured(text, shapes, device, micro, processes), free=free)

    memory = measured(micro_batch(config.training, processes))
    return memory if memory.fits else replace(memory, fitting=fitting(memory, measured(1)))


def fitting(large: Memory, one: Memory) -> int:
    """Return the largest power of two of samples below `large` that fits; memory is linear in the number of samples.

    large, one: measured with a micro-batch that does not fit, and with one of one sample.
    """
    if not one.fits:
        return 0
    per_sample = (large.total - one.total) / max(1, large.micro_batch - 1)
    room = USABLE * (one.free or 0) - one.total
    most = min(large.micro_batch - 1, 1 + int(room / max(per_sample, 1)))
    return 1 << (most.bit_length() - 1)


@lru_cache(maxsize=64)
def _measured(config: str, shapes: Shapes, device: torch.device, micro: int, processes: int) -> Memory:
    """Measure a step of a configuration (JSON), for samples of these shapes, in one of several processes."""
    return measure(RunConfig.parse(json.loads(config)), shapes, device, micro, processes)


def measure(
    run: RunConfig, shapes: Shapes, device: torch.device, micro: int, processes: int = 1,
    counter: AbstractContextManager[object] | None = None, look: Callable[[LatentModel], object] | None = None,
) -> Memory:  # fmt: skip
    """Measure a step on fake tensors, with micro-batches of `micro` samples of these shapes, in one of several
    processes.

    run: its precision is "fp32" or "bf16". counter: a mode that is active during the forward and backward pass.
    look: called with the model before that, inside the fake mode.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = LatentModel.build(run.model())
        for module in model.modules():
            if isinstance(module, Repeated):
                module.recompute = run.training.activation_checkpointing
        if look is not None:
            look(model)
        batch = shapes.batch(micro, device)
        try:
            with counter or nullcontext():
                activations, parts = held_in_step(model, run.training, batch, _NoNumbers(micro, device))
        except Exception:  # a step that reads values, an operation without shapes: no reason to refuse the run
            activations, parts = None, set()
        sharded = bool(run.training.shard) and processes > 1
        held = _ShardedModel(model, shards_of(run.training.shard, processes) if sharded else 1)
        trained = [p for p in model.parameters() if p.requires_grad]
        summed = sum(p.nbytes for p in trained if not (sharded and p in held.sharded))  # outside blocks, by a bucket
        optimizers = Optimizers(model, run.training.optimizer)
        if activations is not None:  # they are freed before the optimizers step
            activations = max(activations, optimizers.temporary_bytes(processes, lambda p: p in held.sharded))
        copies = 1 + (len(parts) if run.training.log_gradients and not sharded else 0)
        return Memory(
            weights=held.bytes(model.parameters()) + sum(b.nbytes for b in model.buffers()) + held.gathered,
            gradients=copies * sum(p.nbytes for p in trained)
            + held.gathered  # FSDP sums them once a step, whole
            + (min(4 * BUCKET, summed) if processes > 1 else 0),
            optimizer=optimizers.state_bytes_of(held.share),
            average=(1 + len(run.training.ema_profiles)) * held.bytes(trained, 4),
            activations=activations,
            micro_batch=micro,
        )


class _ShardedModel:
    """What one process holds of a model whose `Repeated` blocks are sharded over `world` processes.

    sharded: the parameters inside blocks. gathered: bytes of the largest block, which is gathered while it is used.
    """

    def __init__(self, model: LatentModel, world: int):
        self.world = world
        blocks = [module for module in model.modules() if isinstance(module, Repeated)] if world > 1 else []
        self.sharded = {p for block in blocks for p in block.parameters()}
        self.gathered = max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)

    def share(self, parameter: Tensor) -> float:
        """Return the share of a parameter in the first process, whose shard of the first dimension is the largest."""
        rows = parameter.shape[0] if parameter.ndim and parameter in self.sharded else 0
        return -(-rows // self.world) / rows if rows else 1.0

    def bytes(self, parameters: Iterable[Tensor], width: int | None = None) -> int:
        """Return the bytes of all these parameters. width: bytes per number; None: those of its type."""
        return sum(round((width or p.element_size()) * p.numel() * self.share(p)) for p in parameters)


def micro_batch(training: TrainingConfig, processes: int) -> int:
    """Return the most samples that go through the network at once in one process."""
    share = -(-training.batch_size // processes)
    return min(training.micro_batch_size or share, share)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate, with those torch has reserved; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    limits = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = ("".join(_lines(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        limits.append(int(limit) - int(used))
    return min(limits, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def in_bytes(size: float) -> str:
    """Format a size in GiB, in MiB below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages allocated inside the block while they are held: `now`, and the peak `most`.

    known: existing tensors, which are not counted, nor are views of them.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def held_in_step(model: LatentModel, training: TrainingConfig, batch: Batch, streams: Streams) -> tuple[int, set[str]]:
    """Return the peak bytes of a micro-batch's forward and backward pass, without weights and gradients, and the titles
    of the parts of the loss. Leaves zero gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [value for value in vars(streams).values() if isinstance(value, Tensor)]
    known += [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with StorageCounter(known) as held:
        held.now = held.most = sum(tensor.nbytes for tensor in tree_leaves([batch.data, batch.values]))
        titles = differentiate(model, batch, streams, training.precision)
        most = held.most
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return most, titles


@dataclass(frozen=True)
class Shapes:
    """The shapes and types of a batch: tensors of one row without storage, compared by their text."""

    text: str
    rows: Any = field(compare=False)

    @staticmethod
    def of(batch: Batch) -> Shapes:
        """Return the shapes of a batch."""
        rows = tree_map_only(Tensor, lambda t: torch.empty_like(t[:1], device="meta"), [batch.data, batch.values])
        return Shapes(repr(rows), rows)

    def batch(self, size: int, device: torch.device) -> Batch:
        """Return a batch of `size` samples with arbitrary numbers."""
        data, values = tree_map_only(
            Tensor, lambda t: torch.empty(size, *t.shape[1:], dtype=t.dtype, device=device), self.rows
        )
        return Batch(data, values)


class _NoNumbers(Streams):
    """Random streams whose draws have the right shape and arbitrary numbers."""

    def __init__(self, count: int, device: torch.device):
        self.count, self.device, self.draws = count, device, 0

    def __len__(self) -> int:
        return self.count

    def _blocks(self, numbers: Numbers, blocks: int) -> Tensor:
        return torch.empty(self.count * blocks, 4, device=self.device)

    def stratified(self) -> Tensor:
        return torch.empty(self.count, device=self.device)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
