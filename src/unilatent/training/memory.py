"""How much memory a training step needs, measured before anything of that size is allocated.

A step is run on fake tensors, which have shapes, types and a device but no storage, and every storage that would have
been made is counted while it would have been held. Nothing is guessed but what kernels use inside themselves.
"""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..nets.layers import Repeated
from ..registry import find
from ..types import Batch
from .config import RunConfig, TrainingConfig
from .optimizer import Optimizers
from .processes import BUCKET

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What running out of memory can look like; of the last, only some are (`is_out_of_memory`)."""
USABLE = 0.9
"""Share of the free memory that a run may plan with: kernels need some inside, and allocators leave gaps."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step; free: what its device has for them, None if it does not tell.

    activations: everything that a micro-batch needs at once over and above the rest; None where a step cannot run on
    fake tensors (it asks for values).
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None
    micro_batch: int
    free: int | None = None
    fitting: int | None = None
    """The largest power of two of samples that fits, where micro_batch does not; 0 if none does."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + (self.activations or 0)

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= USABLE * self.free

    def warning(self) -> str:
        """What to do when it does not fit, or ""."""
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
            f"{in_bytes(self.average)} average",
        ]
        if self.activations is not None:
            parts.append(f"{in_bytes(self.activations)} activations of micro-batches of {self.micro_batch}")
        word = "at least" if self.activations is None else "about"
        free = "" if self.free is None else f"; {in_bytes(self.free)} free"
        return f"{word} {in_bytes(self.total)}: {', '.join(parts)}{free}"


def estimate(config: RunConfig, example: Batch, device: torch.device, processes: int = 1) -> Memory:
    """Of the run's own micro-batch, and the largest one that fits if that does not. example: a few of its samples.

    What the losses load is loaded first (`Modality.prepare`): nothing that outlives a step may be made of fake tensors.
    """
    device = torch.empty(0, device=device).device  # cuda is cuda:0
    find("modalities", config.modality.name)(config.modality).prepare(device)
    free = free_memory(device)
    text, shapes = json.dumps(config.plain()), Shapes.of(example)

    def of(micro: int) -> Memory:
        return replace(_measured(text, shapes, device, micro, processes), free=free)

    memory = of(micro_batch(config.training, processes))
    return memory if memory.fits else replace(memory, fitting=_fitting(memory, of(1)))


def _fitting(large: Memory, one: Memory) -> int:
    """The largest power of two of samples below `large` that fits: what a step holds grows evenly with its samples."""
    if not one.fits:
        return 0
    each = (large.total - one.total) / max(1, large.micro_batch - 1)
    room = USABLE * (one.free or 0) - one.total
    most = min(large.micro_batch - 1, 1 + int(room / max(each, 1)))
    return 1 << (most.bit_length() - 1)


@lru_cache(maxsize=64)
def _measured(config: str, shapes: Shapes, device: torch.device, micro: int, processes: int) -> Memory:
    """A step of the configuration (as JSON), for samples of those shapes, in one of so many processes."""
    run = RunConfig.parse(json.loads(config))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = LatentModel.build(run.model())
        for module in model.modules():
            if isinstance(module, Repeated):
                module.recompute = run.training.activation_checkpointing
        batch = shapes.batch(micro, device)
        try:
            activations, parts = held_in_step(model, run.training, batch, _NoNumbers(micro, device))
        except Exception:  # a step that asks for values, an operation without shapes: worth an estimate, not a run
            activations, parts = None, set()
        sharded = run.training.shard and processes > 1
        held = _Held(model, processes if sharded else 1)
        trained = [p for p in model.parameters() if p.requires_grad]
        summed = sum(p.nbytes for p in trained if not (sharded and p in held.cut))  # outside blocks, by a bucket
        copies = 1 + (len(parts) if run.training.log_gradients and not sharded else 0)
        return Memory(
            weights=held.bytes(model.parameters()) + sum(b.nbytes for b in model.buffers()) + held.gathered,
            gradients=copies * held.bytes(trained) + held.gathered + (min(4 * BUCKET, summed) if processes > 1 else 0),
            optimizer=Optimizers(model, run.training.optimizer).state_bytes_of(held.share),
            average=(1 + len(run.training.ema_profiles)) * held.bytes(model.parameters(), 4),
            activations=activations,
            micro_batch=micro,
        )


class _Held:
    """What one of `world` processes holds of a model whose `Repeated` blocks are cut over them.

    cut: the parameters inside blocks. gathered: bytes of the largest block, put together while it is used.
    """

    def __init__(self, model: LatentModel, world: int):
        self.world = world
        blocks = [module for module in model.modules() if isinstance(module, Repeated)] if world > 1 else []
        self.cut = {p for block in blocks for p in block.parameters()}
        self.gathered = max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)

    def share(self, parameter: Tensor) -> float:
        """Of a parameter; the first dimension is cut, and the first process has the largest piece."""
        rows = parameter.shape[0] if parameter.ndim and parameter in self.cut else 0
        return -(-rows // self.world) / rows if rows else 1.0

    def bytes(self, parameters: Iterable[Tensor], width: int | None = None) -> int:
        """Of all of them together. width: bytes of a number; None: as it is."""
        return sum(round((width or p.element_size()) * p.numel() * self.share(p)) for p in parameters)


def micro_batch(training: TrainingConfig, processes: int) -> int:
    """Samples that go through the network at once in one process, at most."""
    share = -(-training.batch_size // processes)
    return min(training.micro_batch_size or share, share)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still take, with what torch holds for it already; None if nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = ("".join(_lines(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def in_bytes(size: float) -> str:
    """For people: MiB below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


class Held(TorchDispatchMode):
    """Counts the bytes of storages made inside it while they are held: `now`, and `most` at any moment.

    known: tensors from before, which do not count, nor do views of them.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
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
    """Most bytes held at once, over weights and gradients, while a micro-batch goes forward and backward; the titles
    of the loss's parts. Leaves zero gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    device, titles = model.device.type, set()
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Held(known) as held:
        held.now = held.most = sum(tensor.nbytes for tensor in tree_leaves([batch.data, batch.values]))
        parts = iter(model.loss(batch, streams))
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"):
                part = next(parts, None)
            if part is None:
                break
            part.value.backward(retain_graph=part.retain)
            titles.add(part.title)
        most = held.most
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return most, titles


@dataclass(frozen=True)
class Shapes:
    """What samples look like: tensors of one row without storage, compared by what they say of themselves."""

    words: str
    rows: Any = field(compare=False)

    @staticmethod
    def of(batch: Batch) -> Shapes:
        rows = tree_map_only(Tensor, lambda t: torch.empty_like(t[:1], device="meta"), [batch.data, batch.values])
        return Shapes(repr(rows), rows)

    def batch(self, size: int, device: torch.device) -> Batch:
        """That many samples, with whatever numbers."""
        data, values = tree_map_only(
            Tensor, lambda t: torch.empty(size, *t.shape[1:], dtype=t.dtype, device=device), self.rows
        )
        return Batch(data, values)


class _NoNumbers(Streams):
    """Draws of the right shape, without any numbers in them."""

    def __init__(self, count: int, device: torch.device):
        self.count, self.device = count, device

    def __len__(self) -> int:
        return self.count

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, device=self.device)

    uniform = normal

    def stratified(self) -> Tensor:
        return self.normal()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
