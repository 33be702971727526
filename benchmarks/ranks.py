"""What a run asks of its network and file system with many processes, counted without a cluster.

    python benchmarks/ranks.py                             # imagenet256-unite-b as one rank of 8, 64 and 512, on meta
    python benchmarks/ranks.py --files 200000 --ranks 4    # stats of each gloo process, at start and at resume
    python benchmarks/ranks.py --width 768 --depth 8       # bytes that each process reads to resume (1 GB)
    python benchmarks/ranks.py --evaluate 2000 --ranks 4   # what `evaluate` and `search` ask of files, by process

The first form runs the code of a run (`Trainer`) as one rank of torch's fake process group: nothing is sent, every
collective is counted. Tensors have no storage, so the weights of a checkpoint are neither read nor hashed, but the
bytes are counted where they would be. Results that the first process broadcasts are recorded, and given to the others.
The other forms start real processes, and count the system calls and bytes of each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unilatent import listings, tensor_files
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.nets import branches
from unilatent.presets import preset
from unilatent.processes import Processes
from unilatent.runs import checkpoint as ckpt
from unilatent.runs import lock
from unilatent.training import saving
from unilatent.training.trainer import Trainer

LINK = 400e9 / 8
"""Bytes a second of the assumed network, per GPU and direction: 400 Gb/s."""
FLOP_PER_IMAGE = 1.661e12 / 2
"""Forward and backward of one image of imagenet256-unite-b, without LPIPS (`train_step.py`)."""
GPU = 0.4 * 989e12
"""Assumed FLOP/s: 40 % of the dense bf16 peak of an H100."""
META = torch.device("meta")


# ---- counting ------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What one process did: collectives by kind, the bytes they carried, and what it asked of the file system.

    sent: bytes that leave or reach this process in ring algorithms. objects: how many collectives carried plain data
    (pickled), which every start has; their bytes are in `object_bytes`.
    """

    collectives: Counter[str] = field(default_factory=Counter)
    carried: Counter[str] = field(default_factory=Counter)
    sent: float = 0.0
    objects: int = 0
    object_bytes: int = 0
    opened: list[str] = field(default_factory=list)
    stats: int = 0
    listed: int = 0
    read: int = 0
    hashed: int = 0
    written: int = 0

    @property
    def number(self) -> int:
        """All collectives, also those of plain data."""
        return sum(self.collectives.values()) + self.objects

    @property
    def bytes(self) -> int:
        return sum(self.carried.values()) + self.object_bytes


def in_ring(kind: str, size: int, world: int) -> float:
    """Bytes that a process sends or receives, whichever is more, for a collective on `size` bytes (its larger side)."""
    share = (world - 1) / world
    return {"allreduce_": 2 * share, "broadcast_": 1.0, "barrier": 0.0}.get(kind, share) * size


class CollectiveCounter(TorchDispatchMode):
    """Counts torch's collectives and performs none of them."""

    def __init__(self, counts: Counts, world: int):
        super().__init__()
        self.counts, self.world = counts, world

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "c10d":
            if function is torch.ops.aten._fused_adamw_.default:
                return None  # updates in place, and has no form for tensors without storage
            return function(*args, **(kwargs or {}))
        kind = function._schema.name.partition("::")[2]
        sides = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args[:2]]
        size = 0 if kind == "barrier" else max(sides)
        self.counts.collectives[kind] += 1
        self.counts.carried[kind] += size
        self.counts.sent += in_ring(kind, size, self.world)
        work = FakeWork().boxed()
        return (args[0], work) if len(function._schema.returns) == 2 else work


ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.tolist: lambda tensor: [0.0] * tensor.numel(),
    Tensor.item: lambda tensor: 1.0,
    Tensor.__float__: lambda tensor: 1.0,
    Tensor.__int__: lambda tensor: 1,
    Tensor.__bool__: lambda tensor: True,
    Tensor.isfinite: lambda tensor: torch.empty_like(tensor, dtype=torch.bool),
}
"""What tensors without storage answer where code asks for their values. Counts are 0: no bad sample, no late gradient.
"""


class OnesForValues(TorchFunctionMode):
    """Tensors without storage give the number 1 where code asks for their values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if function in ANSWERS and first.device.type == "meta":
            return ANSWERS[function](first)
        if function is Tensor.copy_ and args[1].device.type == "meta":
            return first  # to the host: nothing to copy
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched_files(counts: Counts, under: Sequence[Path]) -> Iterator[None]:
    """Count what Python asks about files below some folders: opens, stats, and listings of folders."""
    roots = tuple(map(str, under))

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(roots)

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if inside(path):
                setattr(counts, name, getattr(counts, name) + 1)
            return original(path, *args, **kwargs)

        return call

    WATCHING.append((counts, inside))
    with (
        mock.patch("os.stat", counting("stats", os.stat)),
        mock.patch("os.lstat", counting("stats", os.lstat)),
        mock.patch("os.scandir", counting("listed", os.scandir)),
        mock.patch("os.listdir", counting("listed", os.listdir)),
    ):
        try:
            yield
        finally:
            WATCHING.pop()


WATCHING: list[tuple[Counts, Callable[[Any], bool]]] = []


def _note_open(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        for counts, inside in WATCHING:
            if inside(args[0]):
                counts.opened.append(os.fspath(args[0]))


sys.addaudithook(_note_open)


# ---- one rank of many ----------------------------------------------------------------------------------------------


class OneOfMany(Processes):
    """One process among many that do not exist. Rank 0 records what it found out for all; the others are given it."""

    def __init__(self, counts: Counts, answers: list[Any]):
        super().__init__("cpu")
        self.device, self.counts, self.answers = META, counts, answers
        self.given = iter(answers)

    def from_main(self, find: Callable[[], Any]) -> Any:
        if self.is_main:
            self.answers.append(find())
        answer = self.answers[-1] if self.is_main else next(self.given)
        self._carry(answer, 1)
        return answer

    def highest(self, number: int) -> int:
        super().highest(number)
        return number

    def gather(self, item: Any) -> list[Any]:
        self._carry(item, self.world)
        return [item] * self.world

    def _carry(self, item: Any, times: int) -> None:
        """Plain data are two collectives: their length, and themselves."""
        size = times * (8 + len(pickle.dumps(item)))
        self.counts.objects += 2
        self.counts.object_bytes += size
        self.counts.sent += size


PHASES = ("start", "step", "save", "resume")


@dataclass
class Simulation:
    """A run of `imagenet256-unite-b` as ranks of a fake process group see it. data: a folder of images."""

    folder: Path
    data: Path
    world: int
    overrides: tuple[str, ...] = ()
    answers: dict[str, list[Any]] = field(default_factory=dict)

    def counts(self, rank: int) -> dict[str, Counts]:
        """Counts of each phase, as this rank sees them; that of rank 0 comes first."""
        assert rank == 0 or self.answers, "rank 0 comes first"
        assert not dist.is_initialized()
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=self.world)
        try:
            return self._phases()
        finally:
            dist.destroy_process_group()

    def _phases(self) -> dict[str, Counts]:
        found: dict[str, Counts] = {}
        config = preset("imagenet256-unite-b").override(
            f"data.path={self.data}", "training.workers=0", "modality.perceptual_weight=0", "training.compile=false",
            "training.evaluate_samples=0", "training.evaluate_every=0", "training.best=null",
            "training.optimizer.muon_precision=bf16", "training.background_saving=false", "data.cache=false",
            *self.overrides,
        )  # fmt: skip
        with self._phase("start", found):
            trainer = Trainer(config, self.folder)
            trainer.processes.on_main(trainer._open_folder)
        with trainer._open_journal(), trainer._data() as micro, self._phase("step", found, trainer):
            next(trainer._train(micro))
        with self._phase("save", found, trainer):
            trainer.checkpoints.save_now()
        if trainer.processes.is_main:
            lock.release(self.folder)
        with self._phase("resume", found):
            resumed = Trainer(config, self.folder, resume="auto")
            assert resumed.step == 1
        return found

    @contextlib.contextmanager
    def _phase(self, name: str, found: dict[str, Counts], trainer: Trainer | None = None) -> Iterator[None]:
        """Run a phase without network, storage of tensors or contents of large files."""
        counts = found[name] = Counts()
        processes = OneOfMany(counts, self.answers.setdefault(name, []))
        if trainer is not None:
            processes.__dict__ = trainer.processes.__dict__ | processes.__dict__
            trainer.processes.__dict__ = processes.__dict__
        build, autocast = LatentModel.build, torch.autocast

        def built(*args: Any) -> Any:
            with META:
                return build(*args)

        def described(path: Path) -> dict[str, Any]:
            size = path.stat().st_size
            counts.hashed += size
            return {"bytes": size, "sha256": hashlib.sha256(f"{path.name} {size}".encode()).hexdigest()}

        def read(_: Any, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=META)
            counts.read += tensor.nbytes
            return tensor

        def drawn(streams: Streams, _: Any, blocks: int) -> Tensor:
            return torch.empty(len(streams) * blocks, 4, device=META)

        def saved(tensors: dict[str, Tensor], path: Path) -> None:
            counts.written += write_hollow(tensors, path)

        with (
            mock.patch("unilatent.training.trainer.Processes", lambda *_: processes),
            mock.patch.object(LatentModel, "build", staticmethod(built)),
            mock.patch("torch.autocast", lambda kind, *a, **k: autocast("cpu" if kind == "meta" else kind, *a, **k)),
            mock.patch.object(Streams, "_blocks", drawn),
            mock.patch.object(branches, "conv_type", lambda _: torch.float32),
            mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None),
            mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", lambda *_: True),
            mock.patch.object(ckpt, "describe", described),
            mock.patch.object(listings, "SETTLED", 0),  # the files were made just now
            mock.patch.object(tensor_files, "_read", read),
            mock.patch.object(saving, "save_file", saved),
            watched_files(counts, [self.folder, self.data]),
            OnesForValues(),
            CollectiveCounter(counts, self.world),
        ):
            yield


def write_hollow(tensors: dict[str, Tensor], path: Path) -> int:
    """Write a safetensors file of the right size and header, whose values take no space; return its size."""
    names = {value: key for key, value in tensor_files.DTYPES.items()}
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]
        }  # fmt: skip
        end += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
    return 8 + len(header) + end


def make_images(folder: Path, files: int, classes: int) -> Path:
    """Make a folder of class folders of tiny images, which share a few contents (hard links)."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "0000"
    first.mkdir()
    Image.new("L", (16, 16), 128).save(first / "0.png")
    for i in range(1, files):
        inside = folder / f"{i % classes:04d}"
        if i < classes:
            inside.mkdir()
        if i % 1000:
            os.link(folder / f"{i // 1000 * 1000 % classes:04d}" / f"{i // 1000 * 1000}.png", inside / f"{i}.png")
        else:  # a file has at most 65,000 names on some file systems
            Image.new("L", (16, 16), i // 1000 % 256).save(inside / f"{i}.png")
    return folder


def report(worlds: Sequence[int]) -> None:
    """Print the counts of ranks 0 and 1 for each number of ranks, and the table of docs/cluster.md."""
    lines = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            data = make_images(Path(folder) / "images", 2000, 1000)
            simulation = Simulation(Path(folder) / "run", data, world)
            for rank in (0, 1):
                for phase, c in simulation.counts(rank).items():
                    kinds = ", ".join(f"{n} {kind.strip('_')}" for kind, n in sorted(c.collectives.items()))
                    print(
                        f"{world} ranks, rank {rank}, {phase}: "
                        f"{c.number} collectives ({kinds}, {c.objects} of objects), "
                        f"{c.bytes / 1e6:,.1f} MB ({c.object_bytes / 1e6:.2f} of objects), "
                        f"{len(c.opened)} files opened, {c.stats} stats, {c.listed} folders listed, "
                        f"{c.read / 1e6:,.1f} MB of tensors read, {c.hashed / 1e6:,.1f} MB hashed, "
                        f"{c.written / 1e6:,.1f} MB written"
                    )
                    if phase == "step" and rank == 0:
                        compute, wire = 1024 / world * FLOP_PER_IMAGE / GPU, c.sent / LINK
                        lines.append(
                            f"| {world} | {1024 // world} | {c.sent / 1e9:.2f} | {1e3 * wire:.0f} | "
                            f"{1e3 * compute:.0f} | {wire / compute:.0%} | {wire / (wire + compute):.0%} |"
                        )
    print(
        "\n| ranks | images a rank | GB a step and rank | ms at 400 Gb/s | ms of compute | ratio | share of the step |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", *lines, sep="\n")


# ---- real processes ------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """Bytes that this process asked to read so far, from files or the page cache (Linux)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def work(out: Path, overrides: Sequence[str]) -> None:
    """One process: start, take a step, save; start again and resume; print the counts of both starts, by rank."""
    config, found = preset("digits").override(*overrides), {}
    data = [Path(config.data.path)] if config.data.path != "digits" else []
    for phase, resume in (("start", None), ("resume", "auto")):
        counts, before = Counts(), bytes_read()
        with watched_files(counts, [*data, out]):
            trainer = Trainer(config, out, resume=resume)
        found[phase] = {"stats": counts.stats, "listed": counts.listed, "opened": len(counts.opened),
                        "bytes": bytes_read() - before}  # fmt: skip
        if resume is None:
            trainer.processes.on_main(trainer._open_folder)
            with trainer._open_journal(), trainer._data() as micro:
                next(trainer._train(micro))
            trainer.checkpoints.save_now()
            trainer.processes.on_main(lambda: lock.release(out))
            del trainer
        elif trainer.step != 1:
            raise AssertionError(trainer.step)
    everyone = trainer.processes.gather(found)
    trainer.processes.on_main(lambda: print(json.dumps(everyone)))
    trainer.processes.leave()


def measure(ranks: int, out: Path, *overrides: str) -> list[dict[str, dict[str, int]]]:
    """Run `work` in so many gloo processes; returns the counts of each rank, of start and resume."""
    printed = start(ranks, "--work", str(out), *(f"--set={override}" for override in overrides))
    return json.loads(next(line for line in printed.splitlines() if line.startswith("[{")))


def start(ranks: int, *arguments: str) -> str:
    """Run this script in so many gloo processes; returns what they print."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__,
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


SHORT = (
    "training.batch_size=8", "training.evaluate_samples=0", "training.sample_every=0", "training.threads=1",
    "training.background_saving=false",
)  # fmt: skip


def measure_files(folder: Path, files: int, classes: int, ranks: int) -> list[dict[str, dict[str, int]]]:
    """Stats of each rank on a data set of that many files."""
    data = make_images(folder / "images", files, classes)
    # A folder that changed just before it was listed is listed again.
    time.sleep(2 * listings.SETTLED / 1e9)
    return measure(ranks, folder / "run", f"data.path={data}", "data.held_out=0", "data.cache=false", *SHORT)


def measure_checkpoint(folder: Path, width: int, depth: int, ranks: int) -> tuple[int, list[dict[str, dict[str, int]]]]:
    """Bytes of a checkpoint, and those that each rank read to resume."""
    found = measure(
        ranks, folder / "run", f"method.generative_encoder.width={width}", f"method.generative_encoder.depth={depth}",
        *SHORT,
    )  # fmt: skip
    (saved,) = ckpt.published(folder / "run" / "checkpoints")
    return sum(path.stat().st_size for path in saved.iterdir()), found


def watched_command(out: Path, places: Sequence[Path], words: Sequence[str]) -> None:
    """One process of a command: run it, and write what it asked of each place to a file, with the fits of extractors.

    Files are named by how often they were opened; of images, only the number is written.
    """
    from unilatent.cli import app
    from unilatent.modalities.image.spaces import ClassifierSpace

    found, fits, fit = {place.name: Counts() for place in places}, [], ClassifierSpace.fit

    def counted(space: ClassifierSpace, train: Any) -> None:
        fits.append(len(train))
        fit(space, train)

    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(watched_files(found[place.name], [place]))
        stack.enter_context(mock.patch.object(ClassifierSpace, "fit", counted))
        app(list(words), standalone_mode=False)
    content: dict[str, Any] = {"fits": len(fits)}
    for place, counts in found.items():
        names = Counter(Path(name).name for name in counts.opened if not name.endswith(".png"))
        images = [name for name in counts.opened if name.endswith(".png")]
        content[place] = {"stats": counts.stats, "listed": counts.listed, "images": len(images), "opened": names}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(content))


def measure_commands(folder: Path, images: int, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """What each process of `evaluate` and `search` asks of the run, its model and the reference, a folder of images."""
    from unilatent.cli import app

    run, reference = folder / "run", folder / "reference"
    quick = ("training.steps=2", "training.batch_size=8", "training.evaluate_samples=0", "training.sample_every=0")
    app(["train", "digits", *quick, "--out", str(run)], standalone_mode=False)
    rng = torch.Generator().manual_seed(0)
    for i in range(images):
        (reference / str(i % 10)).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(reference / str(i % 10) / f"{i}.png")
    beside = ("--reference", str(reference), "--num", "64")
    commands = {
        "evaluate": ("evaluate", str(run), *beside, "--steps", "1"),
        "search": ("search", str(run), *beside, "--over", "num_inference_steps", "--values", "1,2", "--metric",
                   "frechet_pixels"),
    }  # fmt: skip
    found = {}
    for name, words in commands.items():
        out = folder / name
        out.mkdir()
        places = [f"--watch={place}" for place in (run / "model", reference)]
        start(ranks, "--work", str(out), *places, *(f"--word={word}" for word in words))
        found[name] = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--files", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--evaluate", type=int, metavar="IMAGES")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="append", default=[], type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--word", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work and given.word:
        watched_command(given.work, given.watch, given.word)
        return
    if given.work:
        work(given.work, given.set)
        return
    if given.evaluate:
        with tempfile.TemporaryDirectory() as folder:
            for name, of_ranks in measure_commands(Path(folder), given.evaluate, given.ranks).items():
                for rank, found in enumerate(of_ranks):
                    print(f"{name}, rank {rank}: {json.dumps(found)}")
        return
    if not given.files and not given.width:
        report(given.worlds)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.files:
            found = measure_files(Path(folder), given.files, min(1000, given.files), given.ranks)
            print(f"{given.files:,} files")
        else:
            size, found = measure_checkpoint(Path(folder), given.width, given.depth, given.ranks)
            print(f"checkpoint: {size / 1e9:.3f} GB")
        for rank, phases in enumerate(found):
            print(f"rank {rank}: {phases}")


if __name__ == "__main__":
    main()
